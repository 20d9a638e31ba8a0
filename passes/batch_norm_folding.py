"""Fold a batch normalization in evaluation into the convolution or linear before it.

Before: y = batch_norm(conv(x, w, b), gamma, beta, mean, var)
After:  y = conv(x, w * s, (b - mean) * s + beta)    with s = gamma / sqrt(var + eps), one factor an output channel

The new weights are computed in float64 and rounded once; results differ by rounding. Declines where the convolution
is used by anything else, where a weight is no constant, and a linear of other than 2 axes (its channels are the last).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Builder, Edit, GraphEditor
from graphopt.matcher import argument, arguments
from graphopt.near_miss import describe
from graphopt.program import Program

aten = torch.ops.aten

CONVOLUTIONS = frozenset(
    {aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default}
    | {aten.conv3d.padding, aten.convolution.default}
)
TRANSPOSED = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input})
PRODUCERS = CONVOLUTIONS | TRANSPOSED | {aten.linear.default}
NORMS = frozenset(
    {aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default, aten.native_batch_norm.default}
)
OF_THE_BATCH = frozenset({aten._native_batch_norm_legit.default, aten._native_batch_norm_legit.no_stats})
PARAMETERS = ("weight", "bias", "running_mean", "running_var")
BATCH_STATISTICS = "it normalizes with the statistics of the batch (training=True)"


@dataclass(frozen=True)
class BatchNormFolding(Pass):
    """Fold a batch normalization in evaluation into the convolution or linear before it."""

    name = "batch-norm-folding"

    def starts_at(self) -> frozenset[Any]:
        return NORMS | OF_THE_BATCH

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Edit(program, context, self.name)
        for editor in edit.graphs():
            for node in editor.nodes():
                if node.target in NORMS:
                    self._try(editor, node)
                elif node.target in OF_THE_BATCH:
                    editor.decline(self.name, node, BATCH_STATISTICS)
        return edit.finish()

    def _try(self, editor: GraphEditor, norm: Node) -> None:
        producer = norm.args[0]
        if not isinstance(producer, Node) or producer.target not in PRODUCERS:
            found = f"its input is {describe(producer)}, neither a convolution nor a linear"
            editor.near_miss(self.name, norm, found, 1, 2)
            return
        result = _result(norm)
        reason = "its batch statistics are used too" if result is None else why_not(editor, norm, producer)
        if result is None or reason is not None:
            editor.decline(self.name, norm, reason or "")
            return
        weight, bias = folded_weights(editor, norm, producer)
        if not (weight.isfinite().all() and bias.isfinite().all()):
            editor.decline(self.name, norm, "a folded weight is not finite")
            return

        def build(builder: Builder) -> list[Node]:
            given = list(arguments(producer))
            given[1:3] = builder.constant(weight), builder.constant(bias)
            return [builder.call(_callable(producer), *given)]

        inner = [producer] if result is norm else [producer, norm]
        editor.replace(self.name, [result], build, inner=inner, at=norm)


def _callable(node: Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target


def _result(norm: Node) -> Node | None:
    """The normalized value: the node itself, or its item 0 where that is the only one used."""
    if norm.target is aten.batch_norm.default:
        return norm
    users = list(norm.users)
    if len(users) == 1 and users[0].target is operator.getitem and users[0].args[1] == 0:
        return users[0]
    return None


def why_not(editor: GraphEditor, norm: Node, producer: Node) -> str | None:
    """The first condition of folding that `norm` and its `producer` fail."""
    name, others = producer.name, [user.name for user in producer.users if user is not norm]
    if norm.target is not aten._native_batch_norm_legit_no_training.default and argument(norm, "training"):
        return BATCH_STATISTICS
    if others:
        return f"{name} is also used by {others[0]}"
    if producer.target is aten.linear.default and producer.meta["val"].dim() != 2:
        return f"{name} has {producer.meta['val'].dim()} axes: its channels are not those that are normalized"
    if editor.constant_value(producer.args[1]) is None:
        return f"the weight of {name} is no constant"
    bias = argument(producer, "bias")
    if bias is not None and editor.constant_value(bias) is None:
        return f"the bias of {name} is no constant"
    for parameter in PARAMETERS:
        value = argument(norm, parameter)
        if value is None and parameter.startswith("running"):
            return f"it has no {parameter}"
        if value is not None and editor.constant_value(value) is None:
            return f"its {parameter} is no constant"
    return None


def folded_weights(editor: GraphEditor, norm: Node, producer: Node) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias [out channels] of the convolution or linear that does both, in the type of the old weight."""
    gamma, beta, mean, var = (_float64(editor, argument(norm, parameter)) for parameter in PARAMETERS)
    weight, bias = editor.constant_value(producer.args[1]), _float64(editor, argument(producer, "bias"))
    assert weight is not None and mean is not None and var is not None
    scale = (var + float(argument(norm, "eps"))).rsqrt() * (1.0 if gamma is None else gamma)
    shift = ((0.0 if bias is None else bias) - mean) * scale + (0.0 if beta is None else beta)
    new_weight = (weight.detach().double() * _along_outputs(scale, weight, producer)).to(weight.dtype)
    new_bias = shift.to(weight.dtype)
    if isinstance(weight, torch.nn.Parameter):
        return torch.nn.Parameter(new_weight, weight.requires_grad), torch.nn.Parameter(new_bias, weight.requires_grad)
    return new_weight, new_bias


def _along_outputs(scale: torch.Tensor, weight: torch.Tensor, producer: Node) -> torch.Tensor:
    """`scale` [out channels] broadcast over a weight: axis 0, or (in, out / groups, ...) for a transposed one."""
    transposed = producer.target in TRANSPOSED
    if producer.target is aten.convolution.default:
        transposed = bool(argument(producer, "transposed"))
    ones = [1] * (weight.dim() - 2)
    if not transposed:
        return scale.reshape(-1, 1, *ones)
    groups = int(argument(producer, "groups"))
    per_input = scale.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return per_input.reshape(*per_input.shape, *ones)


def _float64(editor: GraphEditor, node: Any) -> torch.Tensor | None:
    value = editor.constant_value(node)
    return None if value is None else value.detach().double()
