"""Which token follows: the likeliest, or one drawn by its probability, the unlikely ones left out."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from graphopt.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 takes the likeliest token, the first of equal ones. Above, logits are divided by it.

    `top_k` leaves the k likeliest tokens to draw from, and `top_p` of those the fewest whose probabilities sum up to at
    least p (Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration", arXiv 1904.09751). Raises UsageError.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, Real) or not 0 <= self.temperature < float("inf"):
            raise UsageError(
                f"temperature is {self.temperature!r}; give 0 for the likeliest token, or a number above it"
            )
        if self.top_k is not None and (not isinstance(self.top_k, Integral) or self.top_k < 1):
            raise UsageError(
                f"top_k is {self.top_k!r}; give a whole number of 1 or more, or None to draw from all tokens"
            )
        if not isinstance(self.top_p, Real) or not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p!r}; give a number above 0 and up to 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p != 1):
            raise UsageError("top_k and top_p choose what to draw from; give a temperature above 0 with them")

    def choose(self, logits: np.ndarray, generator: np.random.Generator) -> int:
        """A token by the logits [V] of all; one number of the generator is used for each that is drawn."""
        if self.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")[: self.top_k]
        likely = logits[order].astype(np.float64)
        with np.errstate(over="ignore"):  # where the temperature is next to 0, all but the likeliest go to no share
            shares = np.exp((likely - likely[0]) / self.temperature)
        sums = np.cumsum(shares / shares.sum())
        count = min(int(np.searchsorted(sums, self.top_p)) + 1, len(order))
        drawn = generator.random() * sums[count - 1]
        return int(order[min(int(np.searchsorted(sums[:count], drawn, side="right")), count - 1)])


def seeded(seed: int) -> np.random.Generator:
    """Raises UsageError for what is no whole number of at least 0."""
    if not isinstance(seed, Integral) or seed < 0:
        raise UsageError(f"seed is {seed!r}; give a whole number of 0 or more")
    return np.random.default_rng(int(seed))
