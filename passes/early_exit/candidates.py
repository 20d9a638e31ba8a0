"""Heads behind every place at once, beside the network: what they learn from, and how sure and right they are.

The network itself is run once over the data. What heads read of it is recorded, and they are trained on that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.contract import PassContext
from graphopt.data.dataset import Dataset, Sample, View
from graphopt.edit import Builder, Edit
from graphopt.extract import extract
from graphopt.fit import fit
from graphopt.fitting.losses import Outputs, TaskLoss
from graphopt.fitting.options import FitOptions
from graphopt.interpreter import ProgramInterpreter
from graphopt.passes.early_exit.heads import Copied, Product, copy_head, final_product
from graphopt.passes.early_exit.places import Places, Work, find_places
from graphopt.program import Program

RULE = "early-exit"
LEARNING_RATE = 1e-2  # of single products, beside weights that stay
ROWS_A_STEP = 128  # about; a step takes whole feeds


@dataclass(frozen=True)
class Recorded:
    """Samples in memory, as a source of data."""

    samples: tuple[Sample, ...]

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        return iter(self.samples[start:stop])


@dataclass(frozen=True)
class Heads:
    """The heads alone: from what they read of the network to their first outputs, one a place, before any others.

    `weights` names the attributes of each place's own product.
    """

    program: Program
    places: tuple[str, ...]
    weights: tuple[tuple[str, ...], ...]

    def logits(self, sample: Sample) -> tuple[Tensor, ...]:
        """What each head gives for what was recorded."""
        with torch.no_grad():
            return tuple(self.program.graph_module(*sample.inputs))[: len(self.places)]

    def products(self) -> dict[str, Product]:
        """The own product of each place."""
        found = {}
        for place, names in zip(self.places, self.weights, strict=True):
            tensors = [self.program.graph_module.get_parameter(name) for name in names]
            found[place] = Product(tensors[0], tensors[1] if len(tensors) > 1 else None)
        return found


@dataclass(frozen=True)
class Whole:
    """The network with a head behind every place, which nothing reads, and what it costs to come to each."""

    program: Program
    outputs: tuple[tuple[Node, ...], ...]

    def costs(self, chosen: Sequence[int]) -> tuple[float, ...]:
        """Of leaving at each of these places and at the end, as shares of the network without heads."""
        (output,) = self.program.graph_module.graph.find_nodes(op="output")
        final = tuple(output.args[0])
        work = Work(self.program)
        (network,) = work.of_parts([final])
        return tuple(macs / network for macs in work.of_parts([*(self.outputs[index] for index in chosen), final]))


def build_heads(program: Program, chosen: Sequence[str], needs_product: bool) -> tuple[Whole, Heads]:
    """The program with a head behind each of these nodes, and the heads alone."""
    edit = Edit(program, PassContext(), RULE)
    (editor,) = [item for item in edit.graphs() if not item.path]
    places = find_places(edit.program, tuple(chosen), needs_product)
    assert isinstance(places, Places)
    (output,) = editor.graph.find_nodes(op="output")
    results: tuple[Node, ...] = tuple(output.args[0])
    copied: list[Copied] = []
    for place in places.exits:

        def build(builder: Builder, place: Node = place) -> Sequence[Node]:
            copied.append(copy_head(builder, places.head, results, place, final_product(editor, places.head)))
            return copied[-1].outputs

        editor.insert(RULE, place, build, output)
    names = tuple(place.name for place in places.exits)
    outputs = {f"exit_{number}": item.outputs[0] for number, item in enumerate(copied)}
    whole = Whole(edit.finish().program, tuple(item.outputs for item in copied))
    alone = extract(whole.program, [item.feature for item in copied], outputs)
    return whole, Heads(alone, names, tuple(item.weights for item in copied))


def record(program: Program, heads: Heads, samples: Iterable[Sample]) -> tuple[tuple[Sample, ...], tuple[Tensor, ...]]:
    """For every sample what the heads read of `program`, under its label, and the network's first output."""
    names = [spec.name for spec in heads.program.inputs]
    found, finals = [], []
    for sample in samples:
        values: dict[str, Tensor] = {}

        def see(name: str, value: Tensor, values: dict[str, Tensor] = values) -> None:
            if name in names:
                values[name] = value

        with torch.no_grad():
            results = ProgramInterpreter(program.graph_module, see=see).run(*sample.inputs)
        found.append(Sample(tuple(values[name] for name in names), sample.label))
        finals.append(results[0])
    return tuple(found), tuple(finals)


def fit_heads(
    heads: Heads, samples: Sequence[Sample], loss: TaskLoss, context: PassContext, steps: int
) -> tuple[Heads, str]:
    """The heads with their own products trained for at most so many steps, and what came of it.

    The label of each sample is of whole numbers, classes, or what the network itself gives. A fifth of the samples
    decides which step was the best. Raises UsageError where there are too few.
    """
    source = Recorded(tuple(samples))
    data = Dataset(View(source, 0, len(samples)), View(source, 0, 0), labelled=True).for_fitting()
    rows = samples[0].inputs[0].shape[0]
    options = FitOptions(
        steps=steps,
        learning_rate=LEARNING_RATE,
        schedule="cosine",
        accumulate=min(len(data.fit), max(1, ROWS_A_STEP // max(1, rows))),
        evaluate_every=max(1, steps // 10),
        seed=context.seed,
    )
    names = [name for group in heads.weights for name in group]
    found = fit(heads.program, data, train=names, loss=loss, options=options)
    before, after = found.history[0].held_out, min(item.held_out for item in found.history)
    note = f"fitting took the loss of the heads on data held out of it from {before:.4g} to {after:.4g}"
    return replace(heads, program=found.program), note


def loss_of_all(outputs: Outputs, label: Tensor | None) -> Tensor:
    """The sum over exits of the cross entropy of logits along the last axis."""
    assert label is not None
    return torch.stack([loss_of(logits, label).mean() for logits in outputs]).sum()


def distance_of_all(outputs: Outputs, label: Tensor | None) -> Tensor:
    """The sum over exits of 1 - cosine of embeddings [samples, width] and those of the label."""
    assert label is not None
    cosines = [torch.nn.functional.cosine_similarity(item, label.detach(), dim=-1).mean() for item in outputs]
    return len(outputs) - torch.stack(cosines).sum()


def loss_of(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy [rows] with labels of whole numbers, or with the softmax of other logits [..., classes]."""
    rows = logits.flatten(0, -2)
    if label.is_floating_point():
        target = label.detach().to(rows.dtype).flatten(0, -2).softmax(-1)
    else:
        target = label.flatten().long()
    return torch.nn.functional.cross_entropy(rows, target, reduction="none")
