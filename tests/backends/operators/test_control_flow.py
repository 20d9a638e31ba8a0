"""`torch.cond` in compiled code: only the branch taken runs, fused as the main graph is; state through a session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import models

Check = Callable[..., Any]


class Gated(nn.Module):
    """Each side is a linear layer with an element-wise tail, so one kernel; two outputs, one of them another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(8, 32), nn.Linear(8, 32)
        self.shift = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def large(v: Tensor) -> tuple[Tensor, Tensor]:
            y = F.gelu(self.large(v)) * 2 + self.shift
            return y, y.sum(-1)

        def small(v: Tensor) -> tuple[Tensor, Tensor]:
            return torch.relu(self.small(v)) + self.shift, v.sum(-1)

        first, second = torch.cond(x.sum() > 0, large, small, (x,))
        return first + 1, second


def test_branches(agree: Check) -> None:
    """Each side is packed and fused; the kernels of the other side are never called."""
    module, examples, _ = models.branching()
    positive = torch.rand(5, 8)
    run = agree(module, examples, [{0: "batch"}], [(positive,), (-positive,), (-positive[:1],)])
    rules = list(run.artifact.report["kernels"].values())
    assert rules.count("packed-gemm") == 3  # large: two, with bias and relu inside; small: one
    assert len(rules) <= 7, rules  # besides: the sum in two steps, its sign, the relu after the branches
    name = run.program.inputs[0].name
    profiles = [run.session.profile({name: x.numpy()}, rounds=2) for x in (positive, -positive)]
    many, few = (sum(count for count, _ in profile.values()) for profile in profiles)
    assert many == few + 1


def test_branches_with_several_results(agree: Check) -> None:
    x = torch.rand(3, 8)
    run = agree(Gated().eval(), [x], [{0: "batch"}], [(-x,), (x[:1],), (-torch.rand(17, 8),)])
    assert list(run.artifact.report["kernels"].values()).count("packed-gemm") == 2
    assert not run.artifact.report["slow"]


def test_nested_conditions(agree: Check) -> None:
    def inner(v: Tensor) -> Tensor:
        return torch.cond(v[0, 0] > 1, lambda t: t * 2, lambda t: t - 5, (v,))

    cases = {"nested": lambda x: torch.cond(x.sum() > 0, inner, lambda v: v.cumsum(-1), (x,))}
    x = torch.rand(2, 3)
    agree(cases, [x], None, [(x + 2,), (-x,)])


def test_no_memory_is_shared_between_branches(agree: Check) -> None:
    """Values of one branch that are stored must not lie where only the other branch allocates."""

    def times(count: int) -> Callable[[Tensor], Tensor]:
        def apply(v: Tensor) -> Tensor:
            for _ in range(count):
                v = v.softmax(-1)
            return v

        return apply

    def sequence(x: Tensor) -> Tensor:
        first = torch.cond(x.sum() > 0, times(2), times(4), (x,))
        return torch.cond(first[0, 0] > x[0, 0], times(3), times(2), (times(2)(first),))

    x = torch.rand(2, 3)
    agree({"sequence": sequence}, [x], [{0: "batch"}], [(-x,), (x + 1,)])


def test_state_lives_from_call_to_call(compiled: Callable[..., Any]) -> None:
    module, examples, _ = models.counter()
    run = compiled(module, examples, [{0: "batch"}])
    for rows in (3, 1, 4):
        x = torch.randn(rows, 4)
        with torch.no_grad():
            want = module(x)
        (result,) = run(x)
        assert torch.allclose(result, want, atol=1e-6)
    run.session.reset()
    assert torch.allclose(run(torch.ones(1, 4))[0], torch.full((1, 4), 2.0))


class Window(nn.Module):
    """A rolling buffer: the new state is a view of a concatenation."""

    recent: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("recent", torch.zeros(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.recent.copy_(torch.cat([self.recent[1:], x[None]]))
        return self.recent.mean(0)


def test_state_that_reads_itself(compiled: Callable[..., Any]) -> None:
    module = Window()
    run = compiled(module, [torch.randn(3)])
    for _ in range(6):
        x = torch.randn(3)
        assert torch.allclose(run(x)[0], module(x), atol=1e-6)
