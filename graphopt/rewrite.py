"""Passes made of local rules: a pattern, a check that may refuse with a reason, and what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch.fx import Node
from torch.fx.node import map_arg

from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Builder, Edit, GraphEditor
from graphopt.errors import PassError
from graphopt.matcher import Match, Pattern, find_match, trace_pattern
from graphopt.near_miss import nearest_miss
from graphopt.program import Program


@dataclass(frozen=True)
class Rule:
    """One local rewrite; its fields are filled from the options of the same names of the pass it belongs to.

    The three functions share their parameter names. `pattern` is static and only calls ATen overloads; it may return
    a tuple. `check` gets nodes (with their fake value in `meta["val"]`) or literals. `rewrite` gets proxies of the same
    and returns as many values as the pattern; a real tensor among its operands becomes an attribute of the module.
    """

    pattern: ClassVar[Callable[..., Any]]
    rewrite: ClassVar[Callable[..., Any]]

    def check(self, *args: Any, **bindings: Any) -> str | None:
        """Why the rule leaves this place alone, or None."""
        return None

    @classmethod
    def label(cls) -> str:
        """The class name in kebab-case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()


@dataclass(frozen=True)
class RewritePass(Pass):
    """Tries `rules` in order at every node, once, in order of execution; sub-graphs are walked too."""

    rules: ClassVar[tuple[type[Rule], ...]]

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Edit(program, context, self.name)
        by_target: dict[Any, list[tuple[Rule, Pattern]]] = {}
        for kind in self.rules:
            pattern = trace_pattern(kind.pattern)
            by_target.setdefault(pattern.outputs[0].target, []).append((self._make(kind), pattern))
        for editor in edit.graphs():
            for node in editor.nodes():
                for rule, pattern in by_target.get(node.target, ()):
                    match = find_match(pattern, node)
                    if match is None:
                        editor.near_miss(self._label(rule), node, *nearest_miss(pattern, node))
                    elif self._apply(editor, rule, match):
                        break
        return edit.finish()

    def starts_at(self) -> frozenset[Any]:
        return frozenset(trace_pattern(kind.pattern).outputs[0].target for kind in self.rules)

    def _label(self, rule: Rule) -> str:
        return f"{self.name}/{rule.label()}"

    def _make(self, kind: type[Rule]) -> Rule:
        options = {option.name for option in fields(self)}
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind) if field.name in options})

    def _apply(self, editor: GraphEditor, rule: Rule, match: Match) -> bool:
        name = self._label(rule)
        reason = match.escape() or rule.check(**match.bindings)
        place = _place(match)
        if reason is None and place is None:
            reason = "an output is used before all inputs of the rewrite are there"
        if reason is not None:
            editor.decline(name, match.outputs[0], reason)
            return False

        def build(builder: Builder) -> tuple[Any, ...]:
            result = rule.rewrite(**{name: builder.proxy_of(value) for name, value in match.bindings.items()})
            results = tuple(result) if isinstance(result, (tuple, list)) else (result,)
            if len(results) != len(match.outputs):
                raise PassError(f"{name} rewrites {len(match.outputs)} values but returned {len(results)}")
            return results

        return editor.replace(name, match.outputs, build, inner=match.inner, at=place)


def _place(match: Match) -> Node | None:
    """Where the new nodes go: before the last output, unless another one is read before that."""
    bound: list[Node] = []
    map_arg(dict(match.bindings), bound.append)
    for place in (min(match.outputs), max(match.outputs)):
        users = [user for node in match.outputs for user in node.users if user not in match.inner]
        inputs_ready = all(node < place for node in bound)
        if inputs_ready and all(not user < place or user in match.outputs for user in users):
            return place
    return None
