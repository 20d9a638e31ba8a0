"""What rules offer to the tuner: candidates that all compute the same, and workloads that name what matters."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.backends import cpu
from graphopt.backends.choice import MOST_CANDIDATES, Site, settings_of
from graphopt.backends.target import LEVELS, resolve_target
from graphopt.backends.tuner.bench import Bench, Workpiece, fitting
from graphopt.backends.tuner.building import Builder
from graphopt.backends.tuner.local import LocalMeasurer
from graphopt.backends.tuner.measuring import Entrant, Times
from graphopt.backends.tuner.record import Workload
from graphopt.capture import capture
from graphopt.program import Program
from graphopt.tuning import points_of

F = nn.functional
TARGET = resolve_target("cpu", 2)


class Net(nn.Module):
    """One node for each choice that rules offer, at sizes with tails in every direction."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.narrow = nn.Linear(37, 53), nn.Linear(37, 29, dtype=torch.bfloat16)
        self.minimal = nn.Conv2d(32, 40, 3, padding=1)
        self.strided = nn.Conv2d(3, 20, 5, stride=2, padding=2)
        self.grouped = nn.Conv2d(32, 24, 3, padding=1, stride=2, groups=4)
        self.depthwise = nn.Conv2d(32, 32, (5, 3), padding=(2, 1), groups=32)
        self.sequence = nn.Conv1d(19, 10, 4)
        self.recurrent = nn.LSTM(12, 16)

    def forward(
        self, rows: Tensor, image: Tensor, map: Tensor, q: Tensor, k: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        return {
            "linear": F.gelu(self.linear(rows)) + rows[..., :1],
            "narrow": self.narrow(rows.bfloat16()),
            "minimal": torch.relu(self.minimal(map)),
            "strided": self.strided(image),
            "grouped": self.grouped(map),
            "depthwise": F.hardswish(self.depthwise(map)),
            "sequence": self.sequence(image[0]),
            "recurrent": self.recurrent(rows[..., :12])[0],
            "scores": torch.tanh(q @ k.transpose(-1, -2)),
            "product": torch.bmm(q[0], k[0].transpose(-1, -2)),
            "attention": F.scaled_dot_product_attention(q, k, k, attn_mask=mask),
            "causal": F.scaled_dot_product_attention(q, k, k, is_causal=True),
        }


def program() -> Program:
    """The number of rows, of samples and of queries is open."""
    r = torch.randn
    mask = torch.rand(1, 1, 1, 90) < 0.8
    inputs = (r(3, 11, 37), r(2, 3, 19, 23), r(2, 32, 15, 17), r(2, 3, 90, 20), r(2, 3, 90, 20), mask)
    dynamic = {"rows": {0: "b", 1: "s"}, "q": {2: "keys"}, "k": {2: "keys"}, "mask": {3: "keys"}}
    return capture(Net().eval(), inputs, dynamic_shapes=dynamic)


@pytest.fixture(scope="module")
def sites() -> tuple[Program, list[Site]]:
    found = program()
    return found, cpu.lower({"main": found}, TARGET).choices.sites


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    builder, measurer = Builder(TARGET), LocalMeasurer()
    yield Bench(TARGET, builder, measurer, cold_bytes=1 << 16)
    builder.close()
    measurer.close()


def test_every_rule_with_a_choice_is_asked(sites: tuple[Program, list[Site]]) -> None:
    on_vectors = {"amx-gemm": "packed-gemm"}  # where the host has tiles, the one in bfloat16 is on them
    rules = [on_vectors.get(rule, rule) for rule in (site.made.choice.workload.rule for site in sites[1])]
    assert {rule: rules.count(rule) for rule in rules} == {
        "packed-gemm": 3,  # one is what an LSTM does with all its inputs
        "convolution": 4,
        "depthwise": 1,
        "batched-gemm": 2,
        "fused-attention": 2,
    }


def check(bench: Bench, program: Program, sites: list[Site], count: int) -> None:
    """So many candidates of each site, drawn from its whole space, against the default."""
    for site in sites:
        choice = site.made.choice
        space = choice.space()
        drawn = [space[0], *random.Random(0).sample(space[1:], min(count, len(space) - 1))]
        piece = Workpiece(site, fitting(site, points_of(program)))
        built = bench.build(piece, drawn)
        assert not [each for each in built if isinstance(each, str)], choice.workload
        results = bench.race([each for each in built if isinstance(each, Entrant)], 1, 0.0, 0.01)
        for configuration, result in zip(drawn, results, strict=True):
            assert isinstance(result, Times), (choice.workload, configuration, result)
            assert result.difference <= choice.tolerance, (choice.workload, configuration, result.difference)


@pytest.mark.slow
def test_some_candidates_compute_the_same(bench: Bench, sites: tuple[Program, list[Site]]) -> None:
    check(bench, *sites, count=1)


@pytest.mark.slow
def test_all_candidates_compute_the_same(bench: Bench, sites: tuple[Program, list[Site]]) -> None:
    check(bench, *sites, count=MOST_CANDIDATES)


@pytest.mark.parametrize("name", LEVELS)
def test_spaces_have_the_default_first_and_each_candidate_once(name: str) -> None:
    target = resolve_target(name, 4)
    for site in cpu.lower({"main": program()}, target).choices.sites:
        space = site.made.choice.space()
        settings = [tuple(sorted(settings_of(each).items())) for each in space]
        assert space[0] == site.made.choice.default == site.made.configuration and not site.made.tuned
        assert 3 < len(set(settings)) == len(space) <= MOST_CANDIDATES + 1, site.made.choice.workload


def lowered(tuned: Mapping[str, Mapping[str, Any]], found: Program) -> Any:
    """A lowering with these settings by rule."""

    def lookup(workload: Workload) -> Mapping[str, Any] | None:
        return tuned.get(workload.rule)

    return cpu.lower({"main": found}, TARGET, lookup)


def test_what_is_known_to_be_best_is_taken(sites: tuple[Program, list[Site]]) -> None:
    found, every = sites
    (site,) = (site for site in every if site.made.choice.workload.rule == "depthwise")
    other = settings_of(site.made.choice.space()[5])
    module = lowered({"depthwise": other}, found)
    (kernel,) = (info for info in module.kernels.values() if info.rule == "depthwise")
    assert kernel.configuration["tuned"] is True and kernel.configuration["pixels"] == other["pixels"]
    assert not module.choices.notes
    assert not any(info.configuration.get("tuned") for info in module.kernels.values() if info is not kernel)


@pytest.mark.parametrize(
    "change", [{"rows": 0}, {"rows": 40}, {"block_rows": 0}, {"panel_shares": True}, {"rows": "8"}, {"more": 1}, None]
)
def test_a_configuration_that_does_not_exist_is_ignored_and_noted(
    sites: tuple[Program, list[Site]], change: dict[str, Any] | None
) -> None:
    found, every = sites
    (first, *_) = (site for site in every if site.made.choice.workload.rule == "packed-gemm")
    settings = {} if change is None else settings_of(first.made.choice.default) | change
    module = lowered({"packed-gemm": settings}, found)
    assert not any(info.configuration.get("tuned") for info in module.kernels.values())
    notes = list(module.choices.notes)
    assert len(notes) == sum(site.made.choice.workload.rule == "packed-gemm" for site in every) and all(
        note.startswith("ignored a tuned configuration") for note in notes
    )


def test_a_trial_has_the_values_of_its_weights_and_leaves_nothing_behind(sites: tuple[Program, list[Site]]) -> None:
    weighed = 0
    for site in sites[1]:
        lowering, choice = site.lowering, site.made.choice
        before = dict(lowering.constants), dict(lowering.weights.arrays), dict(lowering.weights.names)
        for configuration in choice.space()[:3]:
            code, values = lowering.trial(choice, configuration)
            for storage, value in zip(code.inputs, values, strict=True):
                assert value is None or value.shape == storage.shape
                weighed += value is not None
        assert (lowering.constants, lowering.weights.arrays, lowering.weights.names) == before
    assert weighed > 20


def test_equal_work_is_one_workload_and_other_work_another() -> None:
    def keys(module: nn.Module, *inputs: Tensor) -> list[str]:
        found = capture(module.eval(), inputs)
        return [site.made.choice.workload.key for site in cpu.lower({"main": found}, TARGET).choices.sites]

    x = torch.randn(8, 16)
    (one,) = keys(nn.Linear(16, 24), x)
    assert keys(nn.Linear(16, 24), x) == [one] and keys(nn.Sequential(nn.Flatten(), nn.Linear(16, 24)), x) == [one]
    others = [
        nn.Linear(16, 25),
        nn.Sequential(nn.Linear(16, 24), nn.ReLU()),
        nn.Sequential(nn.Linear(16, 24), nn.Tanh()),
    ]
    found = [key for other in others for key in keys(other, x)] + keys(nn.Linear(16, 24), torch.randn(9, 16))
    assert len({one, *found}) == 5
