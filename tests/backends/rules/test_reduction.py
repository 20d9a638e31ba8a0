"""Reductions in memory order: permuted operands, pieces of long ones, tails of columns, threads."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.capture import capture

Check = Callable[..., Any]
CASES: dict[str, Callable[[Tensor], Any]] = {
    "channels": lambda x: x.permute(0, 3, 1, 2).mean((2, 3)),
    "channels_kept": lambda x: x.permute(0, 3, 1, 2).amax((2, 3), keepdim=True),
    "over_channels": lambda x: x.permute(0, 3, 1, 2).sum(1),
    "over_batch": lambda x: x.permute(3, 2, 1, 0).sum(3),
    "statistics": lambda x: torch.var_mean(x.permute(0, 3, 1, 2), (0, 2, 3)),
    "slice": lambda x: x[:, 1:, ::2].sum((1, 2)),
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1).sum((1, 3)),
    "position": lambda x: x.permute(0, 3, 1, 2).argmax(1),
    "lazy": lambda x: (x.permute(0, 3, 1, 2) * x.permute(0, 3, 1, 2).mean((2, 3), keepdim=True)).sum((0, 1)),
    "running": lambda x: x.permute(0, 3, 1, 2).cumsum(1),
    "running_rows": lambda x: x.permute(0, 3, 1, 2).cumsum(3),
    "running_first": lambda x: x.cumsum(0),
}


@pytest.mark.parametrize("channels", [3, 37])
def test_memory_order(agree: Check, channels: int) -> None:
    agree(CASES, [torch.randn(2, 5, 6, channels)], atol=1e-5)


def test_memory_order_of_symbolic_images(agree: Check) -> None:
    names = ("channels", "over_channels", "statistics", "position", "running_rows")
    more = [(torch.randn(1, 9, 1, 20),), (torch.randn(3, 4, 8, 20),)]
    cases = {name: CASES[name] for name in names}
    agree(cases, [torch.randn(2, 5, 6, 20)], [{0: "b", 1: "h", 2: "w"}], more, atol=1e-5)


LONG: dict[str, Callable[[Tensor], Any]] = {
    "columns": lambda x: x.sum(0),
    "rows": lambda x: x[:3].amax(1),
    "all": lambda x: x.mean(),
    "lowest": lambda x: x.min(),
    "few_columns": lambda x: x[:, :2].reshape(-1, 1201, 2).amin(1),
}

OTHER_TYPES: dict[str, Callable[[Tensor], Any]] = {
    "integers": lambda x: (x > 0).sum(-1),
    "doubles": lambda x: x.double().prod(2),
    "any": lambda x: (x > 1).any(1),
}


def test_pieces_of_long_reductions_at_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling = importlib.import_module("graphopt.compile")
    monkeypatch.setattr(compiling, "check_session", lambda *_: {})

    class Long(torch.nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [case(x) for case in LONG.values()]

    x = torch.randn(1201, 67)
    program = capture(Long(), (x,))
    feed = {program.inputs[0].name: x.numpy()}
    one, two, three = (compiling.compile(program, threads=n).session().run(None, feed) for n in (1, 2, 3))
    for a, b, c, want in zip(one, two, three, program(x), strict=True):
        assert (a == b).all() and (a == c).all()
        torch.testing.assert_close(torch.from_numpy(a), want, rtol=1e-5, atol=1e-4)


def test_no_kernel_is_slow(compiled: Callable[..., Any]) -> None:
    run = compiled({**CASES, **OTHER_TYPES}, [torch.randn(2, 5, 6, 3)])
    assert run.artifact.report["slow"] == []
