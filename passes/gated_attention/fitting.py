"""Fitting the gates that were put in, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.contract import PassContext
from graphopt.errors import UsageError
from graphopt.fit import fit
from graphopt.fitting.options import FitOptions
from graphopt.program import Program

LEARNING_RATE = 1e-2  # of scores that begin at zero, beside weights that stay


def fit_gates(program: Program, names: Sequence[str], context: PassContext, steps: int) -> tuple[Program, str]:
    """The program with gates trained on labels for at most so many steps, and what came of it.

    A fifth of the data for fitting decides which step was the best. Raises UsageError without labels: gates begin as
    the identity, so that there is nothing to learn from the model's own outputs.
    """
    data = context.data
    if data is None or not data.labelled:
        raise UsageError(f"fit-steps={steps} trains gates on labels, but the data has none; give labels or fit-steps=0")
    options = FitOptions(steps=steps, learning_rate=LEARNING_RATE, schedule="cosine", seed=context.seed)
    found = fit(program, data.for_fitting(), train=names, loss="cross-entropy", options=options)
    losses = found.history[0].held_out, min(item.held_out for item in found.history)
    return found.program, f"fitting took the loss on held-out data from {losses[0]:.4g} to {losses[1]:.4g}"
