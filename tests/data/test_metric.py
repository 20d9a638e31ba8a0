from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.data.dataset import Dataset, Sample, View, open_data
from graphopt.data.metric import measure, open_metric
from graphopt.errors import UsageError, VerificationError
from graphopt.program import Program
from tests.models import program
from tests.passes.checking import captured


class Scale(nn.Module):
    def __init__(self, factor: float, noise: float = 0.0) -> None:
        super().__init__()
        self.factor = factor
        self.noise = noise

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.factor + self.noise, x.argmax(1)


@functools.cache
def scaled(factor: float, noise: float = 0.0) -> Program:
    return captured(Scale(factor, noise), torch.ones(3, 4), dynamic={"x": {0: "batch"}})


def feeds(*parts: Tensor) -> View:
    """A view of one sample a part; what is held out plays no role here."""
    return View(Given([Sample((part,)) for part in parts]), 0, len(parts))


class Given:
    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        return iter(self.samples[start:stop])


X = torch.tensor([[1.0, -2.0, 3.0, 0.5], [0.0, 1.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.5]])


@pytest.mark.parametrize("parts", [(X,), (X[:1], X[1:]), (X[:1], X[1:2], X[2:])])
def test_signal_to_noise_in_decibels_however_it_is_cut(parts: tuple[Tensor, ...]) -> None:
    result = measure(scaled(1.1), feeds(*parts), open_metric("snr"), scaled(1.0))
    assert result == pytest.approx(20.0, abs=1e-4)  # noise of a tenth of the signal
    assert measure(scaled(1.0), feeds(*parts), open_metric("snr"), scaled(1.0)) == 300.0


@pytest.mark.parametrize("parts", [(X,), (X[:1], X[1:])])
def test_cosine_however_it_is_cut(parts: tuple[Tensor, ...]) -> None:
    exact = torch.cosine_similarity((X + 1).double().flatten(), X.double().flatten(), dim=0)
    assert measure(scaled(1.0, 1.0), feeds(*parts), open_metric("cosine"), scaled(1.0)) == pytest.approx(float(exact))
    assert measure(scaled(3.0), feeds(*parts), open_metric("cosine"), scaled(1.0)) == pytest.approx(1.0)


def test_nothing_against_something() -> None:
    for name, worst, best in (("cosine", 0.0, 1.0), ("snr", -300.0, 300.0)):
        assert measure(scaled(0.0, 1.0), feeds(X), open_metric(name), scaled(0.0)) == worst
        assert measure(scaled(0.0), feeds(X), open_metric(name), scaled(0.0)) == best


def test_infinities_where_there_were_none_are_the_worst() -> None:
    spoilt, fine = feeds(torch.tensor([[math.inf, 1.0, 2.0, 3.0]])), feeds(X)
    assert measure(scaled(math.inf), fine, open_metric("snr"), scaled(1.0)) == -300.0
    assert measure(scaled(math.inf), fine, open_metric("cosine"), scaled(1.0)) == -1.0
    assert measure(scaled(1.0), spoilt, open_metric("snr"), scaled(1.0)) == 300.0


class Both(nn.Module):
    def __init__(self, second: float) -> None:
        super().__init__()
        self.second = second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 1.0, x * self.second


def test_the_worst_output_counts() -> None:
    good, bad = (captured(Both(second), X) for second in (1.0, 1.1))
    assert measure(bad, feeds(X), open_metric("snr"), good) == pytest.approx(20.0, abs=1e-4)


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def labelled(outputs: Tensor, labels: Any) -> tuple[Program, Dataset]:
    """A program that gives `outputs`, and they are its data."""
    given = captured(Same(), outputs)
    return given, open_data([({"x": outputs}, labels)] * 2, given)


LOGITS = torch.tensor([[0.1, 0.9, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, math.inf]])


@pytest.mark.parametrize(
    ("outputs", "labels", "expected"),
    [
        (LOGITS, [1, 0, 2, 2], 1.0),
        (LOGITS, [[1], [0], [0], [2]], 0.75),
        (LOGITS, [1, 1, -100, -100], 0.5),
        (LOGITS[:1], 1, 1.0),
        (LOGITS[None], [[1, 0, 0, 0]], 0.5),
        (LOGITS.T[None], [[1, 0, 0, 0]], 0.5),  # the class axis of a segmentation
        (torch.tensor([3, 4]), [3, 5], 0.5),
        (torch.tensor([True, False]), [1, 1], 0.5),
    ],
)
def test_accuracy(outputs: Tensor, labels: Any, expected: float) -> None:
    given, data = labelled(outputs, labels)
    assert measure(given, data.held_out, open_metric("accuracy")) == expected


class Nan(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x - x)


def test_nan_is_never_right() -> None:
    given = captured(Nan(), torch.zeros(1, 3))
    data = open_data([({"x": torch.zeros(1, 3)}, label) for label in range(10)], given)
    assert measure(given, data.fit, open_metric("accuracy")) == 0.0


@pytest.mark.parametrize(
    ("outputs", "labels", "words"),
    [
        (LOGITS, [1.0, 0.0, 2.0, 2.0], "needs integer labels"),
        (LOGITS, [1, 0, 2], r"shape \[4, 3\] gives for labels of shape \[3\]"),
        (LOGITS, [-100] * 4, "all of these are -100"),
        (torch.tensor([3, 4]), [[3, 5], [3, 5]], "cannot tell which classes"),
        (LOGITS[:, :1], [1, 0, 0, 1], "cannot tell which classes"),  # one logit: it has no largest entry
    ],
)
def test_labels_that_accuracy_cannot_use(outputs: Tensor, labels: Any, words: str) -> None:
    given, data = labelled(outputs, labels)
    with pytest.raises(UsageError, match=words):
        measure(given, data.held_out, open_metric("accuracy"))


def test_accuracy_needs_labels_and_comparisons_a_reference() -> None:
    with pytest.raises(UsageError, match="accuracy needs labels; give data of"):
        measure(scaled(1.0), feeds(X), open_metric("accuracy"))
    with pytest.raises(UsageError, match="cosine compares with another program"):
        measure(scaled(1.0), feeds(X), open_metric("cosine"))
    with pytest.raises(UsageError, match="no samples to measure on"):
        measure(scaled(1.0), feeds(), open_metric("snr"), scaled(1.0))


def test_a_function_gets_outputs_and_labels_joined() -> None:
    def mean_gap(outputs: list[Tensor], labels: Tensor) -> Tensor:
        first, classes = outputs
        assert first.shape == (6, 4) and classes.tolist() == [2, 3, 3] * 2 and labels.tolist() == [7, 7]
        return -first.sum()

    data = open_data([({"x": X}, 7)] * 10, scaled(1.0))
    assert measure(scaled(1.0), data.held_out, open_metric(mean_gap)) == -2 * float(X.sum())


def test_a_function_gets_a_list_where_sizes_differ() -> None:
    def count(outputs: list[Any], labels: None) -> int:
        assert labels is None
        return [tuple(item.shape) for item in outputs[0]] == [(1, 5, 20), (1, 7, 20)]

    data = View(Given([Sample((torch.zeros(1, size, dtype=torch.int64),)) for size in (5, 7)]), 0, 2)
    assert measure(program("tied"), data, open_metric(count)) == 1.0


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (math.nan, "gave nan"),
        (math.inf, "gave inf"),
        ([1.0], "returned list; return one number"),
        (None, "returned NoneType"),
        (torch.zeros(2), "returned Tensor"),
    ],
)
def test_a_function_must_give_one_finite_number(result: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        measure(scaled(1.0), feeds(X), open_metric(lambda outputs, labels: result))


def test_a_function_that_fails_is_named() -> None:
    def halves(outputs: Any, labels: Any) -> float:
        raise KeyError("half")

    with pytest.raises(UsageError, match="metric halves failed: KeyError: 'half'"):
        measure(scaled(1.0), feeds(X), open_metric(halves))


@pytest.mark.parametrize("metric", ["f1", 3, None, float])
def test_what_is_no_metric(metric: Any) -> None:
    with pytest.raises(UsageError, match="is neither accuracy, cosine, snr nor a function"):
        open_metric(metric)


def test_programs_of_other_output_shapes() -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:, 1:] * 1.0, x.argmax(1)

    with pytest.raises(VerificationError, match=r"output 0 has shape \[3, 3\] where .* \[3, 4\]"):
        measure(captured(Narrow(), X), feeds(X), open_metric("snr"), captured(Scale(1.0), X))


def test_no_output_is_kept() -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Watched(Given):
        def read(self, start: int, stop: int) -> Iterator[Sample]:
            for _ in range(5):
                assert sum(ref() is not None for ref in alive) <= 1  # at most what the loop itself still holds
                sample = Sample((X.clone(),), torch.tensor([2, 3, 3]))
                alive.append(weakref.ref(sample.inputs[0]))
                yield sample

    class Passing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    through = captured(Passing(), X)
    for name in ("accuracy", "cosine", "snr"):
        measure(through, View(Watched([]), 0, 5), open_metric(name), through)
    assert len(alive) == 15


def test_state_starts_anew_for_every_sample() -> None:
    counter = program("counter")
    one, two = feeds(X, X), feeds(X)
    total = open_metric(lambda outputs, labels: float(outputs[0].sum()))
    assert measure(counter, one, total) == pytest.approx(2 * measure(counter, two, total))
