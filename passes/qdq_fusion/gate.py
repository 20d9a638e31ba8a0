"""Codes only where they pay, in programs that others quantized: what is slower in codes than in float32 goes back.

Before: y = dequantize(quantize(x, scale, zero_point))        After: y = clamp(x, lowest number, highest number)

The float32 form rounds nothing; it keeps to the range of the codes, since quantizers write a relu or clip as such a
range. Weights are dequantized once, when the program is compiled. A region is a set of operators that codes flow
between; both of its forms are compiled as programs of their own and run in turns on what the examples bring it. What
remains is raced as a whole against the whole float32 form. Pairs that `quantize` wrote it has raced itself.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from graphopt.contract import PassContext, Region
from graphopt.edit import Builder, Edit, GraphEditor
from graphopt.passes.qdq_fusion.codes import DEQUANTIZE, QUANTIZE, Codes, Into, codes_of, into_of, only_user
from graphopt.passes.qdq_fusion.elements import MOVES, REARRANGEMENTS
from graphopt.passes.qdq_fusion.padding import is_constant_padding
from graphopt.passes.region_race import Pair, alone, race_pairs
from graphopt.program import Program, provenance

if TYPE_CHECKING:
    from collections.abc import Callable

    from graphopt.race import Outcome, Race

aten = torch.ops.aten
_OWN_RACE = "quantize"  # the rule of the pass that races what it writes
_OTHERS = "{count} regions stay in codes unmeasured: `quantize` made them, or they have codes outside of static pairs"


@dataclass(frozen=True)
class Gated:
    """Names of the quantizes to take out, what was measured, the whole program last, and remarks."""

    floats: frozenset[str]
    regions: tuple[Region, ...]
    notes: tuple[str, ...]


def gated(program: Program, fused: Callable[[Program], Program], race: Race, context: PassContext) -> Gated:
    """Which regions of the main graph are not measured to be faster in codes, as `fused` makes them.

    Raises what `race` does: CompileError where a program has no lowering, UsageError where nothing can be measured.
    """
    editor = next(iter(Edit(program, PassContext(), "qdq-fusion").graphs()))
    held = _held(editor)
    parts, others = _regions(editor, held)
    notes = [_OTHERS.format(count=others)] if others else []
    if branches := sum(path != "" for path, _ in program.graphs()):
        notes.append(f"codes in {branches} branches of torch.cond stay unmeasured: the examples may not enter a branch")
    own = {node.name: node for node in program.graph_module.graph.nodes}  # the editor has a copy
    constants = {own[node.name] for node in held}
    coded = [alone(program, {own[node.name] for node in part}, constants) for part in parts]
    pairs = [Pair(in_floats(part), fused(part)) for part in coded]
    outcomes = race_pairs(
        program, pairs, race, lambda done, count: context.progress("qdq-fusion: measuring regions", done, count)
    )
    floats: set[str] = set()
    regions = []
    for part, outcome in zip(parts, outcomes, strict=True):
        regions.append(_told(part, outcome))
        if not outcome.faster:
            floats |= _quantizes(part)
    every = set().union(*map(_quantizes, parts))
    if left := every - floats:
        outcome = race(in_floats(program, every), fused(in_floats(program, floats)))
        regions.append(_told((), outcome))
        if not outcome.faster:
            floats |= left
    return Gated(frozenset(floats), tuple(regions), tuple(notes))


def _quantizes(part: Collection[Node]) -> set[str]:
    return {node.name for node in part if node.target is QUANTIZE}


def _told(nodes: Collection[Node], outcome: Outcome) -> Region:
    names = tuple(node.name for node in nodes if node.target not in (QUANTIZE, DEQUANTIZE))
    return Region(names, outcome.first.seconds, outcome.second.seconds, outcome.faster)


def in_floats(program: Program, names: Collection[str] | None = None) -> Program:
    """The float32 form: without the pairs at these quantizes of the main graph, all of them by default."""
    edit = Edit(program, PassContext(), "qdq-fusion")
    editor = next(iter(edit.graphs()))
    every = {node.name for node in editor.graph.nodes} if names is None else names
    take_out_all(editor, every, "qdq-fusion/float32")
    return edit.finish().program


def take_out_all(editor: GraphEditor, names: Collection[str], rule: str) -> None:
    """The range of the codes in the place of each of these quantizes and all that dequantize it."""
    for node in editor.nodes():
        if node.name in names and node.target is QUANTIZE and (pair := _pair(editor, node)) is not None:
            _take_out(editor, node, pair, rule)
            editor.decline(rule, node, "its region is not measured to be faster in codes")


def _take_out(editor: GraphEditor, node: Node, pair: _Pair, rule: str) -> None:
    into = pair.into
    low, high = (float((code - into.zero) * into.scale) for code in (into.low, into.high))

    def build(builder: Builder) -> list[Node]:
        number = builder.call(aten.clamp.default, node.args[0], low, high)
        if not number.meta["val"].is_contiguous():  # codes are, and views of them may rely on it
            number = builder.call(aten.clone.default, number, memory_format=torch.contiguous_format)
        numbers = {node: number}
        for move in pair.moves:
            numbers[move] = builder.repeat(move, numbers)
        return [numbers[reader.all_input_nodes[0]] for reader in pair.readers]

    editor.replace(rule, pair.readers, build, inner=[node, *pair.moves], anchor=node)


@dataclass(frozen=True)
class _Pair:
    """What a quantize makes, the moves of its codes and all that dequantize them with its parameters, in order."""

    into: Into
    moves: tuple[Node, ...]
    readers: tuple[Node, ...]


def _pair(editor: GraphEditor, node: Node) -> _Pair | None:
    """None where codes of a quantize are read by anything else."""
    into, pending = into_of(editor, node), list(node.users)
    found: dict[Node, None] = {}
    while pending:
        user = pending.pop()
        if into is None or user in found:
            continue
        found[user] = None
        if user.target in MOVES and len(user.all_input_nodes) == 1 and not is_constant_padding(user):
            pending += user.users
        elif (codes := codes_of(editor, user)) is None or not _same(codes, into):
            return None
    if into is None or not found:
        return None
    ordered = [each for each in editor.graph.nodes if each in found]
    readers = tuple(each for each in ordered if each.target is DEQUANTIZE)
    return _Pair(into, tuple(each for each in ordered if each not in readers), readers) if readers else None


def _same(codes: Codes, into: Into) -> bool:
    return codes.dtype == into.dtype and codes.zero == into.zero and bool(codes.scale == into.scale)


def _regions(editor: GraphEditor, held: Collection[Node]) -> tuple[list[list[Node]], int]:
    """The regions that can be raced, each in order of execution, and how many others there are.

    Those cannot whose codes are made or read by more than static pairs, and those of `quantize` have been.
    """
    above: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        while above.setdefault(node, node) is not node:
            node = above[node]
        return node

    settled: set[Node] = set()
    whole: set[Node] = set()  # what dequantizes in pairs
    for node in editor.graph.nodes:
        if node in held or node.target not in (QUANTIZE, DEQUANTIZE):
            continue
        if node.target is DEQUANTIZE:
            joined = [node.all_input_nodes[0], *(user for user in node.users if user.op != "output")]
            settled |= {node} - whole
        else:
            pair, joined = _pair(editor, node), _before(node, held)
            settled |= {node} if pair is None or _maker(node) == _OWN_RACE else set()
            if pair is not None:
                joined += [*pair.moves, *pair.readers]
                whole.update(pair.readers)
        for each in joined:
            above[root(each)] = root(node)
    found: dict[Node, list[Node]] = {}
    for node in editor.graph.nodes:
        if node in above and node.op == "call_function":
            found.setdefault(root(node), []).append(node)
    raced = [part for part in found.values() if not settled & set(part)]
    return raced, len(found) - len(raced)


def _maker(node: Node) -> str:
    """The pass whose rule made the node."""
    return str(provenance(node).get("rule", "")).partition("/")[0]


def _before(node: Node, held: Collection[Node]) -> list[Node]:
    """What makes the numbers of a quantize, as far back as the next operator that is no pointwise one or view."""
    found, pending = [], [*node.all_input_nodes[:1]]
    while pending:
        source = pending.pop()
        if source.op != "call_function" or source in held:
            continue
        found.append(source)
        if source.target in REARRANGEMENTS or torch.Tag.pointwise in getattr(source.target, "tags", ()):
            pending += [item for item in source.all_input_nodes if only_user(item) is source]
    return found


def _held(editor: GraphEditor) -> set[Node]:
    """Nodes that are computed from weights alone."""
    found: set[Node] = set()
    for node in editor.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and inputs and all(item in found for item in inputs)):
            found.add(node)
    return found
