"""Ranges: against the raw numbers, a brute-force search, and a definition written out; memory that does not grow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.data.dataset import Sample
from graphopt.passes.quantize.activations import ActivationForm, Range
from graphopt.passes.quantize.calibration import Calibration, Extremes, Method, Spread
from graphopt.passes.quantize.clipping import divergence
from tests.models import program as model

FORMS = [ActivationForm(), ActivationForm(True)]


def heavy_tailed(count: int = 40_000) -> Tensor:
    """Student's t with 3 degrees of freedom: few numbers take most of the range."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, 4, generator=generator)
    return normal[:, 0] / normal[:, 1:].square().mean(1).sqrt()


def found(method: Method, values: Tensor, form: ActivationForm, percentile: float = 99.9) -> Range:
    calibration = Calibration(method, percentile, form)
    watcher = calibration._accumulator()
    for part in values.split(1000):
        watcher.update(part)
    result = calibration._range([watcher])
    assert result is not None
    return result


def rounding_error(values: Tensor, tried: Range, form: ActivationForm) -> float:
    """By graphopt::quantize and dequantize themselves."""
    scale, zero = form.parameters(tried)
    codes = torch.ops.graphopt.quantize(values, scale, zero, **form.codes)
    bounds = {key: form.codes[key] for key in ("qmin", "qmax")}
    back = torch.ops.graphopt.dequantize(codes, scale, zero, **bounds, dtype=torch.float32)
    return float((back - values).double().square().mean())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("values", [heavy_tailed(), heavy_tailed().abs(), heavy_tailed() - 4, torch.rand(5000)])
def test_mse_is_as_good_as_a_search_through_all_ranges(form: ActivationForm, values: Tensor) -> None:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    shares = [step / 25 for step in range(1, 26)]
    best = min(rounding_error(values, Range(low * a, high * b), form) for a in shares for b in shares)
    ours = rounding_error(values, found("mse", values, form), form)
    assert ours <= 1.01 * best
    assert ours <= rounding_error(values, Range(low, high), form) * 1.0001


def test_percentile_is_that_of_the_raw_numbers() -> None:
    values = heavy_tailed()
    result = found("percentile", values, ActivationForm(), 99.0)
    width = (float(values.max()) - float(values.min())) / 1000
    assert result.low == pytest.approx(float(values.double().quantile(0.005)), abs=width)
    assert result.high == pytest.approx(float(values.double().quantile(0.995)), abs=width)
    both = found("percentile", values, ActivationForm(True), 99.0)
    assert both.high == pytest.approx(float(values.abs().double().quantile(0.99)), abs=width) and both.low == -both.high


def test_percentile_100_and_minmax_are_the_extremes() -> None:
    values = heavy_tailed()
    for method in ("minmax", "percentile"):
        result = found(method, values, ActivationForm(), 100.0)
        assert (result.low, result.high) == (float(values.min()), float(values.max()))


def slow_divergence(values: list[float], counts: list[float], tried: Range, form: ActivationForm) -> float:
    """Migacz's algorithm number by number."""
    scale, zero = form.parameters(tried)
    step, shift = float(scale), 0 if zero is None else int(zero)
    low, high = (form.codes["qmin"] - shift - 0.5) * step, (form.codes["qmax"] - shift + 0.5) * step
    inside = [(v, c) for v, c in zip(values, counts, strict=True) if low <= v <= high]
    if len(inside) < 2:
        return math.inf
    p = [c for _, c in inside]
    p[0] += sum(c for v, c in zip(values, counts, strict=True) if v < low)
    p[-1] += sum(c for v, c in zip(values, counts, strict=True) if v > high)
    codes = [round(v / step) for v, _ in inside]
    q = []
    for code in codes:
        mine = [c for other, (_, c) in zip(codes, inside, strict=True) if other == code]
        q.append(sum(mine) / len(mine))
    return sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_entropy_has_the_least_divergence(form: ActivationForm) -> None:
    values = heavy_tailed(4000).abs()
    spread = Spread()
    spread.update(values)
    result = spread.result()
    assert result is not None
    bins = result[1]
    held = bins.counts > 0
    middles, counts = ((bins.edges[1:] + bins.edges[:-1]) / 2)[held], bins.counts[held].double()
    kept = middles.abs() > float(bins.edges[1] - bins.edges[0])
    middles, counts = middles[kept], counts[kept]
    top = float(values.max())
    ranges = [Range(float(values.min()) * share, top * share) for share in (step / 10 for step in range(1, 11))]
    for tried in ranges:
        slow = slow_divergence(middles.tolist(), counts.tolist(), tried, form)
        assert divergence(middles, counts, tried, form) == pytest.approx(slow, rel=1e-9, abs=1e-12)
    chosen = divergence(middles, counts, found("entropy", values, form), form)
    assert chosen <= min(divergence(middles, counts, tried, form) for tried in ranges) + 1e-12


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_order_and_cuts_of_samples_do_not_matter(method: Method) -> None:
    values = heavy_tailed(6000)
    assert found(method, values, ActivationForm()) == found(method, values.flip(0).clone(), ActivationForm())


def test_numbers_that_are_not_finite_are_left_out() -> None:
    watcher = Extremes()
    watcher.update(torch.tensor([math.nan, math.inf]))
    assert watcher.result() is None
    watcher.update(torch.tensor([math.nan, 2.0, -math.inf, -1.0]))
    assert watcher.result() == Range(-1.0, 2.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pair", [(0.0, 0.0), (1.0, 3.0), (-3.0, -1.0), (-1e-44, 1e-44), (-3e38, 3e38), (-0.1, 7.3)])
def test_zero_is_exact_and_ends_are_within_half_a_step(form: ActivationForm, pair: tuple[float, float]) -> None:
    scale, zero = form.parameters(Range(*pair))
    assert float(scale) > 0 and scale.isfinite() and scale >= torch.finfo(torch.float32).tiny
    values = torch.tensor([0.0, *pair])
    codes = torch.ops.graphopt.quantize(values, scale, zero, **form.codes)
    bounds = {key: form.codes[key] for key in ("qmin", "qmax")}
    back = torch.ops.graphopt.dequantize(codes, scale, zero, **bounds, dtype=torch.float32)
    assert back[0] == 0
    assert torch.all((back - values).abs() <= 0.5001 * scale + 1e-44)


class Endless:
    """Samples that are made when they are asked for, and how many are alive at once."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Sample]:
        for index in range(self.count):
            yield Sample((torch.randn(3, 16, generator=torch.Generator().manual_seed(index)),))


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_what_is_kept_does_not_grow_with_the_samples(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    program = model("mlp")
    kept: list[int] = []
    for count in (3, 60):
        watchers: list[Any] = []
        made = Calibration._accumulator
        monkeypatch.setattr(
            Calibration, "_accumulator", lambda self, made=made, w=watchers: w.append(made(self)) or w[-1]
        )
        calibration = Calibration(method, 99.9, ActivationForm())
        assert calibration.ranges(program, {"x": "x", "relu": "relu"}, Endless(count))
        monkeypatch.undo()
        kept.append(sum(_numbers(item) for item in watchers))
    assert kept[0] == kept[1]


def _numbers(item: object) -> int:
    """Elements of all tensors and numbers that an object holds."""
    if isinstance(item, Tensor):
        return item.numel()
    held: list[int] = [_numbers(value) for value in vars(item).values()] if hasattr(item, "__dict__") else [1]
    return sum(held)
