"""A rewrite as two small programs, the old one and the new one, so that it can be checked on its own.

Both are recorded at the moment of the rewrite: calls in order, constants by value, everything else that they read by
the name of the node that it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from graphopt.program import get_attribute


@dataclass(frozen=True)
class Value:
    """Stands for the value of the node of this name, which is unique in the program ("true_graph_0.linear")."""

    name: str


@dataclass(frozen=True)
class Step:
    """One node: a call with `Value` in place of nodes, or with `target` None the constant in `args[0]`."""

    name: str
    target: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Instance:
    """One rewrite: each of `old_outputs` (names) is replaced by the one in `new_outputs`, a `Value` or a number."""

    id: str
    old: tuple[Step, ...]
    new: tuple[Step, ...]
    old_outputs: tuple[str, ...]
    new_outputs: tuple[Any, ...]

    def reads(self) -> set[str]:
        """The names of the values that come from outside; the new program may read what the old one makes."""
        return _read(self.old, ()) | _read(self.new, self.new_outputs)


def _read(steps: Sequence[Step], outputs: Sequence[Any]) -> set[str]:
    found: set[str] = set()
    for step in steps:
        _collect((step.args, dict(step.kwargs)), found)
    _collect(outputs, found)
    return found - {step.name for step in steps}


def record(
    module: GraphModule, nodes: Sequence[Node], results: Sequence[Any], name: Callable[[Node], str]
) -> tuple[tuple[Step, ...], tuple[Any, ...]]:
    """The steps that compute `nodes`, with the constants that they or `results` read, and `results` by name."""
    steps: dict[Node, Step] = {}

    def value(node: Node) -> Any:
        if node.op == "get_attr" and node not in steps:
            steps[node] = Step(name(node), None, (get_attribute(module, str(node.target)),), {})
        return Value(name(node))

    for node in nodes:
        if node.op == "get_attr":
            value(node)
        elif node.op == "call_function":
            assert callable(node.target)
            args, kwargs = map_arg((node.args, node.kwargs), value)
            steps[node] = Step(name(node), node.target, args, kwargs)
    named = tuple(value(item) if isinstance(item, Node) else item for item in results)
    return tuple(steps.values()), named


def _collect(value: Any, found: set[str]) -> None:
    if isinstance(value, Value):
        found.add(value.name)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found)
