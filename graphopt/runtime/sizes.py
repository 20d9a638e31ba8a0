"""Sizes as the manifest writes them: an integer, a name, or an expression over names such as "2*seq + 1"."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from graphopt.errors import ArtifactError

Sizes = Mapping[str, int]
Evaluator = Callable[[Sizes], int]

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {
    "Max": max,
    "Min": min,
    "max": max,  # as capture writes them
    "min": min,
    "FloorDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "Mod": operator.mod,
    "PythonMod": operator.mod,
}
_LONGEST = 1000
_MOST_POWER = 8


@dataclass(frozen=True)
class Expression:
    """A size to be computed from others; `names` are those it needs."""

    text: str
    names: frozenset[str]
    evaluate: Evaluator

    def value(self, sizes: Sizes) -> int | None:
        """The size; None where it divides by zero."""
        try:
            return self.evaluate(sizes)
        except ZeroDivisionError:
            return None

    def solve(self, name: str, known: Sizes, value: int) -> int | None:
        """The size `name` that makes the expression equal `value`, if the expression is linear in it."""
        first, second = (self.value({**known, name: guess}) for guess in (1, 2))
        if first is None or second is None or first == second:
            return None
        answer = 1 + (value - first) // (second - first)
        return answer if self.value({**known, name: answer}) == value else None


@lru_cache(maxsize=1024)
def parse_size(text: str) -> Expression:
    """Read one expression: names, integers, + - * // % **, Max, Min, FloorDiv, CeilDiv, Mod; no more."""
    try:
        if len(text) > _LONGEST:
            raise ValueError("too long")
        body = ast.parse(text, mode="eval").body
        names: set[str] = set()
        evaluator = _build(body, names)
        return Expression(text, frozenset(names), evaluator)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise ArtifactError(f"size {text[:80]!r} cannot be read ({e}); compile the artifact again") from e


def _build(node: ast.expr, names: set[str]) -> Evaluator:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return lambda sizes: value
        case ast.Name(id=name):
            names.add(name)
            return lambda sizes: sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _build(operand, names)
            return lambda sizes: -inner(sizes)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _call(_OPERATORS[type(op)], [_build(left, names), _build(right, names)])
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as power)) if 0 <= power <= _MOST_POWER:
            if any(isinstance(part, ast.Pow) for part in ast.walk(left)):
                raise ValueError("a power of a power is not part of a size")
            base = _build(left, names)
            return lambda sizes: base(sizes) ** power
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS and len(args) > 1:
            return _call(_FUNCTIONS[name], [_build(item, names) for item in args])
    raise ValueError(f"{type(node).__name__} is not part of a size")


def _call(function: Callable[..., int], arguments: list[Evaluator]) -> Evaluator:
    return lambda sizes: function(*(argument(sizes) for argument in arguments))


def fits(shape: Iterable[int], expected: tuple[int | str, ...]) -> bool:
    """Whether the ranks agree and so does every size that is an integer."""
    shape = tuple(shape)
    return len(shape) == len(expected) and all(
        isinstance(size, str) or size == found for found, size in zip(shape, expected, strict=True)
    )
