"""Programs of integer operators as programs that say what they round, which is what ONNX has a form for.

Before: y = qlinear(x, w, b)        After: y = quantize(linear(dequantize(x), dequantize(w), b))

This is qdq-fusion backwards. Codes differ by at most one, where the number before rounding lies within float32's error
of a half, and fusing again gives the same operators. A narrower range of codes is a clip of the numbers; padding on
unequal sides stands before the convolution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.contract import PassContext
from graphopt.edit import Builder, Edit, GraphEditor
from graphopt.errors import UsageError
from graphopt.matcher import argument
from graphopt.operators import integer_elements, integer_pooling, integer_products, integer_sums  # noqa: F401
from graphopt.operators.quantization import CODES
from graphopt.program import Program

aten, graphopt = torch.ops.aten, torch.ops.graphopt
_NAME = "explicit-quantization"
_LAYERS = frozenset({graphopt.qlinear.default, graphopt.qconv.default})
_ACTIVATIONS: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "gelu": (aten.gelu.default, {}),
    "gelu-tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "silu": (aten.silu.default, {}),
    "sigmoid": (aten.sigmoid.default, {}),
    "tanh": (aten.tanh.default, {}),
    "hardswish": (aten.hardswish.default, {}),
    "hardsigmoid": (aten.hardsigmoid.default, {}),
}

_POOLS = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}


def explicit(program: Program) -> Program:
    """The program with `quantize` and `dequantize` in the place of its integer operators.

    Raises UsageError where a parameter that has to be known is computed.
    """
    edit = Edit(program, PassContext(), _NAME)
    for editor in edit.graphs():
        for node in editor.nodes():
            if (numbers := _NUMBERS.get(node.target)) is not None:
                editor.replace(_NAME, [node], functools.partial(_written, editor, node, numbers))
    return edit.finish().program


@dataclass(frozen=True)
class _Operator:
    """An integer operator that is written out."""

    editor: GraphEditor
    node: Node
    builder: Builder

    def given(self, name: str) -> Any:
        return argument(self.node, name)

    def held(self, name: str) -> Tensor:
        """The elements of an operand that must be constant."""
        value = self.editor.constant_value(self.given(name))
        if value is None:
            raise UsageError(f"{self.node.name} is {self.node.target} with a computed {name}; save a .pt2")
        return value.detach()

    def numbers(self, name: str, *, scale: Any = None, axis: int | None = None) -> Node:
        """What the codes of an operand stand for; `scale` in the place of its own."""
        codes, steps = self.given(name), self.given(f"{name}_scale") if scale is None else scale
        zero = None if name in ("weight", "bias") else self.given(f"{name}_zero_point")
        low, high = CODES[codes.meta["val"].dtype]
        dtype = steps.meta["val"].dtype
        axis = axis if steps.meta["val"].ndim else None
        return self.builder.call(
            graphopt.dequantize.default, codes, steps, zero, axis=axis, qmin=low, qmax=high, dtype=dtype
        )

    def product(self, x: Node) -> tuple[Node, Node, Any]:
        """The operands of a linear layer or convolution; a bias in steps of the sums has their scale."""
        bias = self.given("bias")
        if bias is not None and not bias.meta["val"].is_floating_point():
            steps = self.builder.constant(self.held("x_scale") * self.held("weight_scale"))
            bias = self.numbers("bias", scale=steps, axis=0)
        return x, self.numbers("weight", axis=0), bias

    def codes(self, number: Node) -> Node:
        """What follows the sums: residual, activation, clip and quantize, each where there is one."""
        activation, reciprocal, dtype = None, False, self.given("dtype")
        if self.node.target in _LAYERS:
            activation = self.given("activation")
            reciprocal = activation is not None and self.given("reciprocal")
            if self.given("residual") is not None:
                number = self.builder.call(aten.add.Tensor, number, self.numbers("residual"))
        if activation is not None:
            target, options = _ACTIVATIONS[activation]
            number = self.builder.call(target, number, **options)
        if (scale := self.given("scale")) is None:
            same = number.meta["val"].dtype == dtype
            return number if same else self.builder.call(aten._to_copy.default, number, dtype=dtype)
        low, high = CODES[dtype]
        return self.builder.call(
            graphopt.quantize.default,
            *(self._clipped(number, low, high), scale, self.given("zero_point")),
            **{"qmin": low, "qmax": high, "dtype": dtype, "reciprocal": reciprocal},
        )

    def _clipped(self, number: Node, low: int, high: int) -> Node:
        """Clipped to what the operator's bounds stand for, where they are narrower than all codes of the type."""
        least, most = self.given("qmin"), self.given("qmax")
        if (least, most) == (low, high):
            return number
        zero = 0 if self.given("zero_point") is None else int(self.held("zero_point"))
        if (least, most) == (zero, high):
            return self.builder.call(aten.relu.default, number)
        scale = float(self.held("scale"))
        ends = (None if code == end else (code - zero) * scale for code, end in ((least, low), (most, high)))
        return self.builder.call(aten.clamp.default, number, *ends)


def _written(editor: GraphEditor, node: Node, numbers: Callable[[_Operator], Node], builder: Builder) -> list[Node]:
    operator = _Operator(editor, node, builder)
    return [operator.codes(numbers(operator))]


# The numbers of each operator, before what follows its sums -----------------------------------------------------------
def _linear(op: _Operator) -> Node:
    return op.builder.call(aten.linear.default, *op.product(op.numbers("x")))


def _convolution(op: _Operator) -> Node:
    x, padding = op.numbers("x"), op.given("padding")
    if len(padding) == 4:
        above, left, below, right = padding
        x, padding = op.builder.call(aten.constant_pad_nd.default, x, [left, right, above, below], 0.0), [0, 0]
    shape = (op.given("stride"), padding, op.given("dilation"), op.given("groups"))
    return op.builder.call(aten.conv2d.default, *op.product(x), *shape)


def _sum_of_two(op: _Operator) -> Node:
    """A difference is a sum with a negative scale."""
    negative = bool(op.held("b_scale") < 0)
    scale = op.builder.constant(-op.held("b_scale")) if negative else None
    target = aten.sub.Tensor if negative else aten.add.Tensor
    return op.builder.call(target, op.numbers("a"), op.numbers("b", scale=scale))


def _pair(target: Any, op: _Operator) -> Node:
    return op.builder.call(target, op.numbers("a"), op.numbers("b"))


def _sum(op: _Operator) -> Node:
    """A mean, or a sum whose divisor its scale takes."""
    axes, divisor = op.given("dim"), op.given("divisor")
    sizes = [op.given("x").meta["val"].shape[axis] for axis in axes]
    if divisor != 1 and all(isinstance(size, int) for size in sizes) and math.prod(sizes) == divisor:
        return op.builder.call(aten.mean.dim, op.numbers("x"), axes, op.given("keepdim"))
    scale = None if divisor == 1 else op.builder.constant(op.held("x_scale") / divisor)
    return op.builder.call(aten.sum.dim_IntList, op.numbers("x", scale=scale), axes, op.given("keepdim"))


def _average(op: _Operator) -> Node:
    """A mean of windows; a divisor other than their elements is taken by the scale."""
    kernel, divisor = op.given("kernel_size"), op.given("divisor")
    shape = kernel, op.given("stride"), op.given("padding"), op.given("ceil_mode")
    scale = None
    if divisor is not None and op.given("ceil_mode"):
        raise UsageError(
            f"{op.node.name} is {op.node.target} with ceil_mode and a divisor, which ONNX has no form for; save a .pt2"
        )
    if divisor is not None and divisor != math.prod(kernel):
        scale = op.builder.constant(op.held("x_scale") * math.prod(kernel) / divisor)
    return op.builder.call(_POOLS[len(kernel)], op.numbers("x", scale=scale), *shape, divisor is not None)


_NUMBERS: Mapping[Any, Callable[[_Operator], Node]] = {
    graphopt.qlinear.default: _linear,
    graphopt.qconv.default: _convolution,
    graphopt.qadd.default: _sum_of_two,
    graphopt.qmul.default: functools.partial(_pair, aten.mul.Tensor),
    graphopt.qdiv.default: functools.partial(_pair, aten.div.Tensor),
    graphopt.qmatmul.default: functools.partial(_pair, aten.matmul.default),
    graphopt.qsum.default: _sum,
    graphopt.qavg_pool.default: _average,
}
