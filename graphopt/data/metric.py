"""How good a program is on data, as one number of which more is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from graphopt.checking.reference import widen
from graphopt.checking.samples import CANNOT_RUN
from graphopt.data.dataset import Sample, View
from graphopt.errors import UsageError, VerificationError
from graphopt.program import Program

Outputs = tuple[torch.Tensor, ...]
_NAMES = ("accuracy", "cosine", "snr")
_IGNORED = -100  # the label that torch's cross entropy leaves out, too
_MOST_DECIBELS = 300.0  # float64 itself ends near 313


class Score(Protocol):
    """One measurement under way."""

    def update(self, outputs: Outputs, reference: Outputs, label: torch.Tensor | None) -> None: ...

    def result(self) -> float: ...


@dataclass(frozen=True)
class Metric:
    """`start` begins a measurement; `compares` is whether it needs what another program gives for the same samples."""

    name: str
    start: Callable[[], Score]
    compares: bool = False


def open_metric(metric: Any) -> Metric:
    """The metric that `metric` means: "accuracy", "cosine", "snr", or a callable(outputs, labels) -> float.

    - accuracy: the share of labels that the largest entry of the first output names, along its last axis where the
      other axes are the label's, else along axis 1. Labels of -100 are left out; an output of integers or booleans is
      taken for classes already; NaN is wrong.
    - cosine: of the angle between the outputs of the two programs, each output over all samples one vector.
    - snr: 10 log10(signal power / noise power) in dB over all samples, from -300 to 300, where nothing differs.
      Both compare floating-point outputs and give the number of the worst one. Infinities and NaN in the same
      places of both are left out; others make the output the worst possible.
    - A callable gets a list with one tensor an output, the samples joined along the first axis (scalars stacked), or a
      list of one tensor a sample where the other sizes differ; labels likewise, None without any. More is better. It
      is the only one for which all outputs are kept in memory.

    Raises UsageError for anything else.
    """
    if isinstance(metric, str) and metric in _NAMES:
        starts: dict[str, Callable[[], Score]] = {"accuracy": _Accuracy, "cosine": _Cosine, "snr": _SignalToNoise}
        return Metric(metric, starts[metric], compares=metric != "accuracy")
    if callable(metric) and not isinstance(metric, type):
        name = str(getattr(metric, "__name__", type(metric).__name__))
        return Metric(name, lambda: _Called(metric, name))
    given = repr(metric) if isinstance(metric, (str, type)) else type(metric).__name__
    raise UsageError(
        f"metric {given} is neither {', '.join(_NAMES)} nor a function (outputs, labels) -> float; give one"
    )


def measure(program: Program, samples: View, metric: Metric, reference: Program | None = None) -> float:
    """`metric` of `program` over `samples`, each run from the initial state; more is better.

    `reference` is the program as it came in; cosine and snr compare with it. Raises UsageError where there are no
    samples, labels or reference, or no finite number comes out; VerificationError where a program cannot run.
    """
    if metric.compares and reference is None:
        raise UsageError(f"{metric.name} compares with another program; give the one that came in as reference")
    if not len(samples):
        raise UsageError(
            "there are no samples to measure on; give data of at least two feeds, the last fifth is held out"
        )
    score = metric.start()
    for index, sample in enumerate(samples):
        outputs = _run(program, sample, index)
        expected = _run(reference, sample, index) if metric.compares and reference is not None else ()
        score.update(outputs, expected, sample.label)
    result = score.result()
    if not math.isfinite(result):
        raise UsageError(
            f"metric {metric.name} gave {result}, from which nothing can be judged; return a finite number"
        )
    return result


def _run(program: Program, sample: Sample, index: int) -> Outputs:
    try:
        return program(*sample.inputs)[: len(program.answers)]
    except CANNOT_RUN as e:
        raise VerificationError(f"{program.name} cannot run sample {index} of the data: {e}") from e


class _Accuracy:
    def __init__(self) -> None:
        self.right = 0
        self.count = 0

    def update(self, outputs: Outputs, reference: Outputs, label: torch.Tensor | None) -> None:
        if label is None:
            raise UsageError("accuracy needs labels; give data of (dict, label) items or with an array 'label'")
        if label.is_floating_point() or label.is_complex():
            raise UsageError(f"accuracy needs integer labels, these are {label.dtype}; write label.astype('int64')")
        output = outputs[0]
        right = _predicts(output, label.to(torch.int64)) & (label != _IGNORED).reshape(-1)
        self.right += int(right.sum())
        self.count += int((label != _IGNORED).sum())

    def result(self) -> float:
        if not self.count:
            raise UsageError(f"accuracy needs labels, and all of these are {_IGNORED}, which is left out; give others")
        return self.right / self.count


def _predicts(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Whether each label is what the output says, flat."""
    if not output.is_floating_point():
        if _squeezed(output.shape) == _squeezed(label.shape):
            return output.reshape(-1).to(torch.int64) == label.reshape(-1)
    else:
        for axis in (output.dim() - 1, 1):
            exists = output.dim() > axis >= 0 and output.shape[axis] > 1
            if exists and _squeezed(output.shape, axis) == _squeezed(label.shape):
                wrong = output.isnan().any(axis).reshape(-1)
                return (output.argmax(axis).reshape(-1) == label.reshape(-1)) & ~wrong
    raise UsageError(
        f"accuracy cannot tell which classes an output of shape {list(output.shape)} gives for labels of shape "
        f"{list(label.shape)}; give labels of the output's shape without the class axis, or a metric of your own"
    )


def _squeezed(shape: Sequence[int], left_out: int | None = None) -> list[int]:
    return [size for axis, size in enumerate(shape) if size != 1 and axis != left_out]


class _Sums:
    """Running sums over one output of two programs."""

    def __init__(self) -> None:
        self.product = self.own = self.other = self.noise = 0.0
        self.broken = False

    def add(self, result: torch.Tensor, reference: torch.Tensor) -> None:
        left, right = _flat(result), _flat(reference)
        finite = left.isfinite() & right.isfinite()
        same = (left == right) | (left.isnan() & right.isnan())
        self.broken |= not bool((finite | same).all())
        left, right = left[finite], right[finite]
        self.product += float(left @ right)
        self.own += float(left @ left)
        self.other += float(right @ right)
        self.noise += float((left - right).square().sum())


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    wide: torch.Tensor = widen(tensor)
    wide = wide.double() if not wide.is_complex() else torch.view_as_real(wide.resolve_conj())
    return wide.reshape(-1)


class _Comparison:
    """The worst floating-point output of a program against the same one of another."""

    worst = -1.0

    def __init__(self) -> None:
        self.sums: dict[int, _Sums] = {}

    def update(self, outputs: Outputs, reference: Outputs, label: torch.Tensor | None) -> None:
        for index, (result, expected) in enumerate(zip(outputs, reference, strict=True)):
            if result.shape != expected.shape:
                raise VerificationError(
                    f"output {index} has shape {list(result.shape)} where the program that came in gives "
                    f"{list(expected.shape)}"
                )
            if expected.is_floating_point() or expected.is_complex():
                self.sums.setdefault(index, _Sums()).add(result, expected)

    def result(self) -> float:
        if not self.sums:
            raise UsageError("cosine and snr compare floating-point outputs, and there are none; give another metric")
        return min(self.worst if sums.broken else self.of(sums) for sums in self.sums.values())

    def of(self, sums: _Sums) -> float:
        raise NotImplementedError


class _Cosine(_Comparison):
    def of(self, sums: _Sums) -> float:
        if not sums.own or not sums.other:
            return 1.0 if sums.own == sums.other else 0.0
        return max(-1.0, min(1.0, sums.product / math.sqrt(sums.own) / math.sqrt(sums.other)))


class _SignalToNoise(_Comparison):
    worst = -_MOST_DECIBELS

    def of(self, sums: _Sums) -> float:
        if not sums.noise:
            return _MOST_DECIBELS
        if not sums.other:
            return -_MOST_DECIBELS
        ratio = 10.0 * (math.log10(sums.other) - math.log10(sums.noise))
        return max(-_MOST_DECIBELS, min(_MOST_DECIBELS, ratio))


class _Called:
    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function = function
        self.name = name
        self.outputs: list[Outputs] = []
        self.labels: list[torch.Tensor] = []

    def update(self, outputs: Outputs, reference: Outputs, label: torch.Tensor | None) -> None:
        self.outputs.append(outputs)
        if label is not None:
            self.labels.append(label)

    def result(self) -> float:
        outputs = [_joined(parts) for parts in zip(*self.outputs, strict=True)]
        labels = _joined(self.labels) if self.labels else None
        try:
            value = self.function(outputs, labels)
        except Exception as e:
            raise UsageError(f"metric {self.name} failed: {type(e).__name__}: {e}; run it alone to see where") from e
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as e:
            raise UsageError(f"metric {self.name} returned {type(value).__name__}; return one number") from e


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    """One tensor along the first axis, or the parts where their other sizes differ."""
    if all(part.dim() == 0 for part in parts):
        return torch.stack(list(parts))
    inner = {part.shape[1:] if part.dim() else None for part in parts}
    return torch.cat(list(parts)) if len(inner) == 1 else list(parts)
