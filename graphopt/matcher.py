"""Patterns over ATen graphs: a plain Python function, traced once, found in a graph.

A parameter of the function is a variable: it stands for any node or literal, and for the same one wherever it is
repeated. Calls match by overload after arguments left out are filled in from the schema, so `linear(x, w)` in a
pattern also matches `linear(x, w, None)`, and a variable in an optional place is bound to None where the graph gives
nothing. Commutative operators match either way round. Two calls of a pattern never match one node: write a shared
sub-expression once and use its result twice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from graphopt.errors import UsageError

aten = torch.ops.aten

COMMUTATIVE: frozenset[Any] = frozenset(
    {
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.eq.Tensor,
        aten.ne.Tensor,
        aten.logical_and.default,
        aten.logical_or.default,
        aten.logical_xor.default,
        aten.bitwise_and.Tensor,
        aten.bitwise_or.Tensor,
        aten.bitwise_xor.Tensor,
        aten.__and__.Tensor,
        aten.__or__.Tensor,
        operator.add,
        operator.mul,
    }
)
CANDIDATES = 64  # users of a shared value tried for a further output: keeps matching linear in the graph

State = dict[Node, Any]


@dataclass(frozen=True)
class Pattern:
    """A traced pattern: its variables in order and its outputs, the first of which is the anchor."""

    variables: Mapping[str, Node]
    outputs: tuple[Node, ...]
    graph: Graph


@dataclass(frozen=True)
class Match:
    """Variables bound to nodes or literals; matched nodes apart from the outputs are `inner`."""

    bindings: Mapping[str, Any]
    outputs: tuple[Node, ...]
    inner: tuple[Node, ...]

    def escape(self) -> str | None:
        """A reason when a node that the rewrite would remove is read by anything outside the match."""
        matched = {*self.inner, *self.outputs}
        for node in self.inner:
            for user in node.users:
                if user not in matched:
                    return f"the inner value {node.name} is also used by {user.name}"
        return None


@cache
def trace_pattern(function: Callable[..., Any]) -> Pattern:
    """Trace a pattern; raises UsageError where it is a variable, or leaves one of its parameters unused."""
    graph = torch.fx.Tracer().trace(function)
    label = getattr(function, "__qualname__", repr(function))
    variables = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    (output,) = (node for node in graph.nodes if node.op == "output")
    result = output.args[0]
    outputs = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    for item in outputs:
        if not isinstance(item, Node) or item.op != "call_function":
            raise UsageError(f"pattern {label} must return calls of operators, got {item!r}; call an aten overload")
    for name, node in variables.items():
        if not node.users:
            raise UsageError(f"pattern {label} never uses its parameter {name!r}; remove it or use it")
    return Pattern(variables, outputs, graph)


@cache
def _parameters(target: OpOverload) -> tuple[tuple[str, Any], ...]:
    return tuple((argument.name, argument.default_value) for argument in target._schema.arguments)


def parameter_names(target: OpOverload) -> tuple[str, ...]:
    """The names of an overload's parameters, in the order of its schema."""
    return tuple(name for name, _ in _parameters(target))


def arguments(node: Node) -> tuple[Any, ...]:
    """All arguments of a call in the order of the schema, with defaults filled in."""
    if not isinstance(node.target, OpOverload):
        return (*node.args, *(value for _, value in sorted(node.kwargs.items())))
    given, named = node.args, node.kwargs
    return tuple(
        given[index] if index < len(given) else named.get(name, default)
        for index, (name, default) in enumerate(_parameters(node.target))
    )


def operator_name(target: Any) -> str:
    """The name of an operator, "aten.relu.default" or "operator.getitem", the same in every process."""
    if isinstance(target, (BuiltinFunctionType, FunctionType)):
        return f"{target.__module__.removeprefix('_')}.{target.__name__}"
    return str(target)


def argument(node: Node, name: str) -> Any:
    """One argument of an ATen call by its name in the schema, given or default."""
    if not isinstance(node.target, OpOverload):
        raise UsageError(f"{node.name} is no ATen call: its arguments have no names")
    return arguments(node)[parameter_names(node.target).index(name)]


def find_match(pattern: Pattern, anchor: Node) -> Match | None:
    """The first match whose first output is `anchor`, or None."""
    for state in _unify(pattern.outputs[0], anchor, {}):
        for full in _extend(pattern.outputs[1:], state):
            bindings = {name: full[node] for name, node in pattern.variables.items()}
            outputs = tuple(full[node] for node in pattern.outputs)
            calls = (value for node, value in full.items() if node.op == "call_function")
            inner = tuple(sorted(node for node in calls if node not in outputs))
            return Match(bindings, outputs, inner)
    return None


def same_literal(left: Any, right: Any) -> bool:
    """Equality that tells 1, 1.0 and True apart and takes lists and tuples as one."""
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same_literal, left, right))
    if isinstance(left, Node) or isinstance(right, Node):
        return left is right
    return type(left) is type(right) and bool(left == right)


def _unify(pattern: Any, value: Any, state: State) -> Iterator[State]:
    if isinstance(pattern, Node):
        if pattern in state:
            if same_literal(state[pattern], value):
                yield state
        elif pattern.op == "placeholder":
            yield {**state, pattern: value}
        elif isinstance(value, Node) and value.target == pattern.target and value.op == "call_function":
            yield from _unify_call(pattern, value, state)
    elif isinstance(pattern, (list, tuple)):
        if isinstance(value, (list, tuple)) and len(value) == len(pattern):
            yield from _unify_all(pattern, value, state)
    elif same_literal(pattern, value):
        yield state


def _unify_call(pattern: Node, value: Node, state: State) -> Iterator[State]:
    if any(known is value and node.op == "call_function" for node, known in state.items()):
        return
    wanted, given = arguments(pattern), arguments(value)
    if len(wanted) != len(given):
        return
    state = {**state, pattern: value}
    yield from _unify_all(wanted, given, state)
    if commutes(value):
        yield from _unify_all(wanted, (given[1], given[0], *given[2:]), state)


def _unify_all(patterns: Sequence[Any], values: Sequence[Any], state: State) -> Iterator[State]:
    if not patterns:
        yield state
        return
    for partial in _unify(patterns[0], values[0], state):
        yield from _unify_all(patterns[1:], values[1:], partial)


def commutes(node: Node) -> bool:
    """Whether the first two arguments may change places; `add` with a factor on its second may not."""
    return node.target in COMMUTATIVE and (node.target is not aten.add.Tensor or arguments(node)[2] == 1)


def _extend(outputs: Sequence[Node], state: State) -> Iterator[State]:
    if not outputs:
        yield state
    elif outputs[0] in state:
        yield from _extend(outputs[1:], state)
    else:
        for candidate in islice(_candidates(outputs[0], state), CANDIDATES):
            for partial in _unify(outputs[0], candidate, state):
                yield from _extend(outputs[1:], partial)


def _candidates(pattern: Node, state: State) -> Iterator[Node]:
    """Nodes that could be `pattern`: users of a value that the match already shares with it."""
    for source in pattern.all_input_nodes:
        if source in state:
            values: Sequence[Any] = (state[source],)
        else:
            values = tuple(islice(_candidates(source, state), CANDIDATES))
        found = [user for value in values if isinstance(value, Node) for user in users_like(pattern, value)]
        if found:
            yield from found
            return


def users_like(pattern: Node, value: Node) -> list[Node]:
    """The users of `value` with the operator of `pattern`, at most CANDIDATES of them."""
    return list(islice((user for user in value.users if user.target == pattern.target), CANDIDATES))
