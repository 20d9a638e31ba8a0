"""Whole models in bfloat16 against PyTorch's bfloat16, both measured by a float32 run of the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.arrays import array_of, tensor_of
from graphopt.tools.subject import program_subject
from tests import models

Build = Callable[..., Any]
_FACTOR = 2.0  # how much farther from float32 than PyTorch's own bfloat16


class Network(nn.Module):
    """Every kind of convolution that has a kernel of its own, pooling, a norm and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, stride=2)
        self.minimal = nn.Conv2d(32, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.pointwise = nn.Conv2d(32, 24, 1)
        self.norm = nn.GroupNorm(4, 24)
        self.head = nn.Linear(24, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.minimal(nn.functional.silu(self.stem(image))))
        x = self.norm(self.pointwise(self.depthwise(x)) + 0.5)
        return torch.softmax(self.head(nn.functional.max_pool2d(x, 2).mean((2, 3))), -1)


def narrowed(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)


def network() -> models.Case:
    torch.manual_seed(0)
    return Network().eval(), (torch.randn(2, 3, 20, 20),), {}


@pytest.mark.parametrize("make", [models.bert, network], ids=["bert", "network"])
def test_a_model_is_as_close_to_float32_as_in_pytorch(make: Callable[[], models.Case], compiled: Build) -> None:
    module, inputs, _ = make()
    inputs = narrowed(inputs)
    module = module.bfloat16()
    run = compiled(module, inputs)
    (found,), (eager,) = run(*inputs), run.program(*inputs)
    exact = module.float()(*(x.float() if x.is_floating_point() else x for x in inputs))
    exact = next(iter(exact.values())) if isinstance(exact, dict) else exact
    assert found.dtype == eager.dtype == torch.bfloat16
    own, theirs = (found.float() - exact).norm(), (eager.float() - exact).norm()
    assert 0 < own <= _FACTOR * theirs
    assert torch.isfinite(found).all()


def test_weights_inputs_and_outputs_keep_the_dtype(compiled: Build) -> None:
    """Half the bytes of float32; NaN, infinities and both zeros go in as bits and come out as float32."""
    run = compiled(nn.Linear(64, 48, bias=False).bfloat16(), [torch.randn(5, 64).bfloat16()])
    weights = [array for array in run.artifact.weights.values() if array.size >= 64 * 48]
    assert [array.dtype for array in weights] == [ml_dtypes.bfloat16]
    (entry,) = run.artifact.manifest.entries.values()
    assert [item.dtype for item in (*entry.inputs, *entry.outputs)] == ["bfloat16", "bfloat16"]
    assert run.session.get_inputs()[0].type == "tensor(bfloat16)"
    x = array_of(torch.randn(5, 64).bfloat16())
    (result,) = run.session.run(None, {run.program.inputs[0].name: x})
    (again,) = run.session.run(None, {run.program.inputs[0].name: x.view(np.uint16)})
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, again)


def test_every_number_is_rounded_as_pytorch_rounds_it(compiled: Build) -> None:
    """Ties to even, overflow to infinity, NaN of every kind kept, in vectors and in what is left of a row."""
    bits = torch.cat([torch.arange(0, 1 << 16, 257), torch.tensor([0x7F7F, 0x7F80, 0x7F81, 0x7FFF, 0xFFC1, 0xFF80])])
    exact = (bits << 16) + torch.tensor([[0x0000], [0x7FFF], [0x8000], [0x8001], [0xFFFF]])
    x = exact.to(torch.int32).view(torch.float32)
    x = torch.where(x.abs() < 2e-38, torch.zeros_like(x), x)  # denormals are 0 in compiled code
    (found,) = compiled({"round": lambda x: x.bfloat16()}, [x])(x)
    torch.testing.assert_close(found, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(found) | found.isnan(), torch.signbit(x) | x.isnan())


def test_each_operator_rounds_its_result(compiled: Build) -> None:
    """A chain in one kernel gives the very bits of PyTorch, which stores every step."""
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 3e38, -3e38, 1.0])
    x = torch.cat([special, torch.randn(60)]).bfloat16()
    y = torch.cat([torch.ones(7), torch.randn(60)]).bfloat16()
    cases = {
        "chain": lambda x, y: ((x + y) * y - x / 3).relu() * 1.01,
        "compare": lambda x, y: torch.where(x + y > y, x * y, y - x),
        "shared": lambda x, y: (x * y) * (x * y) + (x * y),
        "mixed": lambda x, y: (x * y).float() + y,
    }
    run = compiled(cases, [x, y])
    for found, want in zip(run(x, y), run.program(x, y), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


def test_order_and_choice(agree: Callable[..., Any]) -> None:
    def rows(count: int) -> Tensor:
        return torch.stack([torch.randperm(33) for _ in range(count)]).bfloat16() / 8 - 2

    cases = {
        "sort": lambda x: x.sort(-1),
        "topk": lambda x: x.topk(5, -1),
        "argmax": lambda x: x.argmax(-1),
        "embedding": lambda x: nn.functional.embedding(torch.tensor([[1, 0], [5, 2]]), x.t().contiguous()),
        "transposed": lambda x: x.t().contiguous() + 1,
        "sums": lambda x: (x.sum(0), x.mean(-1), x.amax((0, 1)), x.cumsum(1), x.var(-1)),
        "branch": lambda x: torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,)),
    }
    agree(cases, [rows(6)], [{0: "rows"}], [(rows(1),), (rows(11),)])


def test_weights_that_a_program_widens(compiled: Build) -> None:
    """bfloat16 weights behind a cast: the artifact holds them narrow or wide, and numbers are those of float32."""

    class Widened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 24).bfloat16())

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.float())

    x = torch.randn(3, 24)
    run = compiled(Widened(), [x])
    torch.testing.assert_close(run(x)[0], run.program(x)[0], rtol=2e-5, atol=2e-6)


def test_state_and_samples_are_kept(tmp_path: Any) -> None:
    class Sum(nn.Module):
        total: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(4, dtype=torch.bfloat16))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.total.add_(x)
            return self.total * 2, self.total.sum()

    artifact = graphopt.compile(graphopt.capture(Sum(), (torch.ones(4).bfloat16(),)), threads=1)
    artifact.save(tmp_path / "sum.gopt")
    session = graphopt.load(tmp_path / "sum.gopt")
    inputs, expected = session.samples()
    for number in (1, 2, 3):
        result, total = session.run(None, inputs)
        assert tensor_of(result, torch.bfloat16).tolist() == [2.0 * number] * 4
        assert total.shape == () and total == 4 * number
    assert [value.tolist() for value in expected.values()] == [[2.0] * 4, 4.0]


def test_what_compare_runs_takes_and_gives_what_a_session_does() -> None:
    program = graphopt.capture(nn.Linear(8, 4).bfloat16(), (torch.randn(3, 8).bfloat16(),))
    subject = program_subject(program)
    feed = subject.draw({}, 0)
    (name,) = feed
    ((output, result),) = subject.run(feed).items()
    (bits,) = subject.run({name: feed[name].view(np.uint16)}).values()
    (numbers,) = subject.run({name: feed[name].astype(np.float32)}).values()
    assert feed[name].dtype == ml_dtypes.bfloat16
    assert result.dtype == np.float32 and output == program.outputs[0].name
    np.testing.assert_array_equal(result, bits)
    np.testing.assert_array_equal(result, numbers)
