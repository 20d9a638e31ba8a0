"""Sizes that the caller asks to be dynamic: reading the request, choosing examples for it, checking the result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo

from graphopt.capture import source_line
from graphopt.capture.expressions import expression_text, size_range
from graphopt.errors import CaptureError, FeedError, UnknownNameError
from graphopt.program import SizeRange, evaluate_size

_LARGEST = 2**62  # torch takes bounds from here on for no bound


@dataclass(frozen=True)
class Axis:
    """One axis of one input and the size asked for: a name, or an expression over names such as "past + 1"."""

    input: str
    axis: int
    size: str

    def __str__(self) -> str:
        return f"axis {self.axis} of input {self.input!r}"


@dataclass(frozen=True)
class Request:
    """Every dynamic axis, and for each size name the bounds that the caller insists on (None: whatever works)."""

    axes: tuple[Axis, ...] = ()
    low: Mapping[str, int | None] = field(default_factory=dict)
    high: Mapping[str, int | None] = field(default_factory=dict)

    def names(self) -> list[str]:
        return list(dict.fromkeys(axis.size for axis in self.axes if axis.size.isidentifier()))

    def of(self, name: str) -> Axis:
        """The first axis with this size."""
        return next(axis for axis in self.axes if axis.size == name)


def read_request(dynamic_shapes: Mapping[str, Any] | None, inputs: Mapping[str, torch.Tensor]) -> Request:
    """Read {input: {axis: Dim | str}}; a list or tuple with one entry an axis does too. Raises CaptureError."""
    axes: list[Axis] = []
    low: dict[str, int | None] = {}
    high: dict[str, int | None] = {}
    if dynamic_shapes is not None and not isinstance(dynamic_shapes, Mapping):
        raise CaptureError('dynamic_shapes must be a dict such as {"x": {0: "batch"}}')
    for name, wanted in (dynamic_shapes or {}).items():
        if name not in inputs:
            raise UnknownNameError("input", name, inputs)
        for axis, size in _entries(name, wanted):
            if not isinstance(axis, int) or not -inputs[name].dim() <= axis < inputs[name].dim():
                raise CaptureError(f"dynamic_shapes: input {name!r} has {inputs[name].dim()} axes, so no axis {axis!r}")
            text, least, most = _read_size(name, axis, size)
            axes.append(Axis(name, axis % inputs[name].dim(), text))
            for bounds, value in ((low, least), (high, most)):
                if bounds.get(text) is None or value is None:
                    bounds[text] = bounds.get(text) if value is None else value
                elif bounds[text] != value:
                    raise CaptureError(f"dynamic_shapes: size {text!r} is given different bounds; use one Dim for it")
    return Request(tuple(axes), low, high)


def _entries(name: str, wanted: Any) -> Iterator[tuple[Any, Any]]:
    if wanted is None:
        return
    if isinstance(wanted, Mapping):
        entries = list(wanted.items())
    elif isinstance(wanted, Sequence) and not isinstance(wanted, str):
        entries = list(enumerate(wanted))
    else:
        raise CaptureError(f'dynamic_shapes: {name!r} must map axes to sizes, such as {{0: "batch"}}')
    yield from ((axis, size) for axis, size in entries if size is not None)


def _read_size(name: str, axis: int, size: Any) -> tuple[str, int | None, int | None]:
    if isinstance(size, str):
        try:
            evaluate_size(size, _AnySize())
        except (FeedError, SyntaxError) as error:
            raise CaptureError(
                f"dynamic_shapes: {size!r} is neither a name nor an expression such as '2*seq + 1'"
            ) from error
        return size, None, None
    if type(size) is Dim:
        most = None if size.max in (int_oo, sympy.oo) else int(size.max)
        _check_dim(size.__name__, int(size.min), most)
        return size.__name__, int(size.min) or None, most
    raise CaptureError(
        f'dynamic_shapes: axis {axis} of {name!r} must be a name such as "batch" or a torch.export.Dim with a name '
        f"and bounds, got {size!r}"
    )


def _check_dim(name: str, low: int, high: int | None) -> None:
    if low < 0 or low >= _LARGEST or (high is not None and high >= _LARGEST):
        raise CaptureError(f"dynamic_shapes: the bounds of size {name!r} must be from 0 to 2**62 - 1")
    if high is not None and low > high:
        raise CaptureError(f"dynamic_shapes: size {name!r} has min={low} over max={high}; swap them")


class _AnySize(dict[str, int]):
    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 7


def example_sizes(request: Request, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The size that the examples have for each name; raises CaptureError where two axes of one name differ."""
    sizes: dict[str, int] = {}
    for axis in request.axes:
        size = inputs[axis.input].shape[axis.axis]
        if axis.size.isidentifier() and sizes.setdefault(axis.size, size) != size:
            first = request.of(axis.size)
            raise CaptureError(
                f"{first} and {axis} are both called {axis.size!r} but the examples have {sizes[axis.size]} and {size}"
                "; give the axes different names or use examples of equal size"
            )
    for axis in request.axes:
        if not axis.size.isidentifier():
            expected = evaluate_size(axis.size, sizes)
            actual = inputs[axis.input].shape[axis.axis]
            if expected != actual:
                raise CaptureError(f"{axis} should be {axis.size} = {expected}, but the example has {actual}")
    for name, size in sizes.items():
        low, high = request.low.get(name), request.high.get(name)
        if (low is not None and size < low) or (high is not None and size > high):
            allowed = f"{1 if low is None else low} {'and up' if high is None else f'to {high}'}"
            raise CaptureError(
                f"{request.of(name)} is {size} in the example, but its Dim {name!r} allows {allowed}; widen the bounds "
                "or give another example"
            )
    return sizes


def distinct_sizes(request: Request, sizes: Mapping[str, int], fixed: set[int]) -> Iterator[dict[str, int]]:
    """Sizes to export with, best first: no 1 and no two alike, since torch takes equal sizes for the same size.

    Primes show most; multiples of the example keep divisibility that a model may need; `fixed` are sizes to avoid.
    """
    tried: list[dict[str, int]] = []
    for steps in ("prime", "multiple"):
        chosen: dict[str, int] = {}
        for name, size in sizes.items():
            if size >= 2 and size not in chosen.values():
                chosen[name] = size
                continue
            high = request.high.get(name)
            taken = {*sizes.values(), *chosen.values()}
            options = _primes_from(max(size, 2)) if steps == "prime" else range(2 * size, 66 * size + 1, max(size, 1))
            allowed = [n for n in options if n not in taken and (high is None or n <= high)]
            smaller = [] if high is None else [n for n in range(high, 1, -1) if n not in taken]
            chosen[name] = next(iter([n for n in allowed if n not in fixed] or allowed or smaller), max(size, 2))
        if chosen not in tried:
            tried.append(chosen)
            yield chosen


def _primes_from(start: int) -> list[int]:
    return [n for n in range(start, start + 200) if n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))]


def resize(value: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Repeat or drop entries along an axis, so every value stays one that the example has."""
    if value.shape[axis] == size:
        return value
    if value.shape[axis] == 0:
        shape = list(value.shape)
        shape[axis] = size
        return value.new_zeros(shape)
    return value.index_select(axis, torch.arange(size) % value.shape[axis])


def name_axes(
    request: Request, values: Mapping[str, torch.Tensor], environment: ShapeEnv | None
) -> tuple[dict[str, str], dict[str, SizeRange]]:
    """Match each axis asked for with what the traced inputs have: (symbol -> name, name -> bounds).

    `values` are the fake inputs by name. Raises CaptureError where a size is fixed, tied to another, or limited.
    """
    free: dict[str, sympy.Expr] = {}
    bound: dict[Axis, sympy.Expr] = {}
    for axis in request.axes:
        size = values[axis.input].shape[axis.axis]
        if environment is None or isinstance(size, int) or size.node.expr.is_Integer:
            raise CaptureError(_fixed(axis, int(size), environment))
        if axis.size.isidentifier() and size.node.expr.is_Symbol:
            _name_symbol(request, axis, size.node.expr, free, environment)
        else:
            bound[axis] = size.node.expr
    if environment is None:
        return {}, {}
    free = {name: environment.replace(expression) for name, expression in free.items()}
    symbols = {str(expression): name for name, expression in free.items()}
    for axis, expression in bound.items():
        _check_bound(axis, expression, symbols, environment)
    sizes = {name: _bounds(request, name, expression, environment) for name, expression in free.items()}
    _check_guards(symbols, environment)
    return symbols, sizes


def _name_symbol(
    request: Request, axis: Axis, expression: sympy.Expr, free: dict[str, sympy.Expr], environment: ShapeEnv
) -> None:
    for other, taken in free.items():
        if other != axis.size and taken == expression:
            raise CaptureError(
                f"sizes {other!r} ({request.of(other)}) and {axis.size!r} ({axis}) must be equal in this model"
                f"{_where_of([expression], environment)}; give them one name"
            )
    first = free.setdefault(axis.size, expression)
    if first != expression:
        _make_equal(first, expression, environment)


def _check_bound(axis: Axis, expression: sympy.Expr, symbols: Mapping[str, str], environment: ShapeEnv) -> None:
    """A size that follows from others: right where the caller wrote that expression, wrong where a name."""
    text = expression_text(expression, symbols)
    if axis.size.isidentifier():
        where = _where_of(expression.free_symbols, environment)
        raise CaptureError(
            f"{axis} was asked to be a size of its own ({axis.size!r}), but in this model it must be {text}{where}; "
            f"write {str(text)!r} for it"
        )
    if not _same(text, axis.size, list(symbols.values())):
        raise CaptureError(f"{axis} is {text} in this model, not {axis.size}; write {str(text)!r} for it")


def _make_equal(first: sympy.Expr, second: sympy.Expr, environment: ShapeEnv) -> None:
    """Let two symbols that the model relates nowhere be one, as torch.export does for two axes of one Dim."""
    frozen, environment.frozen = environment.frozen, False
    try:
        environment.evaluate_expr(sympy.Eq(first, second))
    finally:
        environment.frozen = frozen


def _same(text: int | str, wanted: str, names: Sequence[str]) -> bool:
    tries = [{name: base + step * index for index, name in enumerate(names)} for base, step in ((3, 2), (11, 5))]
    return all(evaluate_size(text, sizes) == evaluate_size(wanted, sizes) for sizes in tries)


def _fixed(axis: Axis, size: int, environment: ShapeEnv | None) -> str:
    where = ""
    if environment is not None:
        fixed = [s for s, value in environment.replacements.items() if value == size]
        where = _where_of(fixed, environment, f"{axis.input}")
    return (
        f"{axis} was asked to be dynamic ({axis.size!r}), but the model fixed it to {size}{where}; make that code work "
        "for any size, or leave the axis out of dynamic_shapes"
    )


def _where_of(symbols: Any, environment: ShapeEnv, source: str | None = None) -> str:
    """ " at file:line: `text`" of the code that tied these symbols down; empty when it is not known."""
    candidates = [s for s in symbols if source is None or _comes_from(s, source, environment)] or list(symbols)
    for symbol in candidates:
        location = environment.replacements_slocs.get(symbol)
        if location is not None and location.maybe_user_loc:
            return f" at {location.maybe_user_loc}"
    for guard in environment.guards:
        if guard.expr.free_symbols & set(candidates) and guard.sloc.maybe_user_loc:
            return f" at {guard.sloc.maybe_user_loc}"
    return ""


def _comes_from(symbol: sympy.Symbol, name: str, environment: ShapeEnv) -> bool:
    return any(f"['{name}']" in source.name for source in environment.var_to_sources.get(symbol, ()))


def _bounds(request: Request, name: str, symbol: sympy.Expr, environment: ShapeEnv) -> SizeRange:
    found = size_range(environment, symbol)
    low, high = request.low.get(name), request.high.get(name)
    where = _where_of([symbol], environment)
    if low is not None and found.low > low:
        raise CaptureError(f"size {name!r} may be {low} by its Dim, but the model needs at least {found.low}{where}")
    if high is not None and found.high is not None and found.high < high:
        raise CaptureError(
            f"size {name!r} may be {high} by its Dim, but the model takes at most {found.high}{where}; lower its max"
        )
    return SizeRange(max(found.low, low or 1), found.high if high is None else high)


def _check_guards(symbols: Mapping[str, str], environment: ShapeEnv) -> None:
    for guard in environment.guards:
        if not {str(symbol) for symbol in guard.expr.free_symbols} & set(symbols) or not _limits(guard, environment):
            continue
        text = guard.expr.xreplace({s: sympy.Symbol(symbols.get(str(s), str(s))) for s in guard.expr.free_symbols})
        where = f" at {guard.sloc.maybe_user_loc}" if guard.sloc.maybe_user_loc else ""
        raise CaptureError(
            f"the model works only where {_guard_text(text)}{where}; make that code work for any size, or leave the "
            "axis out of dynamic_shapes"
        )


def _guard_text(guard: Any) -> str:
    if isinstance(guard, sympy.Eq) and guard.rhs == 0 and type(guard.lhs).__name__ == "Mod":
        return f"{guard.lhs.args[0]} is a multiple of {guard.lhs.args[1]}"
    if isinstance(guard, sympy.Rel):
        return f"{guard.lhs} {guard.rel_op} {guard.rhs}"
    return str(guard)


def _limits(guard: Any, environment: ShapeEnv) -> bool:
    """Whether a guard excludes sizes that the bounds allow.

    Inequalities that torch itself asks about (whether a view is contiguous, say) choose between ways of computing the
    same values, so only those that the model's own code asks about count.
    """
    expression = environment.replace(guard.expr)
    if not isinstance(expression, sympy.Eq) and guard.sloc.framework_loc != source_line.DIRECT:
        return False
    symbols = sorted(expression.free_symbols, key=str)
    choices = [_samples(expression, environment.var_to_range[symbol]) for symbol in symbols]
    return any(
        expression.xreplace(dict(zip(symbols, values, strict=True))) == sympy.false
        for values in itertools.islice(itertools.product(*choices), 4096)
    )


def _samples(expression: sympy.Expr, bounds: Any) -> list[sympy.Integer]:
    """Sizes within bounds that are likely to make a condition false: small ones, and those near its constants."""
    near = {int(number) + step for number in expression.atoms(sympy.Integer) for step in (-1, 0, 1)}
    tried = sorted({*range(2, 14), 97, *near})
    return [sympy.Integer(size) for size in tried if bounds.lower <= size <= bounds.upper]
