"""How many arithmetic operations a kernel does: counted on the expressions it is written from.

Sums, products, quotients, larger and smaller of two floats, and calls of functions count one each; a multiply-add
counts two. Selections, comparisons, casts and index arithmetic count nothing. What runs only to fill a tile is left
out, so the number is the same for every schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Kernel
from graphopt.backends.sizes import Shape, Size, product
from graphopt.backends.target import Target
from graphopt.backends.traffic import lazy_values
from graphopt.backends.values import Index, Lazy, Storage

_ARITHMETIC = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Max, tirx.Min)
_MOVES = frozenset({"tirx.reinterpret", "tirx.if_then_else"})


class _AnyElement:
    """A buffer of which every element is an unknown number."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def __getitem__(self, _: Any) -> Any:
        return tirx.Var("element", self.dtype)


class _Probe(Kernel):
    """A kernel in which operands are unknown numbers, so that an expression over them shows its own operations."""

    def load(self, value: Any, index: Index) -> Any:
        return tirx.Var("element", value.dtype)

    def flat(self, storage: Storage) -> Any:
        return _AnyElement(storage.dtype)


def count_operations(target: Target, write: Callable[[Kernel], Any]) -> int:
    """Operations on floats in the expression that `write` returns; what it binds is counted once."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("probe")
            T.evaluate(write(_Probe(target)))
        body = builder.get().body
    found = 0

    def note(expression: Any) -> None:
        nonlocal found
        name = getattr(getattr(expression, "op", None), "name", "")
        found += "float" in str(expression.ty.dtype) and name not in _MOVES

    tvm_ffi.structural_walk(body, ((*_ARITHMETIC, tvm.ir.Call), note))
    return found


def axes_of(shape: Shape) -> tuple[Any, ...]:
    """An unknown position in a tensor of this shape."""
    return tuple(tirx.Var(f"axis{number}", "int64") for number in range(len(shape)))


def operations_of(value: Lazy, target: Target) -> int:
    """Operations of one element, without those of its operands."""
    return count_operations(
        target, lambda kernel: value.element(kernel, Index(value.shape, kernel.sizes, axes=axes_of(value.shape)))
    )


def operations(values: Sequence[Any], target: Target) -> Size:
    """Operations of computing every element of `values` once, those of the lazy values they read included."""
    total: Size = 0
    for value in lazy_values(values):
        total = total + operations_of(value, target) * product(value.shape)
    return total
