"""How much of a range to give up, so that what is left gets finer codes: by a histogram.

- percentile: the given share of all numbers, the same number of them left out at both ends;
- entropy: the least Kullback-Leibler divergence of the histogram from what its codes tell of it (Migacz 2017, "8-bit
  inference with TensorRT"); zeros, which have a code of their own, are left out;
- least squares: the least mean squared difference that rounding and clamping make.

The last two search one end, then the other, then again, until nothing is better; each end is one of a hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from graphopt.data.accumulators import Bins
from graphopt.passes.quantize.activations import ActivationForm, Range

STEPS = 100  # ends that are tried between zero and the largest number
ROUNDS = 4


def percentile(bins: Bins, whole: Range, share: float, form: ActivationForm) -> Range:
    """Without the (100 - share) percent of numbers that lie outermost, half of them at each end."""
    left_out = (100 - share) / 100
    if form.symmetric:
        size = _magnitudes(bins).quantile(1 - left_out)
        return Range(max(whole.low, -size), min(whole.high, size))
    low, high = bins.quantile(left_out / 2), bins.quantile(1 - left_out / 2)
    return Range(max(whole.low, low), min(whole.high, high))


def _magnitudes(bins: Bins) -> Bins:
    """Of absolute values: every bin lies on one side of zero, a multiple of its width from it."""
    width = bins.edges[1] - bins.edges[0]
    middles = (bins.edges[1:] + bins.edges[:-1]) / 2
    index = (middles.abs() / width).floor().long()
    counts = torch.zeros(int(index.max()) + 1, dtype=torch.int64).index_add_(0, index, bins.counts)
    return Bins(counts, torch.arange(len(counts) + 1, dtype=torch.float64) * width, bins.nonfinite)


def least_squares(bins: Bins, whole: Range, form: ActivationForm) -> Range:
    """The range with the least squared error of codes, taking each bin at its middle."""
    values, counts = _held(bins)

    def error(tried: Range) -> float:
        return float((counts * (form.rounded(values, tried) - values).square()).sum())

    return _search(whole, error, form)


def entropy(bins: Bins, whole: Range, form: ActivationForm) -> Range:
    """The range whose codes tell most of the histogram."""
    values, counts = _held(bins)
    width = float(bins.edges[1] - bins.edges[0])
    kept = values.abs() > width  # zeros of a relu would drown all else
    values, counts = values[kept], counts[kept]
    if len(values) < 2:
        return whole
    return _search(whole, lambda tried: divergence(values, counts, tried, form), form)


def divergence(values: Tensor, counts: Tensor, tried: Range, form: ActivationForm) -> float:
    """KL(p | q) in nats: p are the counts with what is clamped moved to the ends, q what codes leave of those inside.

    q spreads the count of each code evenly over the values that have it.
    """
    scale, zero = form.parameters(tried)
    shift = 0 if zero is None else int(zero)
    limits = [float(scale) * (form.codes[name] - shift) for name in ("qmin", "qmax")]
    half = float(scale) / 2
    inside = (values >= limits[0] - half) & (values <= limits[1] + half)
    if int(inside.sum()) < 2:
        return float("inf")
    own = counts[inside]
    moved = own.clone()
    moved[0] += counts[values < limits[0] - half].sum()
    moved[-1] += counts[values > limits[1] + half].sum()
    codes = (values[inside] / float(scale)).round().long()
    codes = codes - codes.min()
    total = torch.zeros(int(codes.max()) + 1, dtype=torch.float64).index_add_(0, codes, own)
    number = torch.zeros_like(total).index_add_(0, codes, torch.ones_like(own))
    told = (total / number.clamp(min=1))[codes]
    p, q = moved / moved.sum(), told / told.sum()
    return float((p * (p / q).log()).sum())


def _held(bins: Bins) -> tuple[Tensor, Tensor]:
    """Middles and counts, float64, of the bins that hold something."""
    held = bins.counts > 0
    return ((bins.edges[1:] + bins.edges[:-1]) / 2)[held], bins.counts[held].double()


def _search(whole: Range, error: Callable[[Range], float], form: ActivationForm) -> Range:
    """The range within `whole` with the least error, by one end at a time; the widest of equals."""
    best, least = whole, error(whole)
    for _ in range(ROUNDS):
        before = least
        for end in ("both",) if form.symmetric else ("both", "high", "low"):
            for tried in _candidates(whole, best, end):
                found = error(tried)
                if found < least:
                    best, least = tried, found
        if least == before:
            break
    return best


def _candidates(whole: Range, best: Range, end: str) -> Iterator[Range]:
    for step in range(STEPS, 0, -1):
        share = step / STEPS
        low = best.low if end == "high" else whole.low * share
        yield Range(low, best.high if end == "low" else whole.high * share)
