"""What nodes say of the sizes that a file leaves open: that one has a number, equals another, or has a bound.

A fake kernel notes every such condition as a guard; each is held against the node that brought it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphopt.capture.expressions import expression_text, size_range
from graphopt.capture.onnx.binding import ReadAgain
from graphopt.capture.onnx.sizes import Symbols
from graphopt.capture.onnx.values import SYMBOLIC, Known, Tensor, Value
from graphopt.errors import CaptureError

Fixed = dict[sympy.Symbol, int]

_BROADCASTING = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Mod", "Pow", "Min", "Max", "Mean", "Sum", "Where", "PRelu", "Expand"),
        *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor"),
    )
)


class FixedSize(CaptureError):
    """A node cannot be imported while sizes are open that numbers in the file fix; `again` says which."""

    def __init__(self, text: str, again: ReadAgain) -> None:
        super().__init__(text)
        self.again = again


class Ledger:
    """The conditions on sizes of one reading of a graph, by node; `given` are the sizes of the examples."""

    def __init__(self, symbols: Symbols, given: Mapping[str, int]) -> None:
        self.symbols = symbols
        self._symbols = {name: size.node._expr for name, size in symbols.values.items()}
        self._names = symbols.names
        self._given = {symbol: given[name] for name, symbol in self._symbols.items() if name in given}
        environment = symbols.mode.shape_env
        assert environment is not None
        self._environment: ShapeEnv = environment
        self._equal: dict[sympy.Symbol, str] = {}
        self._bounds: dict[tuple[sympy.Symbol, str], tuple[int, str]] = {}

    def __len__(self) -> int:
        """The number of guards there are."""
        return len(self._environment.guards)

    def record(self, label: str, operator: str, inputs: Sequence[Value], before: int) -> None:
        """Take over what the node brought, which are the guards after the first `before`.

        Raises ReadAgain where a number in the file fixes sizes, CaptureError where anything else does.
        """
        guarded = {symbol for guard in self._environment.guards[before:] for symbol in guard.expr.free_symbols}
        fixed = self._fixed_by_file(operator, inputs, works=True)
        if guarded.isdisjoint(fixed) and guarded.isdisjoint(map(self._root, fixed)):
            fixed = {}
        for symbol, value in self._environment.replacements.items():
            if value.is_number and value in fixed.values():
                fixed[symbol] = int(value)  # one that was found to be equal
            elif value.is_number:
                raise CaptureError(
                    f"ONNX node {label} only works where the dynamic size {self._names.get(str(symbol), symbol)!r} is "
                    f"{value}; give that axis the number {value} in the file"
                )
            else:
                self._equal.setdefault(symbol, label)
        if fixed:
            raise self._again(fixed, label)
        self._record_bounds(label)

    def failed(self, label: str, operator: str, inputs: Sequence[Value], text: str, cause: Exception) -> CaptureError:
        """The error of a node that cannot be imported."""
        if isinstance(cause, FixedSize):  # of a node within this one
            return FixedSize(text, cause.again)
        fixed = self._fixed_by_file(operator, inputs, works=False)
        return FixedSize(text, self._again(fixed, label)) if fixed else CaptureError(text)

    def equal_sizes(self) -> dict[str, list[str]]:
        """A sentence for all sizes that nodes make one, with the names of these sizes."""
        groups: dict[Any, list[sympy.Symbol]] = {}
        for symbol in self._equal:
            if str(symbol) in self._names:
                groups.setdefault(self._environment.replace(symbol), []).append(symbol)
        names = {
            result: [self._names[str(symbol)] for symbol in sorted(result.free_symbols, key=str) + members]
            for result, members in groups.items()
        }
        return {self._equal_text(result, members): names[result] for result, members in groups.items()}

    def bounds(self) -> list[str]:
        """A sentence for every size that a node limits."""
        return [
            f"size {self._names[str(symbol)]!r} is at {side} {value}: ONNX node {label} needs that"
            for (symbol, side), (value, label) in self._bounds.items()
            if symbol not in self._environment.replacements
        ]

    def _equal_text(self, result: Any, members: list[sympy.Symbol]) -> str:
        label = self._equal[members[0]]
        names = [repr(self._names[str(symbol)]) for symbol in members]
        if result.is_Symbol:
            names.insert(0, repr(self._names[str(result)]))
            listed = f"{', '.join(names[:-1])} and {names[-1]}"
            return f"the sizes {listed} are one: ONNX node {label} needs them equal; give them one name"
        text = expression_text(result, self._names)
        return f"size {names[0]} is {text}: ONNX node {label} needs that; name it {text!r} in dynamic_shapes"

    def _record_bounds(self, label: str) -> None:
        for symbol in self._environment.var_to_range:
            if str(symbol) not in self._names:
                continue
            found = size_range(self._environment, symbol)
            for side, value in (("least", found.low if found.low > 1 else None), ("most", found.high)):
                if value is not None and self._bounds.get((symbol, side), (None, ""))[0] != value:
                    self._bounds[symbol, side] = value, label

    def _again(self, fixed: Fixed, label: str) -> ReadAgain:
        """Sizes that are already known to be equal are fixed together."""
        roots = {self._root(symbol): value for symbol, value in fixed.items()}
        sizes = {}
        for name, symbol in self._symbols.items():
            value = fixed.get(symbol, roots.get(self._root(symbol)))
            if value is not None:
                sizes[name] = value
        return ReadAgain(sizes=sizes, why=f"ONNX node {label} has that number")

    def _root(self, symbol: Any) -> Any:
        """What stands for the symbol, without numbers."""
        found = self._environment.replacements.get(symbol)
        return symbol if found is None or found.is_number else self._root(found) if found.is_Symbol else symbol

    def _fixed_by_file(self, operator: str, inputs: Sequence[Value], works: bool) -> Fixed:
        """The open sizes that numbers of this node fix: a new shape, or a size that another must be equal to."""
        if operator == "Reshape" and len(inputs) == 2:
            value, target = inputs
            if isinstance(value, Tensor) and isinstance(target, Known):
                own, wanted = ([_raw(size) for size in sizes] for sizes in (value.shape, target.items()))
                return self._fixed_by_shape(own, wanted, works)
        if operator not in _BROADCASTING:
            return {}
        shapes = [_shape(operator, place, value) for place, value in enumerate(inputs)]
        fixed: Fixed = {}
        for left, right in combinations(shapes, 2):
            for pair in zip(reversed(left), reversed(right), strict=False):
                for own, other in (pair, pair[::-1]):
                    if not isinstance(own, int) and isinstance(other, int) and other > 1:
                        fixed |= {size: 1 if self._given.get(size) == 1 else n for size, n in _only(own, other).items()}
        return fixed

    def _fixed_by_shape(self, own: list[Any], target: list[Any], works: bool) -> Fixed:
        total = sympy.Mul(*own)
        if not total.free_symbols or any(size == 0 for size in own):
            return {}
        wanted = [own[axis] if size == 0 and axis < len(own) else size for axis, size in enumerate(target)]
        fixed = _leading(own, wanted)
        rest = total.subs(fixed)
        if -1 in wanted:
            place = wanted.index(-1)
            others = sympy.Mul(*(size for size in wanted if size != -1)).subs(fixed)
            stays = place < len(own) and 0 not in wanted and sympy.cancel(rest / (others * own[place])) == 1
            # Where it works, examples of other sizes show that the elements are regrouped.
            regrouped = works and any(self._given.get(size, new) != new for size, new in fixed.items())
            return fixed if stays and not regrouped else {}
        count = sympy.Mul(*wanted)
        if count.free_symbols:
            return fixed if rest == count.subs(fixed) else {}
        given = {symbol: self._given[symbol] for symbol in total.free_symbols if symbol in self._given}
        if total.subs(given) == count:
            return given
        return fixed if rest == count else _only(total, int(count))


def _leading(own: Sequence[Any], wanted: Sequence[Any]) -> Fixed:
    """Open sizes beside numbers of the new shape, as far as the axes before them stay what they are."""
    fixed: Fixed = {}
    for size, new in zip(own, wanted, strict=False):
        if new == -1 or size == new:
            continue
        fixes = getattr(size, "is_Symbol", False) and isinstance(new, int) and new > 0
        if not fixes or fixed.setdefault(size, new) != new:
            break
    return fixed


def _only(total: Any, count: int) -> Fixed:
    """The one open size of a product that makes it `count`."""
    if len(total.free_symbols) != 1:
        return {}
    (symbol,) = total.free_symbols
    factor = total.subs({symbol: 1})
    if total != factor * symbol or count % int(factor) or count <= 0:
        return {}
    return {symbol: count // int(factor)}


def _shape(operator: str, place: int, value: Value) -> list[Any]:
    """The sizes that a value brings to broadcasting; Expand has those of its result as a value."""
    if value is None:
        return []
    if operator == "Expand" and place == 1:
        return [_raw(item) for item in value.items()] if isinstance(value, Known) else []
    return [_raw(size) for size in value.shape]


def _raw(size: Any) -> Any:
    """A size as a number or an expression over the symbols that inputs have, whatever they were found to be."""
    if not isinstance(size, SYMBOLIC):
        return int(size)
    expression = size.node._expr
    return int(expression) if expression.is_Integer else expression
