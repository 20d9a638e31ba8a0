"""What heads learn, and what they then make of samples that they did not learn from.

The data to learn from has two parts: the first four fifths are fitted on, the last fifth is what thresholds and places
are chosen by. The data held out from the pass is only judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphopt.contract import PassContext
from graphopt.data.dataset import Sample
from graphopt.errors import UsageError
from graphopt.passes.early_exit.candidates import (
    Heads,
    Whole,
    build_heads,
    distance_of_all,
    fit_heads,
    loss_of_all,
    record,
)
from graphopt.passes.early_exit.decisions import Policy, last_step
from graphopt.passes.early_exit.thresholds import Outcomes
from graphopt.program import Program

IGNORED = -100  # the label that torch's cross entropy leaves out
ALIKE = 0.98  # the cosine from which on an embedding counts as right


@dataclass(frozen=True)
class Answers:
    """Logits of every exit [samples, classes], those of the end, and the classes, or None without labels."""

    exits: tuple[Tensor, ...]
    final: Tensor
    label: Tensor | None

    def of(self, columns: Sequence[int]) -> Answers:
        """Of these exits only."""
        return replace(self, exits=tuple(self.exits[index] for index in columns))

    def outcomes(self, policy: Policy) -> Outcomes:
        """How sure each exit is, and how good: right by labels, else as the network is; of embeddings, how alike."""
        if policy.name == "cosine":
            alike = [torch.nn.functional.cosine_similarity(item, self.final, dim=-1) for item in self.exits]
            quality = torch.stack([*alike, torch.ones_like(alike[0])], 1).double()
            return Outcomes(policy.confidences(self.exits), quality, ALIKE)
        classes = self.final.argmax(-1) if self.label is None else self.label
        right = [logits.argmax(-1) == classes for logits in (*self.exits, self.final)]
        return Outcomes(policy.confidences(self.exits), torch.stack(right, 1).double())


@dataclass(frozen=True)
class Recording:
    """What heads read of the network for some samples, under their labels, and the network's first output for each."""

    samples: tuple[Sample, ...]
    finals: tuple[Tensor, ...]
    labelled: bool

    def taught(self) -> tuple[Sample, ...]:
        """The samples under what heads are to learn: their classes, or else the network's own logits."""
        if self.labelled:
            return self.samples
        return tuple(replace(sample, label=final) for sample, final in zip(self.samples, self.finals, strict=True))

    def answers(self, heads: Heads) -> Answers:
        """What these heads and the network say, at the last step where there are steps; -100 is no class."""
        exits = [[last_step(item, item.dim()) for item in heads.logits(sample)] for sample in self.samples]
        final = torch.cat([last_step(item, item.dim()) for item in self.finals])
        joined = [torch.cat(column) for column in zip(*exits, strict=True)]
        if not self.labelled:
            return Answers(tuple(joined), final, None)
        pairs = zip(self.samples, self.finals, strict=True)
        label = torch.cat([last_label(sample.label, item) for sample, item in pairs])
        kept = label != IGNORED
        return Answers(tuple(item[kept] for item in joined), final[kept], label[kept])


@dataclass(frozen=True)
class Learned:
    """Heads that were trained on `fitting`; samples to choose by, and those that are only judged."""

    whole: Whole
    heads: Heads
    fitting: Recording
    choosing: Recording
    held_out: Recording
    notes: tuple[str, ...] = ()


def learn(program: Program, places: Sequence[str], context: PassContext, steps: int, embeds: bool = False) -> Learned:
    """Heads behind all of these nodes, trained for at most so many steps: to classify, or to embed as the network does.

    Raises UsageError for too little data.
    """
    data = context.data
    if data is None:
        raise UsageError("early-exit learns its heads and thresholds from data; give data and a metric")
    if not len(data.held_out):
        raise UsageError("early-exit is judged on held-out data; give at least two feeds")
    whole, heads = build_heads(program, places, needs_product=not embeds)
    parts = data.for_fitting()
    labelled = not embeds and by_labels(parts.fit, context)
    fitting, choosing, held_out = (
        Recording(*record(whole.program, heads, part), labelled) for part in (parts.fit, parts.held_out, data.held_out)
    )
    learned = Learned(whole, heads, fitting, choosing, held_out)
    if not steps:
        return learned
    heads, note = fit_heads(heads, learned.fitting.taught(), distance_of_all if embeds else loss_of_all, context, steps)
    return replace(learned, heads=heads, notes=(note,))


def by_labels(samples: Iterable[Sample], context: PassContext) -> bool:
    """Whether answers are judged by labels: whole numbers, and no metric that compares with the network itself."""
    label = next(iter(samples)).label
    compares = context.metric is not None and context.metric.compares
    return label is not None and not label.is_floating_point() and not compares


def last_label(label: Tensor | None, logits: Tensor) -> Tensor:
    """The class of every sample, at the last step where there are steps."""
    assert label is not None
    return label.reshape(logits.shape[:-1])[:, -1] if logits.dim() == 3 else label.reshape(-1)
