"""Products by a weight: what they read, and along which axes their sums run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Builder
from graphopt.matcher import argument, arguments, parameter_names

aten = torch.ops.aten


@dataclass(frozen=True)
class Form:
    """The names of an operator's arguments, and where channels lie.

    A row is what makes one output channel: it lies along `row_axis` of the weight, its inputs along `column_axis`,
    and both kinds of channels along `channel_axis` of the activations.
    """

    input: str
    weight: str
    bias: str | None
    row_axis: int = 0
    column_axis: int = 1
    channel_axis: int = -1


FORMS: Mapping[Any, Form] = {
    aten.linear.default: Form("input", "weight", "bias"),
    aten.addmm.default: Form("mat1", "mat2", "self", 1, 0),
    aten.mm.default: Form("self", "mat2", None, 1, 0),
    aten.matmul.default: Form("self", "other", None, 1, 0),
    aten.conv1d.default: Form("input", "weight", "bias", channel_axis=-2),
    aten.conv2d.default: Form("input", "weight", "bias", channel_axis=-3),
}
_PLAIN = {"groups": 1, "beta": 1, "alpha": 1}


@dataclass(frozen=True)
class Product:
    """A call that multiplies `input` by `weight`, an attribute, and adds `bias`, an attribute or None."""

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    form: Form

    def as_rows(self, weight: Tensor) -> Tensor:
        """A weight of this product as a matrix [outputs, inputs]; taps of a kernel count as inputs."""
        return weight.movedim(self.form.row_axis, 0).flatten(1)

    def in_two(self, outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of two products, the second of `by_channel`, for a weight that is outer [outputs, rank] by inner."""
        shape = self.weight.meta["val"].movedim(self.form.row_axis, 0).shape
        first = inner.view(-1, *shape[1:]).movedim(0, self.form.row_axis).contiguous()
        second = outer.movedim(0, self.form.row_axis).contiguous()
        return second.view(*second.shape, *[1] * (len(shape) - 2)), first

    def by(self, builder: Builder, weight: Node) -> Node:
        """The same call by another weight and without a bias."""
        if self.node.target is aten.addmm.default:
            return builder.call(aten.mm.default, self.input, weight)
        names = parameter_names(self.node.target)  # type: ignore[arg-type]
        given = dict(zip(names, arguments(self.node), strict=True))
        given[self.form.weight] = weight
        if self.form.bias:
            given[self.form.bias] = None
        return builder.call(self.node.target, *given.values())  # type: ignore[arg-type]

    def by_channel(self, builder: Builder, source: Node, weight: Node) -> Node:
        """The sum over the channels of `source` [.., rank, ..] alone, with the bias."""
        if self.node.target is aten.addmm.default:
            return builder.call(aten.addmm.default, self.bias, source, weight)
        return builder.call(self.node.target, source, weight, *([self.bias] if self.form.bias else []))  # type: ignore[arg-type]

    def with_bias(self, builder: Builder, total: Node) -> Node:
        """A result of `by` and the bias."""
        if self.bias is None:
            return total
        after = -1 - self.form.channel_axis
        bias = builder.call(aten.view.default, self.bias, [-1, *[1] * after]) if after else self.bias
        return builder.call(aten.add.Tensor, total, bias)


def as_product(node: Node) -> Product | None:
    """The call as a product by an attribute; None for anything else, grouped convolutions included."""
    form = FORMS.get(node.target)
    if form is None or any(argument(node, name) != value for name, value in _PLAIN.items() if _takes(node, name)):
        return None
    source, weight = argument(node, form.input), argument(node, form.weight)
    bias = argument(node, form.bias) if form.bias else None
    if weight.op != "get_attr" or weight.meta["val"].dim() < 2 or (bias is not None and bias.op != "get_attr"):
        return None
    return Product(node, source, weight, bias, form)


def _takes(node: Node, name: str) -> bool:
    return name in parameter_names(node.target)  # type: ignore[arg-type]
