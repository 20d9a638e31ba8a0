from __future__ import annotations

import torch
from torch import nn

from graphopt.checking.evidence import make_samples
from graphopt.checking.samples import draw_samples
from tests.passes.checking import captured


class Last(nn.Module):
    """The entry before position n of every row."""

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return x[torch.arange(x.shape[0]), n - 1]


class Pooled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(x, 3, 2, ceil_mode=True)


def test_positions_stay_within_smaller_axes() -> None:
    inputs = (torch.randn(3, 6, 4), torch.tensor([6, 5, 2]))
    program = captured(Last(), *inputs, dynamic={"x": {0: "batch", 1: "seq"}, "n": {0: "batch"}})
    drawn, skipped = draw_samples(program, seed=0)
    assert [item.sizes["seq"] for item in drawn] == [6, 1, 5] and not skipped


def test_sizes_that_pytorch_cannot_run_are_skipped_and_said() -> None:
    program = captured(Pooled(), torch.randn(1, 1, 9, 9), dynamic={"x": {2: "height"}})
    samples, skipped = make_samples(program, seed=0)
    assert [sample.inputs[0].shape[2] for sample in samples] == [9, 9, 7]
    (sentence,) = skipped
    assert sentence.startswith("not checked with height=1: PyTorch cannot run it")


class MeanOfMasked(nn.Module):
    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        weights = attention_mask.float()[..., None]
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


class Running(nn.Module):
    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.total.sin() + x
        self.total.add_(x)
        return result


class Rounded(nn.Module):
    """An index that is 2 in float32 and 3, out of range, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[(x * 0 + 2.0**24 + 1 - 2.0**24 + 2).long()] * x[..., None]


def test_masks_are_also_empty() -> None:
    program = captured(MeanOfMasked(), torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.int64))
    samples = make_samples(program, seed=0)[0]
    assert samples[-1].label == "drawn inputs with masks of zeros" and not samples[-1].inputs[1].any()
    assert samples[-1].inputs[0].any() and samples[0].inputs[1].all()


def test_programs_with_state_are_called_again() -> None:
    x = torch.ones(3)
    first, second = make_samples(captured(Running(), x), seed=0)[0][:2]
    assert second.label == "the example inputs, called again"
    assert torch.equal(first.reference[0], x.double()) and torch.equal(second.reference[0], x.double().sin() + x)
    assert torch.equal(second.reference[1], 2 * x.double())


def test_what_float64_cannot_index_is_held_against_its_own_results() -> None:
    program = captured(Rounded(), torch.rand(2))
    samples, skipped = make_samples(program, seed=0)
    assert len(samples) == 2 and not skipped
    assert torch.equal(samples[0].reference[0], program(*program.examples)[0].double())
