"""Statistics of a stream of tensors in constant memory: moments, a histogram, products of features.

Each takes tensors with `update`, another of its kind with `merge`, and gives `result` at any time; how the values are
cut into tensors, and in which order they come, changes nothing but rounding. Infinities and NaN are counted apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from graphopt.errors import UsageError


class Accumulator(Protocol):
    """What watches a value over all samples. `update` must not keep the tensor or write into it."""

    def update(self, value: torch.Tensor) -> None: ...

    def result(self) -> Any: ...


@dataclass(frozen=True)
class Statistics:
    """Statistics of the finite values seen: float64 tensors without axes, or with one entry a channel.

    `count` (int64) finite values and `nonfinite` others; `variance` is that of the population. Where a channel has
    no finite value, its other statistics are NaN.
    """

    count: torch.Tensor
    nonfinite: torch.Tensor
    minimum: torch.Tensor
    maximum: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    absolute_mean: torch.Tensor
    absolute_maximum: torch.Tensor

    def per_tensor(self) -> Statistics:
        """All channels taken together."""
        seen = self.count > 0
        count, total = self.count[seen].double(), self.count.sum()
        if not int(total):
            nothing = torch.tensor(math.nan, dtype=torch.float64)
            return Statistics(total, self.nonfinite.sum(), *(nothing,) * 6)
        mean = (count * self.mean[seen]).sum() / total
        squares = count * (self.variance[seen] + (self.mean[seen] - mean).square())
        return Statistics(
            total,
            self.nonfinite.sum(),
            self.minimum[seen].amin(),
            self.maximum[seen].amax(),
            mean,
            squares.sum() / total,
            (count * self.absolute_mean[seen]).sum() / total,
            self.absolute_maximum[seen].amax(),
        )


class Moments:
    """Count, extremes, mean and variance, of a whole tensor or for each channel along `axis`.

    Sources: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.count = torch.empty(0)  # no channels are known before the first tensor

    def update(self, value: torch.Tensor) -> None:
        """Raises UsageError where `axis` does not exist or its size is not that of the tensors before."""
        rows = _channels(value, self.axis)
        finite = rows.isfinite()
        count = finite.sum(1).double()
        mean = torch.where(finite, rows, 0.0).sum(1) / count.clamp(min=1)
        size = torch.where(finite, rows.abs(), 0.0)
        self._add(
            count,
            (~finite).sum(1).double(),
            _extreme(torch.where(finite, rows, math.inf), "amin", math.inf),
            _extreme(torch.where(finite, rows, -math.inf), "amax", -math.inf),
            mean,
            torch.where(finite, rows - mean[:, None], 0.0).square().sum(1),
            size.sum(1),
        )

    def merge(self, other: Moments) -> None:
        """Take in everything that `other` has seen."""
        if other.count.numel():
            self._add(
                other.count, other.nonfinite, other.minimum, other.maximum, other.mean, other.squares, other.magnitude
            )

    def _add(
        self,
        count: torch.Tensor,
        nonfinite: torch.Tensor,
        minimum: torch.Tensor,
        maximum: torch.Tensor,
        mean: torch.Tensor,
        squares: torch.Tensor,
        magnitude: torch.Tensor,
    ) -> None:
        if not self.count.numel():
            self.count, self.nonfinite, self.minimum, self.maximum = count, nonfinite, minimum, maximum
            self.mean, self.squares, self.magnitude = mean, squares, magnitude
            return
        if count.shape != self.count.shape:
            raise UsageError(
                f"axis {self.axis} has {len(count)} channels in one sample and {len(self.count)} in those before; "
                "give an axis of fixed size, or none"
            )
        total = self.count + count
        share = count / total.clamp(min=1)
        step = mean - self.mean
        self.squares = self.squares + squares + step.square() * self.count * share
        self.mean = self.mean + step * share
        self.count, self.nonfinite, self.magnitude = total, self.nonfinite + nonfinite, self.magnitude + magnitude
        self.minimum, self.maximum = torch.minimum(self.minimum, minimum), torch.maximum(self.maximum, maximum)

    def result(self) -> Statistics | None:
        """None before the first tensor that has values."""
        if not self.count.numel() or not bool((self.count + self.nonfinite).any()):
            return None
        known = self.count > 0
        nothing = torch.full_like(self.mean, math.nan)
        values = (
            self.minimum,
            self.maximum,
            self.mean,
            self.squares / self.count,
            self.magnitude / self.count,
            torch.maximum(self.minimum.abs(), self.maximum.abs()),
        )
        found = (self.count.long(), self.nonfinite.long(), *(torch.where(known, value, nothing) for value in values))
        return Statistics(*(value if self.axis is not None else value[0] for value in found))


@dataclass(frozen=True)
class Bins:
    """`counts` (int64, [bins]) of values from `edges[i]` up to, not including, `edges[i + 1]` (float64, [bins + 1])."""

    counts: torch.Tensor
    edges: torch.Tensor
    nonfinite: int

    def quantile(self, share: float) -> float:
        """The value with `share` (0 to 1) of all values below it, linear within a bin."""
        total = self.counts.cumsum(0)
        wanted = share * int(total[-1])
        index = min(int(torch.searchsorted(total, wanted)), len(total) - 1)
        count = int(self.counts[index])
        inside = (wanted - int(total[index]) + count) / count if count else 0.0
        low, high = float(self.edges[index]), float(self.edges[index + 1])
        return low + (high - low) * inside


class Histogram:
    """A histogram of `bins` bins whose range grows with the values.

    Every bin is 2^e wide and begins at a multiple of that, so that a wider range joins pairs of bins and never cuts
    one: the counts are those of a histogram made of all values at once.
    """

    def __init__(self, bins: int = 2048) -> None:
        if bins < 2:
            raise UsageError(f"a histogram of {bins} bins cannot grow; write 2 or more, such as 2048")
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.first = 0  # the first bin begins at first * 2^exponent
        self.exponent = 0
        self.low = math.inf
        self.high = -math.inf
        self.nonfinite = 0

    def update(self, value: torch.Tensor) -> None:
        values = _channels(value, None)[0]
        finite = values[values.isfinite()]
        self.nonfinite += values.numel() - finite.numel()
        if not finite.numel():
            return
        self._cover(float(finite.min()), float(finite.max()))
        bins = _scale(finite, -self.exponent).floor().long() - self.first
        self.counts += torch.bincount(bins, minlength=len(self.counts))

    def merge(self, other: Histogram) -> None:
        """Take in everything that `other`, which has as many bins, has seen."""
        if len(other.counts) != len(self.counts):
            raise UsageError(f"histograms of {len(other.counts)} and {len(self.counts)} bins cannot be merged")
        self.nonfinite += other.nonfinite
        if other.low <= other.high:
            self._cover(other.low, other.high)
            self._move(other.counts, other.first, self.exponent - other.exponent, self.counts)

    def _cover(self, low: float, high: float) -> None:
        """Widen the bins until they hold `low` to `high` as well as everything before."""
        empty = self.low > self.high
        self.low, self.high = min(self.low, low), max(self.high, high)
        exponent = _exponent(self.low, self.high, len(self.counts))
        first = math.floor(math.ldexp(self.low, -exponent))
        if not empty and (exponent, first) != (self.exponent, self.first):
            counts = torch.zeros_like(self.counts)
            shift, old = exponent - self.exponent, self.first
            self.first = first
            self._move(self.counts, old, shift, counts)
            self.counts = counts
        self.exponent, self.first = exponent, first

    def _move(self, counts: torch.Tensor, first: int, shift: int, into: torch.Tensor) -> None:
        """Add `counts`, whose bins are 2^shift times as narrow."""
        used = counts.nonzero()[:, 0]
        into.index_add_(0, ((used + first) >> min(shift, 63)) - self.first, counts[used])

    def result(self) -> Bins | None:
        """None before the first finite value."""
        if self.low > self.high:
            return None
        edges = torch.arange(len(self.counts) + 1, dtype=torch.float64) + self.first
        return Bins(self.counts.clone(), _scale(edges, self.exponent), self.nonfinite)


_LEAST_EXPONENT = -1000


def _exponent(low: float, high: float, bins: int) -> int:
    """The least e with which bins of 2^e, aligned to it, hold `low` to `high`, and whose numbers float64 holds exactly.

    It never falls as the range grows, which is what makes the order of values irrelevant.
    """
    largest = max(abs(low), abs(high))
    least = max(_LEAST_EXPONENT, math.frexp(largest)[1] - 52)
    span = high / bins - low / bins
    exponent = max(least, math.frexp(span)[1] - 2) if span else least
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= bins:
        exponent += 1
    return exponent


def _scale(values: torch.Tensor, exponent: int) -> torch.Tensor:
    return values * math.ldexp(1.0, exponent)


@dataclass(frozen=True)
class Products:
    """`mean` (float64, [features, features]) of x xᵀ over `rows` rows x; rows with infinities or NaN are left out."""

    mean: torch.Tensor
    rows: int
    nonfinite_rows: int


class SecondMoment:
    """XᵀX of a linear layer's input X, whose last axis are the features: what GPTQ takes for a Hessian.

    Source: Frantar et al., "GPTQ" (2022), section 3, where H = 2 XᵀX.
    """

    def __init__(self) -> None:
        self.total = torch.empty(0)
        self.rows = 0
        self.nonfinite_rows = 0

    def update(self, value: torch.Tensor) -> None:
        """Raises UsageError for a value without axes or with another number of features."""
        if not value.dim():
            raise UsageError("products of features need an axis of features, and this value has none; leave them out")
        rows = _real(value).reshape(-1, value.shape[-1])
        finite = rows.isfinite().all(1)
        kept = rows[finite]
        self._add(kept.T @ kept, len(kept), len(rows) - len(kept))

    def merge(self, other: SecondMoment) -> None:
        """Take in everything that `other` has seen."""
        if other.rows or other.nonfinite_rows:
            self._add(other.total, other.rows, other.nonfinite_rows)

    def _add(self, total: torch.Tensor, rows: int, nonfinite_rows: int) -> None:
        if self.rows + self.nonfinite_rows and total.shape != self.total.shape:
            raise UsageError(f"{len(total)} features after {len(self.total)}; products need a last axis of fixed size")
        self.total = self.total + total if self.rows + self.nonfinite_rows else total
        self.rows += rows
        self.nonfinite_rows += nonfinite_rows

    def result(self) -> Products | None:
        """None before the first row without infinities and NaN."""
        return Products(self.total / self.rows, self.rows, self.nonfinite_rows) if self.rows else None


def _real(value: torch.Tensor) -> torch.Tensor:
    if value.is_complex():
        raise UsageError("statistics are of real values, and this value is complex; take its parts")
    return value.detach().double()


def _channels(value: torch.Tensor, axis: int | None) -> torch.Tensor:
    """[channels, values] in float64; one channel without an axis."""
    wide = _real(value)
    if axis is None:
        return wide.reshape(1, -1)
    if not -wide.dim() <= axis < wide.dim():
        raise UsageError(f"axis {axis} does not exist in a value of {wide.dim()} axes; give another, or none")
    moved = wide.movedim(axis, 0)
    return moved.reshape(len(moved), math.prod(moved.shape[1:]))


def _extreme(rows: torch.Tensor, reduce: str, empty: float) -> torch.Tensor:
    if not rows.shape[1]:
        return torch.full(rows.shape[:1], empty, dtype=torch.float64)
    found: torch.Tensor = getattr(rows, reduce)(1)
    return found
