"""Healing: what is left learns, on its tail, to give what the whole network gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from graphopt.contract import PassContext
from graphopt.data.dataset import Dataset
from graphopt.fit import fit
from graphopt.fitting.losses import Distillation
from graphopt.fitting.options import FitOptions
from graphopt.program import Program

LEARNING_RATE = 3e-4


def heal(
    program: Program, teacher: Program, trained: Sequence[str], context: PassContext, steps: int
) -> tuple[Program, str]:
    """The program with these weights distilled from `teacher` for at most so many steps, and what came of it.

    Where labels are whole numbers the first output is logits, which are matched by the divergence of their softmax;
    anything else is matched by its mean square. A fifth of the data for fitting decides which step was the best.
    Raises UsageError where there is too little data.
    """
    data = context.data
    assert data is not None
    options = FitOptions(steps=steps, learning_rate=LEARNING_RATE, schedule="cosine", clip_norm=1.0, seed=context.seed)
    kind: Literal["kl", "mse"] = "kl" if predicts_classes(data) else "mse"
    found = fit(program, data.for_fitting(), train=trained, loss=Distillation(kind), teacher=teacher, options=options)
    losses = found.history[0].held_out, min(item.held_out for item in found.history)
    note = (
        f"healing took {kind} from the whole network's outputs from {losses[0]:.4g} to {losses[1]:.4g} on held-out data"
    )
    return found.program, note


def predicts_classes(data: Dataset) -> bool:
    """Whether labels are whole numbers, so that the first output is logits."""
    sample = next(iter(data.fit))
    return sample.label is not None and not sample.label.is_floating_point()
