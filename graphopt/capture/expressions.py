"""Symbolic sizes of torch (sympy expressions over "s43") as Python expressions over user names ("2*seq + 1")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo

from graphopt.errors import CaptureError
from graphopt.program import SizeRange


class _SizePrinter(sympy.printing.str.StrPrinter):  # type: ignore[misc]
    """Only what `graphopt.program.evaluate_size` reads."""

    def _divide(self, expression: Any, operator: str) -> str:
        left, right = (
            f"({self._print(argument)})" if argument.args else self._print(argument) for argument in expression.args
        )
        return f"({left}{operator}{right})"

    def _print_FloorDiv(self, expression: Any) -> str:
        return self._divide(expression, "//")

    _print_CleanDiv = _print_FloorDiv

    def _print_CeilDiv(self, expression: Any) -> str:
        left, right = (self._print(argument) for argument in expression.args)
        return f"(-(-({left})//({right})))"

    def _print_Mod(self, expression: Any) -> str:
        return self._divide(expression, "%")

    _print_PythonMod = _print_Mod

    def _print_Max(self, expression: Any) -> str:
        return f"max({', '.join(self._print(argument) for argument in expression.args)})"

    def _print_Min(self, expression: Any) -> str:
        return f"min({', '.join(self._print(argument) for argument in expression.args)})"

    def emptyPrinter(self, expression: Any) -> str:
        raise CaptureError(f"a size depends on others as {expression}, which graphopt cannot express")


def size_text(size: int | torch.SymInt, symbols: Mapping[str, str]) -> int | str:
    """A size as an integer or as an expression over user names; `symbols` maps ShapeEnv names to them."""
    if isinstance(size, int):
        return size
    return expression_text(size.node.expr, symbols)


def expression_text(expression: sympy.Expr, symbols: Mapping[str, str]) -> int | str:
    """Like `size_text`, for a sympy expression."""
    if expression.is_Integer:
        return int(expression)
    unknown = sorted(str(symbol) for symbol in expression.free_symbols if str(symbol) not in symbols)
    if unknown:
        raise CaptureError(
            f"size {expression} depends on the values of a tensor ({', '.join(unknown)}), which graphopt cannot "
            "express; make the model return a tensor of known size, for example padded with a mask"
        )
    named = {symbol: sympy.Symbol(symbols[str(symbol)], integer=True) for symbol in expression.free_symbols}
    return str(_SizePrinter().doprint(expression.xreplace(named)))


def size_range(environment: ShapeEnv, symbol: sympy.Symbol) -> SizeRange:
    """Bounds of a symbol; torch's own least size of 2 for traced sizes stands for 1."""
    bounds = environment.var_to_range[symbol]
    low = int(bounds.lower) if bounds.lower != -int_oo else 1
    high = None if bounds.upper in (int_oo, sympy.oo) or bounds.upper >= 2**62 else int(bounds.upper)
    return SizeRange(1 if low <= 2 else low, high)
