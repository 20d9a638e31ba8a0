"""Which range of numbers each value needs, from one pass over samples: memory does not grow with their number.

Every value is watched by its extremes or by a histogram of fixed size; values that share a scale share a range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from graphopt.data.accumulators import Accumulator, Bins, Histogram
from graphopt.data.dataset import Sample
from graphopt.data.statistics import observe
from graphopt.passes.quantize import clipping
from graphopt.passes.quantize.activations import ActivationForm, Range
from graphopt.program import Program

Method = Literal["minmax", "percentile", "entropy", "mse"]
BINS = 4096


class Extremes:
    """The least and the largest finite number."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def update(self, value: Tensor) -> None:
        if not value.numel():
            return
        low, high = (float(part) for part in value.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = value[value.isfinite()]
            if not finite.numel():
                return
            low, high = (float(part) for part in finite.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)

    def result(self) -> Range | None:
        """None before the first finite number."""
        return Range(self.low, self.high) if self.low <= self.high else None


class Spread:
    """Extremes and a histogram."""

    def __init__(self) -> None:
        self.extremes, self.histogram = Extremes(), Histogram(BINS)

    def update(self, value: Tensor) -> None:
        self.extremes.update(value)
        self.histogram.update(value)

    def merge(self, other: Spread) -> None:
        """Take in everything that `other` has seen."""
        self.histogram.merge(other.histogram)
        mine, theirs = self.extremes, other.extremes
        mine.low, mine.high = min(mine.low, theirs.low), max(mine.high, theirs.high)

    def result(self) -> tuple[Range, Bins] | None:
        found, bins = self.extremes.result(), self.histogram.result()
        return None if found is None or bins is None else (found, bins)


@dataclass(frozen=True)
class Calibration:
    """How ranges are chosen; `percentile` is the share of numbers, in percent, that the method of that name keeps."""

    method: Method
    percentile: float
    form: ActivationForm

    def ranges(self, program: Program, roots: Mapping[str, str], samples: Iterable[Sample]) -> dict[str, Range]:
        """The range of each root, over the values (by name of their node) that share it.

        Values that no sample reaches, or that are never finite, leave theirs out. Raises what `observe` raises.
        """
        watched: dict[str, list[Accumulator]] = {name: [self._accumulator()] for name in roots}
        observe(program, watched, samples)
        shared: dict[str, list[Accumulator]] = {}
        for name, root in roots.items():
            shared.setdefault(root, []).extend(watched[name])
        found = {root: self._range(parts) for root, parts in shared.items()}
        return {root: item for root, item in found.items() if item is not None}

    def _accumulator(self) -> Accumulator:
        return Extremes() if self.method == "minmax" else Spread()

    def _range(self, parts: list[Accumulator]) -> Range | None:
        first = parts[0]
        if isinstance(first, Extremes):
            known = [item for part in parts if (item := part.result()) is not None]
            return Range(min(item.low for item in known), max(item.high for item in known)) if known else None
        assert isinstance(first, Spread)
        for other in parts[1:]:
            assert isinstance(other, Spread)
            first.merge(other)
        result = first.result()
        if result is None:
            return None
        whole, bins = result
        if self.method == "percentile":
            return clipping.percentile(bins, whole, self.percentile, self.form)
        if self.method == "entropy":
            return clipping.entropy(bins, whole, self.form)
        return clipping.least_squares(bins, whole, self.form)
