"""Random models through capture, every pass, files and compiled code.

`make test-slow` runs as many as there is time for; `python -m tests.fuzz own 0 700` and `nnsmith 0 300` are a thousand.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from graphopt.contract import PassContext, PassResult
from graphopt.passes.no_op_removal import NoOpRemoval
from graphopt.program import Program
from tests.fuzz.check import Outcome, check
from tests.fuzz.generator import Case, generate
from tests.fuzz.judge import verdicts
from tests.fuzz.nnsmith_models import generate as generate_nnsmith
from tests.fuzz.workers import describe, run_seeds, table

CHUNK = 25
CHUNKS = [*(("own", first) for first in range(0, 400, CHUNK)), *(("nnsmith", first) for first in range(0, 150, CHUNK))]
REFUSED = 0.2  # the largest share of seeds that may end in a typed refusal


def check_outcomes(outcomes: list[Outcome]) -> None:
    failures = describe(outcomes)
    assert not failures, f"{table(outcomes)}\n{failures}"
    refused = [f"{item.seed}: {item.detail}" for item in outcomes if item.kind == "refused"]
    assert len(refused) <= max(REFUSED * len(outcomes), 8), refused


@pytest.mark.parametrize(("name", "first", "end"), [("own", 1000, 1003), ("nnsmith", 1000, 1002)])
def test_some_seeds(name: str, first: int, end: int) -> None:
    outcomes = run_seeds(name, first, end)
    assert [item.seed for item in outcomes] == list(range(first, end))
    check_outcomes(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "first"), CHUNKS)
def test_hundreds_of_seeds(name: str, first: int) -> None:
    outcomes = run_seeds(name, first, first + CHUNK)
    assert len(outcomes) == CHUNK
    check_outcomes(outcomes)


@pytest.mark.parametrize("make", [generate, generate_nnsmith])
def test_a_seed_is_one_model(make: Callable[[int], Case]) -> None:
    first, second, other = make(3), make(3), make(4)
    assert first.text == second.text != other.text
    pairs = [pair for one, two in zip(first.inputs, second.inputs, strict=True) for pair in zip(one, two, strict=True)]
    assert all(torch.equal(one, two) for one, two in pairs)


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x * 2, torch.floor(x), x > 0


def test_the_judge_sees_an_element_that_is_off_by_little() -> None:
    x = torch.tensor([0.3, 1.5, -2.0])
    (verdict,) = verdicts(Doubled(), [(x,)])
    right = Doubled()(x)
    assert verdict.fault(right) is None
    for wrong in (
        (right[0] + torch.tensor([0.0, 0.0, 1e-3]), right[1], right[2]),
        (right[0], right[1] + 1, right[2]),
        (right[0], right[1], ~right[2]),
        (right[0].double(), right[1], right[2]),
        (torch.full((3,), torch.nan), right[1], right[2]),
    ):
        assert verdict.fault(wrong) is not None


class Steep(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.floor(x * 3 / 3),)


def test_the_judge_allows_what_rounding_decides() -> None:
    x = torch.tensor([1.0, 1.5])
    (verdict,) = verdicts(Steep(), [(x,)])
    assert verdict.unstable
    assert verdict.fault((torch.tensor([0.0, 1.0]),)) is None
    assert verdict.fault((torch.tensor([1.0, 2.0]),)) is not None


class Sine(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.sin(x),)


def test_a_wrong_pass_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that turns sine into cosine."""

    def run(self: NoOpRemoval, program: Program, context: PassContext) -> PassResult:
        changed = program.copy()
        for node in changed.nodes():
            if node.target is torch.ops.aten.sin.default:
                node.target = torch.ops.aten.cos.default
        changed.graph_module.recompile()
        return PassResult(changed)

    monkeypatch.setattr(NoOpRemoval, "run", run)
    outcome = check("own", 1, lambda seed: Case(Sine(), ((torch.rand(4),),), {}, ""))
    assert (outcome.kind, outcome.stage) == ("mismatch", "no-op-removal"), outcome
