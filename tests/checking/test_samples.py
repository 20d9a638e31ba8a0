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
