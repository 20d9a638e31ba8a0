"""Operators on codes, each alone: fed what the program itself feeds it, so that errors of one never reach the next.

A network of quantized layers is chaotic: one code that rounds to the other side of a half changes thousands behind it,
and the check of the whole has to allow for that. Here every operator that reads or makes codes is an output of one
program, whose inputs are the operands of all of them, as PyTorch computes them on the examples. A code may then differ
by one, and only where a scale larger or smaller by the share of `close_rounding` gives that code as well.

It costs one more compilation, and memory for all operands and results of these operators at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from graphopt.checking.close_rounding import shifted_runs
from graphopt.checking.output_check import FAULT, allowed_error
from graphopt.checking.reference import largest_error, run_float64
from graphopt.errors import VerificationError
from graphopt.interpreter import ProgramInterpreter
from graphopt.program import Program, TensorSpec, get_attribute, set_attribute
from graphopt.propagate import evaluate, fake_constant, find_mode

CODES = (torch.uint8, torch.int8)


@dataclass(frozen=True)
class Alone:
    """The operators of `program` (by the name of its output) as it is, and those that are left out, by why."""

    program: Program
    operators: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Account:
    """How many operators were compared, how many codes they made, and how many fell on the other side of a half."""

    operators: int
    codes: int
    flipped: int


def alone(program: Program) -> Alone | None:
    """The operators on codes of the main graph side by side, on the examples; None where there are none."""
    nodes = [node for node in program.graph_module.graph.nodes if _is_on_codes(node)]
    left_out = [f"operators inside {path} are not compared alone" for path, _ in program.graphs() if path]
    plain = [node for node in nodes if _tensors(node)]
    left_out += [f"{node.name} reads a number or gives several values" for node in nodes if node not in plain]
    if not plain:
        return None
    values = _values(program, {item for node in plain for item in node.all_input_nodes if item.op != "get_attr"})
    graph, root, mode = Graph(), torch.nn.Module(), find_mode(program.graph_module)
    made: dict[Node, Node] = {}
    for node, value in values.items():
        made[node] = graph.placeholder(f"read_{node.name}")
        made[node].meta["val"] = fake_constant(mode, value)
    for node in {item: None for each in plain for item in each.all_input_nodes if item not in values}:
        set_attribute(root, str(node.target), get_attribute(program.graph_module, str(node.target)))
        made[node] = graph.get_attr(str(node.target))
        made[node].meta = dict(node.meta)
    results = []
    for node in plain:
        args, kwargs = map_arg((node.args, node.kwargs), made.__getitem__)
        results.append(graph.create_node(node.op, node.target, args, kwargs, name=node.name))
        results[-1].meta["val"] = evaluate(results[-1], mode)
    graph.output(tuple(results)).meta["val"] = tuple(node.meta["val"] for node in results)
    side_by_side = Program(
        graph_module=GraphModule(root, graph),
        inputs=tuple(_spec(made[node].name, value) for node, value in values.items()),
        outputs=tuple(_spec(node.name, node.meta["val"]) for node in results),
        examples=tuple(values.values()),
        name=f"{program.name}, operators alone",
    )
    return Alone(side_by_side, tuple(str(node.target) for node in plain), tuple(left_out))


def compare(parts: Alone, results: Sequence[torch.Tensor]) -> Account:
    """What a compiled form of `parts.program` made of its examples, beside PyTorch.

    Raises VerificationError naming the first operator that is wrong.
    """
    program = parts.program
    eager, exact = program(*program.examples), run_float64(program, program.examples)
    larger, smaller = shifted_runs(program, program.examples) or (eager, eager)
    codes = flipped = 0
    for number, (spec, result) in enumerate(zip(program.outputs, results, strict=True)):
        where = f"{parts.operators[number]} at {spec.name!r}, fed what PyTorch feeds it,"
        wanted = eager[number]
        if result.shape != wanted.shape or result.dtype != wanted.dtype:
            raise VerificationError(f"{where} gives {result.dtype} {list(result.shape)}; {FAULT}")
        if wanted.is_floating_point():
            allowed = allowed_error(wanted, exact[number])
            if not (error := largest_error(result, exact[number])) <= allowed:
                raise VerificationError(f"{where} is off by {error:.3g} where {allowed:.3g} is allowed; {FAULT}")
            continue
        differs = result != wanted
        wrong = differs & (result != larger[number]) & (result != smaller[number])
        if bool(wrong.any()):
            most = int((result.int() - wanted.int())[wrong].abs().max())
            raise VerificationError(
                f"{where} gives {int(wrong.sum())} of {wrong.numel()} codes that are off by up to {most} and not close "
                f"to a half; {FAULT}"
            )
        codes += result.numel()
        flipped += int(differs.sum())
    return Account(len(parts.operators), codes, flipped)


def _is_on_codes(node: Node) -> bool:
    """Whether an operator of ours reads computed codes, or makes some."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.name.startswith("graphopt::"):
        return False
    values = [node.meta.get("val"), *(item.meta.get("val") for item in node.all_input_nodes if item.op != "get_attr")]
    computed = any(item.op != "get_attr" for item in node.all_input_nodes)
    return computed and any(isinstance(value, torch.Tensor) and value.dtype in CODES for value in values)


def _tensors(node: Node) -> bool:
    """Whether it reads tensors alone and gives one."""
    return all(isinstance(item.meta.get("val"), torch.Tensor) for item in (node, *node.all_input_nodes))


def _values(program: Program, wanted: set[Node]) -> dict[Node, torch.Tensor]:
    """What the examples make of these nodes, in order of execution."""
    found: dict[str, Any] = {}
    names = {node.name for node in wanted}

    def see(name: str, value: Any) -> None:
        if name in names:
            found[name] = value.contiguous()

    with torch.no_grad():
        inputs = *program.examples, *(item.initial for item in program.state)
        ProgramInterpreter(program.graph_module, see=see).run(*inputs)
    return {node: found[node.name] for node in program.graph_module.graph.nodes if node in wanted}


def _spec(name: str, value: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, value.dtype, tuple(int(size) for size in value.shape))
