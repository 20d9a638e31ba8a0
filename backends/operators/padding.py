"""Padding: with a constant, by reflection, by the nearest element, or from the other end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import constant
from graphopt.backends.operators.indexing import element_at
from graphopt.backends.sizes import Size, shape_of
from graphopt.backends.values import Index, Lazy

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten


def _pad(lowering: Lowering, node: Node) -> Lazy:
    """constant_pad_nd (x, pad, value) and pad (x, pad, mode, value); a negative number cuts."""
    given = arguments(node)
    pairs = [int(p) for p in given["pad"]]
    mode = given.get("mode", "constant")
    if mode != "constant":
        return _bordered(lowering, node, given["self"], pairs, mode)
    return padded(lowering.view(given["self"]), pairs, given["value"] or 0, shape_of(node.meta["val"]))


def padded(x: Any, pairs: list[int], fill: Any, shape: tuple[Size, ...]) -> Lazy:
    """`x` with `fill` around it; `pairs` are (before, after) from the last axis on."""
    rank = len(shape)
    before = {rank - 1 - number: pairs[2 * number] for number in range(len(pairs) // 2)}

    def element(kernel: Kernel, index: Index) -> Any:
        axes, inside = [], []
        for number in range(rank):
            position = index.axis(number)
            if number in before:
                extent = kernel.size(x.shape[number])
                position = position - before[number]
                inside += [position >= 0, position < extent]
                position = tirx.max(tirx.min(position, extent - 1), tirx.const(0, "int64"))
            axes.append(position)
        value = element_at(kernel, x, axes)
        return tirx.Select(tirx.all(*inside), value, constant(fill, x.dtype)) if inside else value

    return Lazy(shape, x.dtype, (x,), element)


def _bordered(lowering: Lowering, node: Node, argument: Any, pairs: list[int], mode: str) -> Lazy:
    """Elements of the tensor itself around it."""
    x, choose = lowering.view(argument), _BORDERS[mode]
    rank = len(x.shape)
    before = {rank - 1 - number: pairs[2 * number] for number in range(len(pairs) // 2)}

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(rank)]
        for number, count in before.items():
            axes[number] = choose(axes[number] - count, kernel.size(x.shape[number]))
        return element_at(kernel, x, axes)

    return Lazy(shape_of(node.meta["val"]), x.dtype, (x,), element)


def _nearest(position: Any, size: Any) -> Any:
    return tirx.max(tirx.min(position, size - 1), tirx.const(0, "int64"))


def _reflected(position: Any, size: Any) -> Any:
    """Without the border itself; PyTorch has no reflection of a reflection."""
    last = size - 1
    return _nearest(last - tirx.abs(last - tirx.abs(position)), size)


_BORDERS: dict[str, Callable[[Any, Any], Any]] = {
    "reflect": _reflected,
    "replicate": _nearest,
    "circular": tirx.floormod,
}


def _in_mode(mode: str) -> Callable[[Lowering, Node], Lazy]:
    def lower(lowering: Lowering, node: Node) -> Lazy:
        x, pairs = arguments(node).values()
        return _bordered(lowering, node, x, [int(p) for p in pairs], mode)

    return lower


TABLE: dict[Any, Callable[..., Any]] = {
    aten.constant_pad_nd.default: _pad,
    aten.pad.default: _pad,
    **{getattr(aten, f"reflection_pad{n}d").default: _in_mode("reflect") for n in (1, 2, 3)},
    **{getattr(aten, f"replication_pad{n}d").default: _in_mode("replicate") for n in (1, 2, 3)},
}
