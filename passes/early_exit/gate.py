"""Gates that are learned together with the heads they stand behind (Chataoui et al. 2024, "JEI-DNN", arXiv 2310.09163).

Two problems are solved in turn. The gates learn where each sample is best let go: at exit l* = argmin CE(l) + TRADE_OFF
cost(l), so that gate l is to be open for l >= l*, by a weighted cross entropy. The heads learn sum P(l) CE(l), P being
what the gates give each exit, scaled for every sample to the sum of CE(l). Both begin from
heads that were trained alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.contract import PassContext
from graphopt.data.dataset import Dataset, Sample, View
from graphopt.edit import Builder, Edit
from graphopt.fit import fit
from graphopt.fitting.losses import Outputs
from graphopt.fitting.options import FitOptions
from graphopt.passes.early_exit.candidates import LEARNING_RATE, Heads, Recorded, loss_of
from graphopt.passes.early_exit.decisions import Gate, Policy, last_step, opened
from graphopt.passes.early_exit.learning import IGNORED, Learned, Recording, last_label
from graphopt.passes.early_exit.policies import features
from graphopt.program import TensorSpec

TRADE_OFF = 0.3  # of the whole network's cost beside a cross entropy
ROUNDS = 4
MOST_WEIGHT = 5.0  # of the rarer side of a gate
GATE_RATE = 0.05  # of five numbers that begin at zero


def learn_gates(
    learned: Learned, chosen: Sequence[int], costs: Sequence[float], context: PassContext, steps: int
) -> tuple[Learned, Policy]:
    """Gates behind the chosen exits, and the heads as they are with them; at most so many steps for each in all."""
    heads, names = with_gates(learned.heads, chosen)
    samples = labelled_by_end(learned.fitting)
    data = Dataset(*_views(samples), labelled=True).for_fitting()
    task = Task(len(learned.heads.places), tuple(chosen), tuple(costs))
    products = [name for index in chosen for name in heads.weights[index]]
    for number in range(ROUNDS):
        context.progress("learning gates of exits", number, ROUNDS)
        weighted = task.weighted(heads, samples)
        for trained, loss, rate in (
            ([name for pair in names for name in pair], weighted.gate_loss, GATE_RATE),
            (products, weighted.head_loss, LEARNING_RATE / 10),
        ):
            options = FitOptions(
                steps=max(1, steps // ROUNDS), learning_rate=rate, schedule="cosine", seed=context.seed + number
            )
            found = fit(heads.program, data, train=trained, loss=loss, options=options)
            heads = replace(heads, program=found.program)
    module = heads.program.graph_module
    gates = tuple(Gate(module.get_parameter(weight), module.get_parameter(bias)) for weight, bias in names)
    return replace(learned, heads=heads), Policy("gate", gates=gates)


def _views(samples: Sequence[Sample]) -> tuple[View, View]:
    source = Recorded(tuple(samples))
    return View(source, 0, len(samples)), View(source, 0, 0)


def with_gates(heads: Heads, chosen: Sequence[int]) -> tuple[Heads, list[tuple[str, str]]]:
    """The heads with gates [samples] behind the chosen ones as further outputs, and each gate's weight and bias."""
    edit = Edit(heads.program, PassContext(), "exit-gate")
    (editor,) = edit.graphs()
    (output,) = editor.graph.find_nodes(op="output")
    logits = list(output.args[0])
    gates, names = [], []
    for index in chosen:
        node = logits[index]
        tensors = [torch.nn.Parameter(torch.zeros(1, 4)), torch.nn.Parameter(torch.zeros(1))]

        def build(builder: Builder, node=node, tensors=tensors) -> list:  # type: ignore[no-untyped-def, type-arg]
            last = last_step(builder.proxy_of(node), node.meta["val"].dim())
            own = [builder.constant(tensor) for tensor in tensors]
            names.append((str(own[0].target), str(own[1].target)))
            return [opened(features(last), *map(builder.proxy_of, own)).node]

        found = editor.insert("exit-gate", node, build, output)
        assert found is not None
        gates.append(found[0])
    output.args = ((*logits, *gates),)
    specs = tuple(
        TensorSpec(f"gate_{number}", torch.float32, heads.program.outputs[0].shape[:1]) for number in range(len(gates))
    )
    program = replace(edit.finish().program, outputs=(*heads.program.outputs, *specs))
    return replace(heads, program=program), names


def labelled_by_end(recording: Recording) -> list[Sample]:
    """Samples under a label [samples, 1 + classes]: the class, and the network's own logits, at the last step."""
    found = []
    for sample, final in zip(recording.samples, recording.finals, strict=True):
        last = last_step(final, final.dim())
        classes = last_label(sample.label, final) if recording.labelled else last.argmax(-1)
        found.append(Sample(sample.inputs, torch.cat([classes[:, None].to(last.dtype), last], 1)))
    return found


@dataclass(frozen=True)
class Task:
    """The two losses, of outputs that are the logits of `places` heads, then the gates of the chosen ones."""

    places: int
    chosen: tuple[int, ...]
    costs: tuple[float, ...]
    weights: tuple[float, ...] = ()

    def weighted(self, heads: Heads, samples: Sequence[Sample]) -> Task:
        """With the weight of an open gate: how often each is to be shut over how often open, at most MOST_WEIGHT."""
        targets = []
        with torch.no_grad():
            for sample in samples:
                outputs = tuple(heads.program.graph_module(*sample.inputs))
                assert sample.label is not None
                targets.append(self.targets(self.losses(outputs, sample.label)))
        wanted = torch.cat(targets).mean(0)
        return replace(self, weights=tuple(((1 - wanted) / wanted.clamp_min(1e-6)).clamp(max=MOST_WEIGHT).tolist()))

    def losses(self, outputs: Outputs, label: Tensor) -> Tensor:
        """Cross entropies [samples, exits + 1] of classes that are none counting nothing."""
        classes, final = label[:, 0].long(), label[:, 1:]
        logits = [last_step(outputs[index], outputs[index].dim()) for index in self.chosen]
        kept = (classes != IGNORED).to(final.dtype)
        return torch.stack([loss_of(item, classes) * kept for item in (*logits, final)], 1)

    def targets(self, losses: Tensor) -> Tensor:
        """[samples, exits]: whether each gate is to be open, which is from the best exit on."""
        best = (losses.detach() + TRADE_OFF * torch.tensor(self.costs)).argmin(1)
        return (torch.arange(len(self.chosen)) >= best[:, None]).to(losses.dtype)

    def gate_loss(self, outputs: Outputs, label: Tensor | None) -> Tensor:
        assert label is not None
        gates = torch.stack(outputs[self.places :], 1).clamp(1e-6, 1 - 1e-6)
        targets = self.targets(self.losses(outputs, label))
        opening = torch.tensor(self.weights) * targets * gates.log()
        return -(opening + (1 - targets) * (1 - gates).log()).mean()

    def head_loss(self, outputs: Outputs, label: Tensor | None) -> Tensor:
        assert label is not None
        losses = self.losses(outputs, label)
        shares = probabilities(torch.stack(outputs[self.places :], 1).detach())
        weighted = (shares * losses).sum(1)
        scale = losses.sum(1) / weighted.clamp_min(1e-12)
        return (weighted * scale.detach()).mean()


def probabilities(gates: Tensor) -> Tensor:
    """P [samples, exits + 1] that each exit is taken, of gates [samples, exits]; the end takes what is left."""
    before = gates.cumsum(1) - gates
    taken = torch.minimum(gates, (1 - before).clamp_min(0))
    return torch.cat([taken, (1 - taken.sum(1, keepdim=True)).clamp_min(0)], 1)
