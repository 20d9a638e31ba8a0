"""Operators that make a tensor from numbers: functions of the index, stored only where they are needed in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import convert, element_wise, read
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Index, Lazy

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten


def _filled(value: Any) -> Callable[[Lowering, Node], Lazy]:
    """`value` is a number, or the name of the argument that holds a number, a size or a tensor of rank 0."""

    def lower(lowering: Lowering, node: Node) -> Lazy:
        fill = arguments(node)[value] if isinstance(value, str) else value
        return element_wise(lowering, node, [fill], lambda number: number)

    return lower


def _arange(lowering: Lowering, node: Node) -> Lazy:
    """From `start` by `step`, computed in int64 or float64 and then converted."""
    given = arguments(node)
    start, step = (lowering.value(given.get(name, default)) for name, default in (("start", 0), ("step", 1)))
    meta = node.meta["val"]
    dtype = DTYPES[meta.dtype]
    compute = "float64" if isinstance(start, float) or isinstance(step, float) else "int64"

    def element(kernel: Kernel, index: Index) -> Any:
        first, distance = (read(kernel, number, index, compute) for number in (start, step))
        value = first + convert(index.axis(0), compute) * distance
        if dtype == "uint8" and compute == "int64":
            value = value & tirx.const(255, compute)  # TVM folds no negative number into an unsigned one
        return convert(value, dtype)

    sizes = tuple(number for number in (start, step) if isinstance(number, sympy.Expr))
    return Lazy(shape_of(meta), dtype, (), element, sizes=sizes)


def _linspace(lowering: Lowering, node: Node) -> Lazy:
    """Counted from the nearer end, as PyTorch does, so that both ends are exact."""
    given = arguments(node)
    start, end = float(given["start"]), float(given["end"])
    meta = node.meta["val"]
    count, dtype = int(meta.shape[0]), DTYPES[meta.dtype]
    step = (end - start) / max(count - 1, 1)

    def element(kernel: Kernel, index: Index) -> Any:
        position = index.axis(0)
        from_start = tirx.const(start, "float64") + position.astype("float64") * tirx.const(step, "float64")
        from_end = tirx.const(end, "float64") - (count - 1 - position).astype("float64") * tirx.const(step, "float64")
        return convert(tirx.Select(position < max(count // 2, 1), from_start, from_end), dtype)

    return Lazy(shape_of(meta), dtype, (), element)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.full.default: _filled("fill_value"),
    aten.full_like.default: _filled("fill_value"),
    aten.new_full.default: _filled("fill_value"),
    aten.fill.Scalar: _filled("value"),
    aten.fill.Tensor: _filled("value"),
    aten.scalar_tensor.default: _filled("s"),
    aten.zeros.default: _filled(0),
    aten.zeros_like.default: _filled(0),
    aten.new_zeros.default: _filled(0),
    aten.empty.memory_format: _filled(0),
    aten.empty_like.default: _filled(0),
    aten.empty_strided.default: _filled(0),
    aten.new_empty.default: _filled(0),
    aten.ones.default: _filled(1),
    aten.ones_like.default: _filled(1),
    aten.new_ones.default: _filled(1),
    aten.linspace.default: _linspace,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
}
