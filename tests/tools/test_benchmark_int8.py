"""`--suite int8`: what is quantized and fused, how results are compared, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.tools.benchmarking import int8, models
from graphopt.tools.benchmarking.int8_inputs import draw_inputs
from graphopt.tools.benchmarking.int8_summary import is_right
from graphopt.tools.benchmarking.models import MODELS, SuiteModel
from graphopt.tools.demo_model import PACKAGE
from tests.tools.conftest import Cli


class Classes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 2), nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(image))))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


class TinyModel(SuiteModel):
    def build(self) -> tuple[Any, tuple[Any, ...]]:
        return Classes().eval(), (torch.randn(1, 3, 16, 16),)


@pytest.mark.filterwarnings("ignore")  # of the quantizer
def test_a_small_model_beside_onnxruntime(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"tiny": TinyModel("Tiny", "Classes", "")}
    for module in (models, int8):
        monkeypatch.setattr(module, "MODELS", tiny)
    monkeypatch.setattr(int8, "NAMES", ("tiny",))
    monkeypatch.setattr(int8, "CALIBRATING", 3)
    monkeypatch.setattr(int8, "AGREEING", 7)
    files = ("--json", "x.json", "--markdown", "x.md", "--chart", "x.png")
    outcome = cli("benchmark", "--suite", "int8", "--against", "onnxruntime", "--rounds", 1, "--threads", 1, *files)
    (model,) = json.loads(Path("x.json").read_text())["models"]
    assert outcome.code == 0, outcome
    assert [row["side"] for row in model["rows"]] == ["graphopt", "onnxruntime", "graphopt-f32"]
    assert model["best_peer"] == "onnxruntime" and model["over_float"] > 0 and not model["fallbacks"]
    assert sum(model["conversions"].values()) >= 2
    agreement = model["agreement"]["graphopt"]
    assert agreement["least_cosine"] > 0.99 and agreement["same_first"] > 0.8
    assert "| Tiny |" in Path("x.md").read_text() and "cosine" in outcome.out
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")


def test_first_choices_and_cosines() -> None:
    rows = [np.array([[1.0, 0.0]]), np.array([[0.9, 0.1]]), np.array([[0.0, 1.0]])]
    assert int8.choices(rows, nearest=False).ravel().tolist() == [0, 0, 1]
    assert int8.choices(rows, nearest=True).tolist() == [1, 0, 1]
    swapped = iter([*rows, rows[2], rows[1], rows[2]])
    found = int8.agree(lambda feed: next(swapped), {"a": lambda feed: next(swapped)}, [{}] * 3, nearest=False)
    assert found["a"]["same_first"] == pytest.approx(2 / 3) and found["a"]["least_cosine"] == pytest.approx(0)


def test_rightness_is_what_is_asked_or_what_rounding_explains() -> None:
    def model(ours: tuple[float, float], floating: tuple[float, float], **fallbacks: int) -> dict[str, Any]:
        sides = zip(("graphopt", "PyTorch"), (ours, floating), strict=True)
        agreement = {side: {"mean_cosine": values[0], "same_first": values[1]} for side, values in sides}
        return {"agreement": agreement, "agreement_inputs": 200, "fallbacks": fallbacks}

    assert is_right(model((0.99995, 0.995), (1.0, 1.0)))
    assert is_right(model((0.989, 0.98), (0.99, 0.98)))
    assert not is_right(model((0.98, 0.98), (0.99, 0.98)))
    assert not is_right(model((0.99995, 0.90), (1.0, 1.0)))
    assert not is_right(model((1.0, 1.0), (1.0, 1.0), conv2d=1))
    assert not is_right({"failed": "too large"})


def test_texts_are_padded_sentences_and_held_out_ones_are_others() -> None:
    pytest.importorskip(PACKAGE)

    class Names(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return ids * mask

    program = graphopt.capture(Names(), (torch.ones(1, 32, dtype=torch.int64), torch.ones(1, 32, dtype=torch.int64)))
    first, held_out = (list(draw_inputs(MODELS["minilm"], program, 6, seed)) for seed in (0, 1))
    assert all(feed["ids"].shape == (1, 32) and feed["ids"][0, 0] == 101 for feed in (*first, *held_out))
    assert any(not feed["mask"].all() for feed in first) and first[0]["mask"].sum() < first[5]["mask"].sum()
    assert not {feed["ids"].tobytes() for feed in first} & {feed["ids"].tobytes() for feed in held_out}


def test_images_are_noise_of_several_scales() -> None:
    program = graphopt.capture(Classes().eval(), (torch.randn(1, 3, 16, 16),))
    feeds = [next(iter(draw_inputs(TinyModel("T", "Classes", ""), program, 1, seed)))["image"] for seed in (0, 0, 1)]
    assert np.array_equal(feeds[0], feeds[1]) and not np.array_equal(feeds[0], feeds[2])
    neighbours = np.corrcoef(feeds[0][..., :-1].ravel(), feeds[0][..., 1:].ravel())[0, 1]
    assert neighbours > 0.3 and feeds[0].std() == pytest.approx(1, abs=0.01)


def test_what_is_refused(cli: Cli) -> None:
    cli("benchmark", "--suite", "int8", "--against", "inductor").refused("inductor takes no QDQ file", "onnxruntime")
    cli("benchmark", "--suite", "int8", "--models", "gpt2").refused("unknown model 'gpt2'")
    cli("benchmark", "--suite", "int8", "--dtype", "bf16").refused("has a dtype of its own")
