"""A program with exits of the form `staged`, cut where it may end: one program a stage.

Nested conditions are the plan. Each stage has what runs before its condition; from it come the answers for the samples
that are done, `done` [samples] itself, and the values that later stages read. The last stage gives answers alone. Only
samples that are not done go on, so no stage looks at what was done before it: choices by that are resolved here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from graphopt.capture.expressions import size_text
from graphopt.errors import CompileError
from graphopt.program import Program, TensorSpec, get_attribute, set_attribute
from graphopt.runtime.stages import rows_axis

aten = torch.ops.aten

_FALSE = "false"  # binding of what tells which samples were done before


@dataclass(frozen=True)
class Bound:
    """What a placeholder of a branch stands for: a weight, or the value that goes by that name."""

    name: str
    weight: torch.Tensor | None = None


@dataclass
class Level:
    """One graph of the nest, how deep it lies, and what its placeholders stand for."""

    module: GraphModule
    depth: int
    bound: dict[Node, Bound | str] = field(default_factory=dict)


def split_stages(program: Program) -> tuple[Program, ...]:
    """The stages in order, with examples that are those of the whole program carried through.

    Raises CompileError where the conditions are no longer nested as they were made, or a value that is carried over has
    samples along no axis of its own.
    """
    placeholders = program.graph_module.graph.find_nodes(op="placeholder")
    bound: dict[Node, Bound | str] = {
        node: Bound(spec.name) for node, spec in zip(placeholders, program.inputs, strict=True)
    }
    stages = []
    values = {spec.name: value for spec, value in zip(program.inputs, program.examples, strict=True)}
    for stage in _Cutter(program).cut(Level(program.graph_module, 0, bound)):
        stage = replace(stage, examples=tuple(values[spec.name] for spec in stage.inputs))
        results = zip(stage.outputs, stage(*stage.examples), strict=True)
        values.update((spec.name, value) for spec, value in results)
        stages.append(stage)
    if len(stages) < 2:
        raise CompileError(f"{program.name} has no condition left to be cut at; compile it as form=cond")
    return tuple(stages)


class _Cutter:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.rows = program.outputs[0].shape[0]
        self.names = {spec.name for spec in (*program.inputs, *program.outputs)}

    def cut(self, level: Level) -> list[Program]:
        """The stage of this level and those after it."""
        (output,) = level.module.graph.find_nodes(op="output")
        copier = _Copier(self, level)
        names = [spec.name for spec in self.program.answers]
        chosen = _condition(output)
        if chosen is None:
            return [self._program(copier, [copier.local(node) for node in output.args[0][: len(names)]], names)]
        arguments: Any = chosen.args
        predicate, when_true, when_false, operands = arguments
        done = _vector(predicate)
        ended, going = (get_attribute(level.module, str(branch.target)) for branch in (when_true, when_false))
        results = [*copier.inlined(ended, operands), copier.local(done)]
        names.append(self._fresh("done"))
        bound: dict[Node, Bound | str] = {}
        carried: dict[Node, str] = {}
        for inside, operand in zip(going.graph.find_nodes(op="placeholder"), operands, strict=True):
            known = copier.binding(operand)
            if known is None and operand is not done:
                known = Bound(carried.setdefault(operand, self._fresh(operand.name)))
            bound[inside] = known or _FALSE
        later = self.cut(Level(going, level.depth + 1, bound))
        read = {spec.name for stage in later for spec in stage.inputs}
        for operand, name in carried.items():
            if name in read:
                results.append(copier.local(operand))
                names.append(name)
        return [self._program(copier, results, names), *later]

    def _fresh(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name

    def _program(self, copier: _Copier, results: list[Node], names: list[str]) -> Program:
        program = self.program
        output = copier.graph.output(tuple(results))
        output.meta["val"] = tuple(node.meta["val"] for node in results)
        placeholders = copier.graph.find_nodes(op="placeholder")
        inputs = tuple(self._spec(copier.inputs[node], node) for node in placeholders)
        outputs = tuple(self._spec(name, node) for name, node in zip(names, results, strict=True))
        used = {str(size) for spec in inputs for size in spec.shape}
        symbols = {symbol: name for symbol, name in program.symbols.items() if name in used}
        return replace(
            program,
            graph_module=GraphModule(copier.root, copier.graph),
            inputs=inputs,
            outputs=outputs,
            examples=(),
            sizes={name: bounds for name, bounds in program.sizes.items() if name in used},
            symbols=symbols,
            exits=None,
        )

    def _spec(self, name: str, node: Node) -> TensorSpec:
        for spec in self.program.inputs:
            if spec.name == name:
                return spec
        value: torch.Tensor = node.meta["val"]
        shape = tuple(size_text(size, self.program.symbols) for size in value.shape)
        if rows_axis(shape, str(self.rows)) is None:
            raise CompileError(
                f"{node.name} {list(shape)} is carried from stage to stage, but has no axis with one entry for each of "
                f"the {self.rows} samples; compile it as form=cond, or choose other exits"
            )
        return TensorSpec(name, value.dtype, shape)


class _Copier:
    """Copies what is needed of one level; values from outside become placeholders under their names."""

    def __init__(self, cutter: _Cutter, level: Level) -> None:
        self.cutter, self.level = cutter, level
        self.graph, self.root = Graph(), torch.nn.Module()
        self.inputs: dict[Node, str] = {}
        self.values: dict[Node, Node] = {}
        self.same: dict[Node, Node] = {}  # placeholders of a branch that is written out here
        self.ended = level.module  # that branch

    def binding(self, node: Node) -> Bound | None:
        """What is known by a name outside of this stage already."""
        if node.op == "get_attr":
            owner = self.level.module if node.graph is self.level.module.graph else self.ended
            place = f"{'after' if owner is self.level.module else 'end'}_{self.level.depth}."
            name = str(node.target) if owner is self.cutter.program.graph_module else place + str(node.target)
            return Bound(name, get_attribute(owner, str(node.target)))
        found = self.level.bound.get(node)
        return found if isinstance(found, Bound) else None

    def local(self, node: Node) -> Node:
        node = self.same.get(node, node)
        if node not in self.values:
            known = self.binding(node)
            if known is not None:
                self.values[node] = self._outside(known, node)
            elif (other := self._resolved(node)) is not None:
                self.values[node] = self.local(other)
            else:
                for argument in node.all_input_nodes:
                    self.local(argument)
                args, kwargs = map_arg((node.args, node.kwargs), self.local)
                self.values[node] = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
                self.values[node].meta = dict(node.meta)
        return self.values[node]

    def inlined(self, branch: GraphModule, operands: Any) -> list[Node]:
        """What the branch gives for these operands."""
        self.ended = branch
        for inside, operand in zip(branch.graph.find_nodes(op="placeholder"), operands, strict=True):
            self.same[inside] = operand
        (output,) = branch.graph.find_nodes(op="output")
        return [self.local(node) for node in output.args[0][: len(self.cutter.program.answers)]]

    def _outside(self, known: Bound, node: Node) -> Node:
        if known.weight is not None:
            set_attribute(self.root, known.name, known.weight)
            new = self.graph.get_attr(known.name)
        else:
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first):
                new = self.graph.placeholder(node.name)
            self.inputs[new] = known.name
        new.meta = {key: value for key, value in node.meta.items() if key == "val"}
        return new

    def _resolved(self, node: Node) -> Node | None:
        """What a choice by what was done before comes to: nothing was."""
        if node.target is aten.where.self and self._is_false(node.args[0]):
            return node.args[2]  # type: ignore[return-value]
        if node.target is aten.logical_or.default and self._is_false(node.args[0]):
            return node.args[1]  # type: ignore[return-value]
        return None

    def _is_false(self, node: Any) -> bool:
        while isinstance(node, Node) and node.target is aten.unsqueeze.default:
            node = node.args[0]
        return self.level.bound.get(node) == _FALSE


def _condition(output: Node) -> Node | None:
    """The `torch.cond` whose results are all that a graph gives; None where there is none."""
    results: Any = output.args[0]
    if not all(node.target is operator.getitem for node in results):
        return None
    sources = {node.args[0] for node in results}
    (chosen,) = sources if len(sources) == 1 else (None,)
    found = chosen is not None and chosen.target is torch.ops.higher_order.cond and _vector(chosen.args[0]) is not None
    return chosen if found else None


def _vector(predicate: Any) -> Any:
    """The flags of all samples that a predicate is made of."""
    made = isinstance(predicate, Node) and predicate.target in (aten.all.default, aten.view.default)
    return predicate.args[0] if made else None


def stage_entries(name: str, program: Program) -> Iterator[tuple[str, Program]]:
    """The stages of an entry by the names that they have as entries: "main_stage_0", ..."""
    for number, stage in enumerate(split_stages(program)):
        yield f"{name}_stage_{number}", stage
