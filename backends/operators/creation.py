"""Operators that make a tensor from numbers: functions of the index, never stored unless somebody needs them in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.element_wise import constant, convert
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Index, Lazy
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten


def _filled(lowering: Lowering, node: Node, value: Any) -> Lazy:
    meta = node.meta["val"]
    dtype = DTYPES[meta.dtype]

    def element(kernel: Kernel, index: Index) -> Any:
        return convert(kernel.size(value), dtype) if isinstance(value, sympy.Expr) else constant(value, dtype)

    return Lazy(shape_of(meta), dtype, (), element, flat=not isinstance(value, sympy.Expr))


def _fill(position: int) -> Callable[[Lowering, Node], Lazy]:
    """The fill value is argument `position`."""

    def lower(lowering: Lowering, node: Node) -> Lazy:
        value = lowering.value(node.args[position])
        if not isinstance(value, (int, float, bool, sympy.Expr)):
            raise CompileError(f"{node.name} fills with a tensor; only numbers and sizes have a lowering")
        return _filled(lowering, node, value)

    return lower


def _constant(value: int) -> Callable[[Lowering, Node], Lazy]:
    return lambda lowering, node: _filled(lowering, node, value)


def _arange(lowering: Lowering, node: Node) -> Lazy:
    """arange(end), arange(start, end) or arange(start, end, step)."""
    arguments = [lowering.value(argument) for argument in node.args]
    start, step = (0, 1) if len(arguments) == 1 else (arguments[0], arguments[2] if len(arguments) > 2 else 1)
    meta = node.meta["val"]
    dtype = DTYPES[meta.dtype]

    def element(kernel: Kernel, index: Index) -> Any:
        if isinstance(start, float) or isinstance(step, float):
            position = index.axis(0).astype("float64")
            return (tirx.const(float(start), "float64") + position * tirx.const(float(step), "float64")).astype(dtype)
        return convert(kernel.size(start) + index.axis(0) * kernel.size(step), dtype)

    return Lazy(shape_of(meta), dtype, (), element)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.full.default: _fill(1),
    aten.full_like.default: _fill(1),
    aten.new_full.default: _fill(2),
    aten.scalar_tensor.default: _fill(0),
    aten.zeros.default: _constant(0),
    aten.zeros_like.default: _constant(0),
    aten.new_zeros.default: _constant(0),
    aten.empty.memory_format: _constant(0),
    aten.ones.default: _constant(1),
    aten.ones_like.default: _constant(1),
    aten.new_ones.default: _constant(1),
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
}
