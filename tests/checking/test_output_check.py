"""What a compiled program is checked on; PyTorch plays the session, so nothing is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.checking.output_check import check_cases, check_session
from graphopt.errors import VerificationError
from graphopt.program import Program
from graphopt.runtime.session import InferenceSession
from tests import models
from tests.passes.checking import captured


class Plays:
    """Runs a program as a session would."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def reset(self) -> None:
        pass

    def run(self, names: None, feed: Mapping[str, np.ndarray], entry: str) -> list[np.ndarray]:
        return [value.numpy() for value in self.program(*(torch.from_numpy(array) for array in feed.values()))]


def session(program: Program) -> InferenceSession:
    return cast(InferenceSession, Plays(program))


class Guarded(nn.Module):
    """Takes its second branch only where every value is negative."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.max() > 0, lambda x: x + 1, lambda x: x * self.factor, (x,))


def guarded(factor: float) -> Program:
    return captured(Guarded(factor), torch.rand(32) + 3)


def test_a_wrong_branch_that_the_examples_leave_out_is_found() -> None:
    right, wrong = guarded(2.0), guarded(3.0)
    assert check_session(session(right), {"main": right})["main"].error < 1e-6
    with pytest.raises(VerificationError, match=r"output 'output' of entry 'main' .* is off by"):
        check_session(session(wrong), {"main": right})


class Unreachable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond((x * x).sum() < -1, lambda x: x.sin(), lambda x: x.cos(), (x,))


def test_what_cannot_be_checked_is_said() -> None:
    program = captured(Unreachable(), torch.rand(3))
    check = check_session(session(program), {"main": program})["main"]
    assert check.unchecked == ("not checked: the true branch of cond",)


def test_a_program_without_conditions_is_checked_on_examples_and_drawn_inputs() -> None:
    program = models.program("mlp")
    cases, unchecked = check_cases(program)
    assert len({case.sizes["batch"] for case in cases}) == 3 and not unchecked


def test_a_shape_that_is_not_pytorchs_is_found() -> None:
    class Flat(Plays):
        def run(self, names: None, feed: Mapping[str, np.ndarray], entry: str) -> list[Any]:
            return [array.reshape(-1) for array in super().run(names, feed, entry)]

    program = models.program("mlp")
    with pytest.raises(VerificationError, match="where PyTorch gives"):
        check_session(cast(InferenceSession, Flat(program)), {"main": program})
