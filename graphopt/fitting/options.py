"""How a fit goes: every choice with its default, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from graphopt.errors import UsageError

EPOCHS = 10  # where neither steps nor epochs are given
OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "cosine", "one-cycle")
RISE = 0.15  # of the steps of one cycle


@dataclass(frozen=True)
class FitOptions:
    """Options of `graphopt.fit`.

    A step is one change of the weights, by the mean gradient over `accumulate` samples, each run on its own; a sample
    is one feed with its batch axis. The last step of an epoch takes the samples that are left. Give `steps` or
    `epochs`, or neither for 10 epochs.

    `optimizer`: "adamw" (with no `weight_decay`, Adam) or "sgd" with a momentum of 0.9. `schedule`: "constant", or
    "cosine" from `learning_rate` down to 0 at the last step, or "one-cycle", that with a rise from 0 over the first
    steps (after Smith and Topin 2017, arXiv 1708.07120). `clip_norm` bounds the norm of the whole gradient.

    Held-out data is evaluated before the first step, after every `evaluate_every` steps (None: every epoch) and after
    the last; `patience` evaluations in a row without a lower loss end the fit (None: none do).
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"
    clip_norm: float | None = None
    steps: int | None = None
    epochs: int | None = None
    accumulate: int = 1
    evaluate_every: int | None = None
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name}={getattr(self, name)!r} is none of {', '.join(known)}")
        for name in ("steps", "epochs", "accumulate", "evaluate_every", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name}={value!r} must be a whole number of at least 1")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name}={value!r} must be a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"weight_decay={self.weight_decay!r} must be 0 or a positive number")
        if self.steps is not None and self.epochs is not None:
            raise UsageError(f"steps={self.steps} and epochs={self.epochs} exclude each other; give one of them")

    def steps_an_epoch(self, samples: int) -> int:
        """Changes of the weights in one pass over so many samples."""
        return math.ceil(samples / self.accumulate)

    def total_steps(self, samples: int) -> int:
        """Changes of the weights in the whole fit, unless it stops early."""
        return self.steps if self.steps is not None else (self.epochs or EPOCHS) * self.steps_an_epoch(samples)

    def rate(self, step: int, total: int) -> float:
        """The learning rate of step `step` (from 0) of `total`."""
        if self.schedule == "constant":
            return self.learning_rate
        rise = min(1.0, (step + 1) / (RISE * total)) if self.schedule == "one-cycle" else 1.0
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / total))
