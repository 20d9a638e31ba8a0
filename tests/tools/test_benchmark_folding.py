"""The folding suite: what it makes of its points, and one small network through all of it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.tools.benchmarking import folding, folding_cases
from graphopt.tools.benchmarking.english_text import LONGEST, SHORTEST, sentences
from graphopt.tools.benchmarking.folding_cases import FoldingCase, Subject, agreement
from tests.tools.conftest import Cli

PNG = b"\x89PNG\r\n\x1a\n"
WIDTH = 12


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def subject() -> Subject:
    torch.manual_seed(0)
    program = graphopt.capture(Stack().eval(), (torch.randn(2, WIDTH),), dynamic_shapes={"x": {0: "batch"}})
    figures = partial(agreement, program)
    data = [{"x": torch.randn(8, WIDTH)} for _ in range(15)]
    return Subject(program, data, "cosine", figures, (torch.randn(1, WIDTH),), "noise")


def test_the_suite_end_to_end(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(folding_cases.CASES, "stack", FoldingCase("stack", subject, most=2, heal_steps=12))
    words = ["--models", "stack", "--rounds", "3", "--threads", "1"]
    files = ["--json", "f.json", "--chart", "f.png", "--markdown", "f.md"]
    outcome = cli("benchmark", "--suite", "folding", *words, *files)
    assert outcome.code in (0, 1), outcome.err  # 1: so short a run need not fall on a line
    (model,) = json.loads((tmp_path / "f.json").read_text())["models"]
    points = {(point["kept"], point["variant"]): point["figures"] for point in model["points"]}
    assert list(points) == [(4, "whole"), (3, "as folded"), (3, "healed"), (2, "as folded"), (2, "healed")]
    assert points[4, "whole"] == pytest.approx({"cosine": 1.0, "spearman": 1.0})
    for kept in (3, 2):
        assert points[kept, "as folded"]["cosine"] < points[kept, "healed"]["cosine"] < 1
    assert [item["kept"] for item in model["latency"]] == [4, 3, 2]
    assert all(item["milliseconds"] > 0 for item in model["latency"])
    assert (tmp_path / "f.png").read_bytes().startswith(PNG)
    assert "| stack | 3 | healed |" in (tmp_path / "f.md").read_text()
    assert "as folded" in outcome.out and "recovered" in outcome.out


def test_points_on_a_line() -> None:
    (constant, slope), deviation = folding.straight_line([6, 5, 4], [0.013, 0.011, 0.009])
    assert (constant, slope, deviation) == pytest.approx((0.001, 0.002, 0.0), abs=1e-9)
    assert folding.straight_line([6, 5, 4], [0.013, 0.010, 0.009])[1] > 0.05


def test_what_healing_recovers_is_a_share_of_what_was_lost() -> None:
    measured = [
        (6, "whole", 1.0),
        (5, "as folded", 0.9),
        (5, "healed", 0.97),
        (4, "as folded", 1.0),
        (4, "healed", 1.0),
    ]
    points = [{"kept": kept, "variant": variant, "figures": {"cosine": value}} for kept, variant, value in measured]
    assert folding.recovered({"points": points}) == pytest.approx({5: 0.7})


def test_ranks_do_not_depend_on_scale_and_turn_with_the_order() -> None:
    rows = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), dim=-1)

    class Given(nn.Module):
        def __init__(self, power: float) -> None:
            super().__init__()
            self.power = power

        def forward(self, x: Tensor) -> Tensor:
            return x * self.power

    one, other = (graphopt.capture(Given(power), (rows,)) for power in (1.0, 3.0))
    data = graphopt.data.dataset.open_data([{"x": rows}, {"x": rows}], one)
    assert agreement(one, other, data.held_out) == pytest.approx({"cosine": 1.0, "spearman": 1.0})
    ranks = folding_cases._ranks(torch.tensor([0.3, 0.1, 0.2]))
    assert ranks.tolist() == [2.0, 0.0, 1.0]


def test_english_is_the_same_every_time_and_is_prose() -> None:
    found = sentences()
    assert len(found) == len(set(found)) > 5000
    assert all(SHORTEST <= len(sentence.split()) <= LONGEST for sentence in found)
    assert all(sentence[0].isupper() and sentence[-1] in ".!?" for sentence in found)
    assert sum(sentence.isascii() for sentence in found) == len(found)
