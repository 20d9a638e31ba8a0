"""Gates on whole blocks that are learned together, so that what one block can do for another counts.

Block l gives g x_after + (1 - g) x_before with g = w² / (w² + eps), a smooth count of whether w is there at all. The
gates alone are fitted to keep the network's outputs while their mean is pressed below what is to be left; eps falls
from stage to stage, which drives each gate to 0 or 1: our formulation of the first stage of Jing et al. 2024,
"FoldGPT" (arXiv 2407.00928). With g = 1 the network is the original, with g = 0 the one without the block, both to
the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.contract import PassContext
from graphopt.data.dataset import Dataset
from graphopt.edit import Builder, Edit
from graphopt.fit import fit
from graphopt.fitting.losses import Distillation, Outputs, make_objective
from graphopt.fitting.options import FitOptions
from graphopt.passes.block_folding.blocks import Blocks, find_blocks
from graphopt.program import Program, TensorSpec

aten = torch.ops.aten

STAGES = (1e-1, 3e-2, 1e-2, 1e-3, 1e-4)  # eps
STEPS = 40  # of each stage
FIRST_GATE = 0.99
LEARNING_RATE = 0.05
PRESSURE = 10.0  # of the pressed mean beside the distance of the network without any of the blocks
OUTPUT = "gates"


def gated_program(
    program: Program, chosen: str | tuple[int, ...], positions: Sequence[int], widths: Tensor, eps: float
) -> Program:
    """`program` with a gate on the blocks at `positions`, and the gates [blocks] as its last output.

    `widths` [blocks], the w, is its only new parameter.
    """
    edit = Edit(program, PassContext(), "block-gate")
    (editor,) = [item for item in edit.graphs() if not item.path]
    found = find_blocks(edit.program, chosen)
    assert isinstance(found, Blocks)
    parameter = torch.nn.Parameter(widths.clone())
    inputs: dict[Node, Node] = {}
    gates: list[Node] = []

    def gated(builder: Builder, before: Node, after: Node, number: int) -> Node:
        if not gates:
            square = builder.call(aten.mul.Tensor, builder.constant(parameter), builder.constant(parameter))
            gates.append(builder.call(aten.div.Tensor, square, builder.call(aten.add.Tensor, square, eps)))
        gate = builder.call(aten.select.int, gates[0], 0, number)
        passed = builder.call(aten.mul.Tensor, before, builder.call(aten.rsub.Scalar, gate, 1.0))
        return builder.call(aten.add.Tensor, builder.call(aten.mul.Tensor, after, gate), passed)

    for number, position in enumerate(positions):
        block = found.blocks[position]
        source = inputs.get(block.input, block.input)

        def build(
            builder: Builder, before: Node = source, after: Node = block.output, number: int = number
        ) -> list[Node]:
            inputs[after] = gated(builder, before, after, number)
            return [inputs[after]]

        editor.replace(edit.name, [block.output], build, at=block.output.next)
    (output,) = editor.graph.find_nodes(op="output")
    results = list(output.args[0])
    results.insert(len(program.outputs), gates[0])
    output.args = (tuple(results),)
    spec = TensorSpec(OUTPUT, widths.dtype, tuple(widths.shape))
    return replace(edit.finish().program, outputs=(*program.outputs, spec))


def learned_gates(
    program: Program,
    chosen: str | tuple[int, ...],
    positions: Sequence[int],
    left: float,
    data: Dataset,
    context: PassContext,
) -> dict[int, float]:
    """The gates of the blocks at `positions` once their mean is pressed to `left`; deterministic for a seed."""
    original = tuple(spec.name for spec in program.outputs if spec.dtype.is_floating_point)
    widths = torch.full((len(positions),), math.sqrt(FIRST_GATE / (1 - FIRST_GATE) * STAGES[0]))
    nothing = gated_program(program, chosen, positions, torch.zeros_like(widths), STAGES[0])
    pressure = PRESSURE * distance(nothing, program, original, data)

    def pressed(outputs: Outputs, label: Tensor | None) -> Tensor:
        return torch.relu(outputs[len(program.outputs)].mean() - left)

    loss = Distillation("mse", outputs=original, task=pressed, task_weight=pressure)
    for number, eps in enumerate(STAGES):
        context.progress("learning gates of blocks", number, len(STAGES))
        gated = gated_program(program, chosen, positions, widths, eps)
        name = next(
            iter(set(dict(gated.graph_module.named_parameters())) - set(dict(program.graph_module.named_parameters())))
        )
        options = FitOptions(steps=STEPS, learning_rate=LEARNING_RATE, seed=context.seed)
        found = fit(gated, data, train=[name], loss=loss, teacher=program, options=options).program
        widths = found.graph_module.get_parameter(name).detach()
    gates = widths.square() / (widths.square() + STAGES[-1])
    return dict(zip(positions, gates.tolist(), strict=True))


def distance(program: Program, teacher: Program, outputs: tuple[str, ...], data: Dataset) -> float:
    """The mean squared difference of these outputs over the data for fitting."""
    objective = make_objective(program, Distillation("mse", outputs=outputs), teacher)
    with torch.no_grad():
        found = [float(objective(sample.inputs, program(*sample.inputs), sample.label)) for sample in data.fit]
    return math.fsum(found) / len(found)
