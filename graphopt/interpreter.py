"""Running a program node by node, with the branches of `torch.cond` that its values take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch.fx import GraphModule, Interpreter, Node


@dataclass(frozen=True)
class Branch:
    """A sub-graph and what stands before its nodes' names; keeps torch's interpreter from taking it for a value."""

    path: str
    module: GraphModule = field(repr=False)


def _nothing(name: str, value: Any) -> None:
    return None


class ProgramInterpreter(Interpreter):
    """Runs one graph and the branches that it takes, freeing each value after its last use.

    `see` is called with the name of every node ("true_graph_0.linear" in a branch) and its value, `take` with the name
    of every `torch.cond` and the side it goes to. A subclass says how a node is computed.
    """

    def __init__(
        self,
        module: GraphModule,
        path: str = "",
        see: Callable[[str, Any], None] = _nothing,
        take: Callable[[str, bool], None] = _nothing,
    ) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.extra_traceback = False  # errors keep their one sentence
        self.path = path
        self.see = see
        self.take = take

    def compute(self, node: Node) -> Any:
        """The value of any node but a `torch.cond`."""
        return super().run_node(node)

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return Branch(f"{self.path}{target}.", value) if isinstance(value, GraphModule) else value

    def run_node(self, n: Node) -> Any:
        value = self._branch(n) if n.target is torch.ops.higher_order.cond else self.compute(n)
        self.see(f"{self.path}{n.name}", value)
        return value

    def _branch(self, node: Node) -> Any:
        (predicate, when_true, when_false, operands), _ = self.fetch_args_kwargs_from_env(node)
        side = bool(predicate)
        self.take(f"{self.path}{node.name}", side)
        return self._inside(when_true if side else when_false).run(*operands)

    def _inside(self, branch: Branch) -> Self:
        return type(self)(branch.module, branch.path, self.see, self.take)
