"""How near a pattern came to a place where it does not match: the most calls found, and the first difference.

Unlike matching, this follows one reading of the graph: at a commutative operator the order that finds more calls, at
a further output the user that does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload
from torch.fx import Node

from graphopt.matcher import (
    Pattern,
    arguments,
    commutes,
    operator_name,
    parameter_names,
    same_literal,
    users_like,
)

KINDS = {"placeholder": "an input", "get_attr": "a constant"}


@dataclass(frozen=True)
class _Reading:
    """What was found so far: pattern nodes and what they stand for, the calls among them, the first difference."""

    found: dict[Node, Any]
    matched: int = 0
    reason: str | None = None

    def differs(self, reason: str) -> _Reading:
        return _Reading(self.found, self.matched, self.reason or reason)


def nearest_miss(pattern: Pattern, anchor: Node) -> tuple[str, int, int]:
    """(first difference, calls matched, calls in the pattern) at a node with the operator of the pattern's anchor."""
    reading = _read(pattern.outputs[0], anchor, _Reading({}), "")
    for output in pattern.outputs[1:]:
        reading = _read_output(output, reading)
    total = sum(node.op == "call_function" for node in pattern.graph.nodes)
    return reading.reason or "no choice of operands fits all parts of the pattern", reading.matched, total


def _read(pattern: Any, value: Any, reading: _Reading, place: str) -> _Reading:
    if not isinstance(pattern, Node):
        return _read_literal(pattern, value, reading, place)
    if pattern in reading.found:
        same = same_literal(reading.found[pattern], value)
        first, second = describe(reading.found[pattern]), describe(value)
        return reading if same else reading.differs(f"{pattern.name} is {first} in one place and {second} in another")
    found = {**reading.found, pattern: value}
    if pattern.op == "placeholder":
        return _Reading(found, reading.matched, reading.reason)
    if not isinstance(value, Node) or value.target != pattern.target:
        return reading.differs(f"{place}{describe(value)} where the pattern has {operator_name(pattern.target)}")
    reading = _Reading(found, reading.matched + 1, reading.reason)
    wanted, given = arguments(pattern), arguments(value)
    readings = [_read_all(pattern, wanted, given, reading)]
    if commutes(value):
        readings.append(_read_all(pattern, wanted, (given[1], given[0], *given[2:]), reading))
    return max(readings, key=_closeness)


def _read_all(call: Node, wanted: Sequence[Any], given: Sequence[Any], reading: _Reading) -> _Reading:
    if len(wanted) != len(given):
        return reading.differs(
            f"{operator_name(call.target)} has {len(given)} arguments where the pattern has {len(wanted)}"
        )
    names = tuple(f"argument {index}" for index in range(len(wanted)))
    if isinstance(call.target, OpOverload):
        names = parameter_names(call.target)
    for name, pattern, value in zip(names, wanted, given, strict=True):
        place = "input" if name == "self" else name
        reading = _read(pattern, value, reading, f"{place} of {reading.found[call].name} is ")
    return reading


def _read_literal(pattern: Any, value: Any, reading: _Reading, place: str) -> _Reading:
    sequences = isinstance(pattern, (list, tuple)) and isinstance(value, (list, tuple))
    if sequences and len(pattern) == len(value):
        for left, right in zip(pattern, value, strict=True):
            reading = _read(left, right, reading, place)
        return reading
    same = not sequences and same_literal(pattern, value)
    return reading if same else reading.differs(f"{place}{describe(value)} where the pattern has {describe(pattern)}")


def _read_output(output: Node, reading: _Reading) -> _Reading:
    """A further output of the pattern: the user of a shared value with which most is found."""
    if output in reading.found:
        return reading
    readings = [_read(output, user, reading, "") for user in _users(output, reading)]
    if readings:
        return max(readings, key=_closeness)
    sources = [reading.found[node].name for node in output.all_input_nodes if isinstance(reading.found.get(node), Node)]
    return reading.differs(
        f"nothing reads {' and '.join(sources) or 'the shared value'} with {operator_name(output.target)}"
    )


def _users(output: Node, reading: _Reading) -> Iterator[Node]:
    for source in output.all_input_nodes:
        value = reading.found.get(source)
        if isinstance(value, Node):
            yield from users_like(output, value)


def _closeness(reading: _Reading) -> tuple[int, bool]:
    return reading.matched, reading.reason is None


def describe(value: Any) -> str:
    """A node with what it is, "relu_1 (aten.relu.default)" or "x (an input)"; anything else as it is written."""
    if isinstance(value, Node):
        return f"{value.name} ({KINDS.get(value.op) or operator_name(value.target)})"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(describe, value)) + "]"
    return repr(value)
