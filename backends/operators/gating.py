"""Products that leave out blocks of channels: minimal filtering, direct convolution, or depthwise, as without gates.

A linear layer is a convolution of one tap over its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

import graphopt.operators  # noqa: F401  defines them
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.convolution import channels_last
from graphopt.backends.operators.views import reshape
from graphopt.backends.rules import winograd
from graphopt.backends.rules.active_blocks import Gates
from graphopt.backends.rules.convolution import Direct, channels_inner, configure, pack_filters
from graphopt.backends.rules.depthwise import depthwise, pack_depthwise
from graphopt.backends.rules.gated_convolution import gated_convolution
from graphopt.backends.rules.gated_winograd import gated_winograd
from graphopt.backends.rules.windows import Window
from graphopt.backends.sizes import Shape, product, shape_of
from graphopt.backends.values import Product, View, inverse
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Code
    from graphopt.backends.lowering import Lowering


def _gates(lowering: Lowering, node: Node) -> tuple[torch.Tensor, Gates]:
    """The weight and what says which of its channels take part. Raises CompileError for a weight that is computed."""
    given = arguments(node)
    weight = lowering.value(given["weight"])
    if not isinstance(weight, torch.Tensor) or node.meta["val"].dtype != torch.float32:
        raise CompileError(f"{node.name} is gated and not float32 by a constant weight; gate it with form=mask")
    inputs, outputs, bias = (
        None if given[name] is None else lowering.contiguous(given[name])
        for name in ("active_inputs", "active_outputs", "bias")
    )
    return weight, Gates(inputs, outputs, bias, given["block"])


def _convolution(lowering: Lowering, node: Node) -> Any:
    given = arguments(node)
    weight, gates = _gates(lowering, node)
    shape, target = shape_of(node.meta["val"]), lowering.target
    order = (0, 3, 1, 2)
    outputs = tuple(shape[axis] for axis in inverse(order))
    x = channels_last(lowering, given["x"], 2)
    window = Window(tuple(weight.shape[2:]), *(tuple(given[name]) for name in ("stride", "padding", "dilation")))
    name = f"gated_conv2d_{'x'.join(str(int(size)) for size in weight.shape)}"
    if given["groups"] > 1:
        x = x if x.strides[-1] == 1 else lowering.contiguous(x)
        packed = lowering.weight(weight, "depthwise", pack_depthwise)
        return lowering.anchored(
            node, lambda result, end: depthwise(x, packed, result, end, window, name, target, gates), order=order
        )
    if winograd.suits(outputs, tuple(weight.shape), 1, window, target) and x.strides[3] == 1:
        choice = winograd.configure(outputs, int(weight.shape[1]), target)
        filters = lowering.weight(
            weight, f"winograd{target.lanes}", lambda array: winograd.transform_filters(array, target.lanes)
        )
        call = winograd.Winograd(x, filters, outputs, window, choice)
        return lowering.anchored(
            node, lambda result, end: gated_winograd(call, gates, result, end, name, target), order=order
        )
    build = _direct(lowering, x, weight, outputs, window, gates, name)
    return lowering.anchored(node, build, order=order)


def _direct(
    lowering: Lowering, x: View, filters: torch.Tensor, outputs: Shape, window: Window, gates: Gates, name: str
) -> Callable[[Product, Any], Code]:
    target, inner = lowering.target, channels_inner(x)
    choice = configure(outputs, tuple(filters.shape), 1, window, target)
    # Each vector of a panel is a stream of its own: over more steps LLVM loads it ahead and runs out of registers.
    choice = replace(choice, tile=replace(choice.tile, steps=2))
    key = f"conv{target.lanes}{'' if inner else 'planar'}"
    packed = lowering.weight(filters, key, lambda array: pack_filters(array, 1, target.lanes, inner))
    direct = Direct(x, packed, outputs, window, 1, any(window.pads), choice)
    return lambda result, end: gated_convolution(direct, gates, result, end, name, target)


def _linear(lowering: Lowering, node: Node) -> Any:
    """x [N, ..., K]: the rows of a sample are its pixels."""
    given = arguments(node)
    weight, gates = _gates(lowering, node)
    x = lowering.contiguous(given["x"])
    rows, channels = product(x.shape[1:-1]), x.shape[-1]
    pixels = lowering.view(reshape(lowering, x, (x.shape[0], rows, 1, channels)))
    outputs = (x.shape[0], rows, 1, int(weight.shape[0]))
    window = Window((1, 1), (1, 1), (0, 0), (1, 1))
    name = f"gated_linear_{weight.shape[0]}x{weight.shape[1]}"
    return lowering.anchored(node, _direct(lowering, pixels, weight[..., None, None], outputs, window, gates, name))


TABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.graphopt.gated_convolution.default: _convolution,
    torch.ops.graphopt.gated_linear.default: _linear,
}
