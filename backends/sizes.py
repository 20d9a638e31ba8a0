"""Sizes: integers or sympy expressions over a program's symbols on the host, `PrimExpr` over variables in a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch.utils._sympy import functions as torch_sympy
from tvm import tirx

from graphopt.errors import CompileError

Size: TypeAlias = int | sympy.Expr
Shape: TypeAlias = tuple[Size, ...]


def size_of(value: Any) -> Size:
    """A Python number, or the expression behind a `SymInt` or `SymFloat`."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        value = value.node.expr
    if isinstance(value, sympy.Basic) and value.is_number:
        return int(value) if value.is_integer else float(value)
    return value


def shape_of(tensor: torch.Tensor) -> Shape:
    return tuple(size_of(d) for d in tensor.shape)


def product(shape: Iterable[Size]) -> Size:
    return math.prod(shape, start=1)


def contiguous_strides(shape: Sequence[Size]) -> Shape:
    """Strides in elements, row-major."""
    return tuple(product(shape[axis + 1 :]) for axis in range(len(shape)))


def least(size: Size) -> int:
    """What a size is at least, where no symbol and no size is below one: 2 for 2*s - 2, 4 for 2*s + 2."""
    if isinstance(size, int):
        return size
    content, rest = size.as_content_primitive()
    terms = sympy.Add.make_args(sympy.expand(rest))
    growing = all(term.is_polynomial() and term.as_coeff_Mul()[0] > 0 for term in terms)
    value = content * (rest.subs(dict.fromkeys(rest.free_symbols, 1)) if growing else 1)
    return max(1, int(value))


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
    """Turns sizes into expressions over one set of variables: one instance a kernel, one for the Relax function."""

    def __init__(self, variables: dict[str, tirx.Var] | None = None) -> None:
        self.variables: dict[str, tirx.Var] = {} if variables is None else variables

    def variable(self, name: str) -> tirx.Var:
        return self.variables.setdefault(name, tirx.Var(name, "int64"))

    def expr(self, size: Size) -> tirx.PrimExpr:
        """int64 expression, float64 where the size was turned into a float. Raises CompileError."""
        if isinstance(size, int):
            return tirx.const(size, "int64")
        if isinstance(size, sympy.Symbol):
            return self.variable(size.name)
        if size.is_Integer:
            return tirx.const(int(size), "int64")
        if size.is_number:
            return tirx.const(float(size), "float64")
        if size.func not in _BUILD:
            raise CompileError(f"size {size} has no lowering; compute it from sums, products and divisions")
        arguments = [self.expr(argument) for argument in size.args]
        if any(str(argument.ty.dtype) == "float64" for argument in arguments):
            arguments = [argument.astype("float64") for argument in arguments]
        return _BUILD[size.func](arguments, size)

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
    base, exponent = arguments[0], size.args[1]
    if not exponent.is_Integer or exponent < 1:
        return tirx.power(base.astype("float64"), tirx.const(float(exponent), "float64"))
    result = base
    for _ in range(int(exponent) - 1):
        result = result * base
    return result


def _quotient(arguments: list[Any], _: Any) -> Any:
    return arguments[0].astype("float64") / arguments[1].astype("float64")


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
    torch_sympy.PowByNatural: _power,
    torch_sympy.FloatPow: _power,
    torch_sympy.ToFloat: lambda arguments, _: arguments[0].astype("float64"),
    torch_sympy.IntTrueDiv: _quotient,
    torch_sympy.FloatTrueDiv: _quotient,
    torch_sympy.OpaqueUnaryFn_sqrt: lambda arguments, _: tirx.sqrt(arguments[0].astype("float64")),
}
