"""Sizes: integers or sympy expressions over a program's symbols on the host, `PrimExpr` over variables in a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch.utils._sympy import functions as torch_sympy
from tvm import tirx

Size: TypeAlias = int | sympy.Expr
Shape: TypeAlias = tuple[Size, ...]


def size_of(value: Any) -> Size:
    """A Python int, or the expression behind a `SymInt`."""
    if isinstance(value, torch.SymInt):
        value = value.node.expr
    return int(value) if isinstance(value, int) or value.is_number else value


def shape_of(tensor: torch.Tensor) -> Shape:
    return tuple(size_of(d) for d in tensor.shape)


def product(shape: Iterable[Size]) -> Size:
    return math.prod(shape, start=1)


def contiguous_strides(shape: Sequence[Size]) -> Shape:
    """Strides in elements, row-major."""
    return tuple(product(shape[axis + 1 :]) for axis in range(len(shape)))


def symbols_in(shapes: Iterable[Iterable[Size]]) -> set[str]:
    """Names of all symbols used in any of the sizes."""
    return {
        symbol.name
        for shape in shapes
        for size in shape
        if isinstance(size, sympy.Expr)
        for symbol in size.free_symbols
    }


class Sizes:
    """Turns sizes into expressions over one set of variables: one instance a kernel, one for the whole Relax function."""

    def __init__(self, variables: dict[str, tirx.Var] | None = None) -> None:
        self.variables: dict[str, tirx.Var] = {} if variables is None else variables

    def variable(self, name: str) -> tirx.Var:
        return self.variables.setdefault(name, tirx.Var(name, "int64"))

    def expr(self, size: Size) -> tirx.PrimExpr:
        """int64 expression; raises KeyError on a sympy operation that sizes never have."""
        if isinstance(size, int):
            return tirx.const(size, "int64")
        if isinstance(size, sympy.Symbol):
            return self.variable(size.name)
        if size.is_Integer:
            return tirx.const(int(size), "int64")
        return _BUILD[size.func]([self.expr(argument) for argument in size.args], size)

    def shape(self, shape: Shape) -> list[tirx.PrimExpr]:
        return [self.expr(size) for size in shape]


def _fold(combine: Callable[[Any, Any], Any]) -> Callable[[list[Any], Any], Any]:
    def build(arguments: list[Any], _: Any) -> Any:
        result = arguments[0]
        for argument in arguments[1:]:
            result = combine(result, argument)
        return result

    return build


def _power(arguments: list[Any], size: Any) -> Any:
    result = arguments[0]
    for _ in range(int(size.args[1]) - 1):
        result = result * arguments[0]
    return result


# Sizes are never negative, so division that truncates is exact and needs no sign correction.
_BUILD: dict[Any, Callable[[list[Any], Any], Any]] = {
    sympy.Add: _fold(lambda a, b: a + b),
    sympy.Mul: _fold(lambda a, b: a * b),
    sympy.Pow: _power,
    sympy.Max: _fold(tirx.max),
    sympy.Min: _fold(tirx.min),
    torch_sympy.Max: _fold(tirx.max),
    torch_sympy.Min: _fold(tirx.min),
    torch_sympy.FloorDiv: _fold(tirx.floordiv),
    torch_sympy.CleanDiv: _fold(tirx.floordiv),
    torch_sympy.Mod: _fold(tirx.floormod),
    torch_sympy.PythonMod: _fold(tirx.floormod),
}
