"""The polynomials against float64 over everything float32 reaches, and at the edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.capture import capture
from graphopt.compile import compile
from graphopt.runtime.session import InferenceSession

FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "exp": torch.exp,
    "erf": torch.erf,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
}
ABSOLUTE = {"erf": 1e-6, "tanh": 5e-7, "sigmoid": 5e-7, "gelu": 3e-6, "gelu_tanh": 3e-6, "silu": 3e-6}


class All(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: function(x) for name, function in FUNCTIONS.items()}


@pytest.fixture(scope="module")
def session() -> InferenceSession:
    return compile(capture(All(), (torch.randn(64),), dynamic_shapes={"x": {0: "n"}})).session()


def results(session: InferenceSession, x: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [item.name for item in session.get_outputs()]
    return {name: torch.from_numpy(a) for name, a in zip(names, session.run(None, {"x": x.numpy()}), strict=True)}


def test_absolute_errors(session: InferenceSession) -> None:
    x = torch.linspace(-12, 12, 200_001)
    for name, result in results(session, x).items():
        if name in ABSOLUTE:
            error = (result.double() - FUNCTIONS[name](x.double())).abs().max()
            assert error <= ABSOLUTE[name], (name, error)


def test_exp_is_relatively_exact(session: InferenceSession) -> None:
    x = torch.linspace(-87.3, 88.7, 400_001)
    wanted = torch.exp(x.double())
    assert ((results(session, x)["exp"].double() - wanted) / wanted).abs().max() < 3e-7


def test_edges(session: InferenceSession) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 89.0, -120.0, 1e30, -1e30, 1e-40])
    for name, result in results(session, x).items():
        wanted = FUNCTIONS[name](x)
        if name.startswith("gelu"):
            wanted[1:3] = torch.tensor([torch.inf, 0.0])  # the limits; PyTorch gives NaN for some of them
        close = torch.isclose(result, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)
        assert close.all(), (name, result[~close], wanted[~close])


def test_one_score_alone(compiled: Callable[..., Any]) -> None:
    run = compiled({"log_softmax": lambda x: x.log_softmax(-1), "exp": lambda x: (x * 0).exp()}, [torch.randn(5, 1)])
    assert [value.tolist() for value in run(torch.randn(5, 1))] == [[[0.0]] * 5, [[1.0]] * 5]
