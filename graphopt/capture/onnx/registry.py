"""The operators that can be imported: one function each, found by its ONNX name.

An operator function takes an `Operation` and the node's inputs and returns a value or a tuple of them. A shape function
does the same for inputs that are all known; it returns None where only tensors can express the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

OPERATORS: dict[str, Callable[..., Any]] = {}
SHAPE_OPERATORS: dict[str, Callable[..., Any]] = {}

F = TypeVar("F", bound=Callable[..., Any])


def operator(*names: str) -> Callable[[F], F]:
    """Register a function for ONNX operators: names of the standard domain, or with another domain in front."""
    return _register(OPERATORS, names)


def shape_operator(*names: str) -> Callable[[F], F]:
    """Register a function for operators on known values."""
    return _register(SHAPE_OPERATORS, names)


def _register(table: dict[str, Callable[..., Any]], names: tuple[str, ...]) -> Callable[[F], F]:
    def register(function: F) -> F:
        for name in names:
            if name in table:
                raise ValueError(f"{name} is registered twice")
            table[name] = function
        return function

    return register
