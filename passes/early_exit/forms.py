"""The graph with exits: heads, what they decide, and which answer each sample gets.

Row r leaves at the first exit i with confidence[i][r] >= threshold[i]:

    done[i]   = done[i - 1] or taken[i]              [samples]
    answer[i] = where(done[i - 1], answer[i - 1], head[i])
    exit[i]   = where(done[i - 1], exit[i - 1], i)

and the network's own outputs come last, as one more head. `multi-output` computes all of it. `cond` and `staged` nest
what comes after exit i in the branch of a `torch.cond` that is taken unless all of done[i] is true; where there is one
sample, no answer has to be chosen among.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.fx import Node

from graphopt.capture.expressions import size_text
from graphopt.contract import PassContext, PassResult
from graphopt.edit import Builder, Edit
from graphopt.nesting import Stop, nested
from graphopt.passes.early_exit.candidates import RULE
from graphopt.passes.early_exit.decisions import Memory, Policy
from graphopt.passes.early_exit.heads import Product, copy_head
from graphopt.passes.early_exit.places import Places, Work, find_places
from graphopt.program import Exits, Program, TensorSpec

aten = torch.ops.aten

Form = Literal["cond", "staged", "multi-output"]


@dataclass(frozen=True)
class Taken:
    """One exit in the graph: what its head gives, and per sample whether it is sure, done, and what holds so far."""

    outputs: tuple[Node, ...]
    confidence: Node
    done: Node
    answers: tuple[Node, ...]
    exit: Node


class Chooser:
    """Adds one exit after another to a graph, each with a choice between the answers before it and its own."""

    def __init__(self, single: bool) -> None:
        self.single = single  # one sample that is not done when it comes here
        self.last: Taken | None = None

    def add(self, builder: Builder, outputs: Sequence[Node], number: int, decided: tuple[Node, Node]) -> Taken:
        confidence, taken = decided
        done = taken
        if self.last is not None and not self.single:
            done = builder.call(aten.logical_or.default, self.last.done, taken)
        answers, index = self.choose(builder, outputs, number, taken)
        self.last = Taken(tuple(outputs), confidence, done, answers, index)
        return self.last

    def choose(
        self, builder: Builder, outputs: Sequence[Node], number: int, rows: Node
    ) -> tuple[tuple[Node, ...], Node]:
        """The answers and the exit of every sample, where the next head gives `outputs`."""
        if self.single:
            return tuple(outputs), builder.constant(torch.tensor([number]))
        index = builder.call(aten.full_like.default, rows, number, dtype=torch.int64)
        if self.last is None:
            return tuple(outputs), index
        before = self.last
        pairs = zip(before.answers, outputs, strict=True)
        chosen = tuple(_where(builder, before.done, old, new) for old, new in pairs)
        return chosen, _where(builder, before.done, before.exit, index)


def _where(builder: Builder, rows: Node, one: Node, other: Node) -> Node:
    for _ in range(one.meta["val"].dim() - 1):
        rows = builder.call(aten.unsqueeze.default, rows, -1)
    return builder.call(aten.where.self, rows, one, other)


def with_exits(
    program: Program,
    context: PassContext,
    exits: Mapping[str, Product],
    policy: Policy,
    form: Form,
    shares: Sequence[float] = (),
) -> PassResult:
    """The program with an exit behind each of the nodes that `exits` names, in this form.

    Every exit is a rewrite, made where its id is allowed.
    """
    edit = Edit(program, context, RULE)
    (editor,) = [item for item in edit.graphs() if not item.path]
    places = find_places(edit.program, tuple(exits), needs_product=policy.name != "cosine")
    assert isinstance(places, Places)
    allowed = {}
    for number, place in enumerate(places.exits):
        if context.allow(f"{RULE}@{place.name}"):
            allowed[place] = number
        else:
            editor.decline(RULE, place, "its id was refused")
    (output,) = editor.graph.find_nodes(op="output")
    results: tuple[Node, ...] = tuple(output.args[0])
    single = form != "multi-output" and results[0].meta["val"].shape[0] == 1
    chooser = Chooser(single)
    taken: list[Taken] = []
    final: list[Node] = []
    memory = Memory()
    for number, place in enumerate(allowed):

        def build(builder: Builder, number: int = number, place: Node = place) -> list[Node]:
            copied = copy_head(builder, places.head, results, place, exits[place.name])
            decided = policy.decide(builder, copied.outputs[0], allowed[place], memory)
            taken.append(chooser.add(builder, copied.outputs, number, decided))
            if len(taken) == len(allowed):
                answers, index = chooser.choose(builder, results, number + 1, decided[1])
                final.extend((*answers, index))
            return [taken[-1].done]

        editor.insert(RULE, place, build, output)
    if not taken:
        return edit.finish()
    if form == "multi-output":
        for item in taken:
            final.extend((*item.outputs, item.confidence))
    output.args = (tuple(final),)
    work = Work(edit.program)
    ends = [*({item.done, *item.answers} for item in taken), set(final)]
    limits = tuple(policy.thresholds[number] for number in allowed.values())
    told = Exits(form, policy.name, limits, len(results), work.of_parts(ends), tuple(shares))
    result = edit.finish()
    flat = replace(result.program, outputs=_specs(program, final, len(taken), form), exits=told)
    if form != "multi-output":
        stops = [Stop(item.done, (*item.answers, item.exit)) for item in taken]
        flat = replace(flat, graph_module=nested(flat, stops, RULE))
    return replace(result, program=flat)


def _specs(program: Program, results: Sequence[Node], exits: int, form: Form) -> tuple[TensorSpec, ...]:
    names = ["exit"]
    if form == "multi-output":
        for number in range(exits):
            names += [f"{spec.name}_at_{number}" for spec in program.outputs] + [f"confidence_at_{number}"]
    taken = {spec.name for spec in (*program.inputs, *program.outputs)}
    own = len(program.outputs)
    specs = []
    for name, node in zip(names, results[own:], strict=True):
        while name in taken:
            name += "_"
        taken.add(name)
        value: Any = node.meta["val"]
        shape = tuple(size_text(size, program.symbols) for size in value.shape)
        specs.append(TensorSpec(name, value.dtype, shape))
    return (*program.outputs, *specs)
