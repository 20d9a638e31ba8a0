"""The suites: what they choose, what they make of the figures, and what they write; real runs are slow."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.errors import CompileError, UnknownNameError
from graphopt.tools.benchmarking import chart, e2e, kernel_summary, models, summary
from graphopt.tools.benchmarking.kernel_cases import CASES, choose_cases
from graphopt.tools.benchmarking.kernel_sides import kernels_of
from graphopt.tools.benchmarking.models import MODELS, SuiteModel, choose_models
from graphopt.tools.benchmarking.report import AGREE
from tests.tools.conftest import Cli
from tests.tools.tiny_models import Dense

PNG = b"\x89PNG\r\n\x1a\n"


def row(side: str, median: float, valid: bool = True, error: float = 0.0, fastest: float | None = None) -> Any:
    return {
        "side": side,
        "median": median,
        "alone": median,
        "fastest": median if fastest is None else fastest,
        "calls": 9,
        "ratio": 1.0,
        "valid": valid,
        "error": error,
        "load_seconds": 0.1,
        "peak_bytes": 1 << 20,
        "about": {side: "1.0"},
    }


def model(name: str, *rows: Any, counts: bool = True) -> dict[str, Any]:
    found = {
        "rows": list(rows),
        "failures": [],
        "agree": True,
        "kernels": 3,
        "slow_kernels": [],
        "compile_seconds": 1.0,
    }
    return {"name": name, "title": name, "configuration": f"{name}: T(a=1)", "counts": counts, **found} | summary.judge(
        found
    )


def suite(*models: Any) -> dict[str, Any]:
    about = {"cpu": "C", "cores": [0, 1], "rounds": 3, "turn_seconds": 0.2, "transformers": "5", "peers": ["a", "b"]}
    return {**about, "models": list(models), "summary": summary.summarize(models)}


def test_the_best_peer_is_the_fastest_whose_outputs_are_right() -> None:
    found = summary.judge({"rows": [row("graphopt", 2.0), row("a", 3.0), row("b", 1.0, error=2 * AGREE)]})
    assert found == {"best_peer": "a", "ratio": 1.5, "valid": True}
    assert summary.judge({"rows": [row("graphopt", 2.0)]})["ratio"] is None


@pytest.mark.parametrize(
    ("rows", "valid"),
    [
        ([row("graphopt", 2.0, valid=False), row("a", 3.0)], False),
        ([row("graphopt", 2.0), row("a", 3.0, valid=False)], False),
        ([row("graphopt", 2.0, error=1.0), row("a", 3.0)], False),
        ([row("graphopt", 2.0), row("a", 3.0), row("b", 4.0, valid=False, fastest=2.5)], False),
        ([row("graphopt", 2.0), row("a", 3.0), row("b", 400.0, valid=False)], True),
    ],
    ids=["ours", "the best", "a wrong result", "another that may be the best", "one that cannot be"],
)
def test_a_ratio_is_valid_when_every_row_that_matters_is(rows: list[Any], valid: bool) -> None:
    assert summary.judge({"rows": rows})["valid"] is valid


def test_the_mean_is_geometric_and_over_the_models_that_count() -> None:
    ours, other = row("graphopt", 1.0), model("other", row("graphopt", 1.0), row("a", 0.1), counts=False)
    failed = {"name": "f", "title": "f", "configuration": "f", "counts": True, "failed": "too large"}
    found = summary.summarize([model("x", ours, row("a", 1.0)), model("y", ours, row("a", 4.0)), other, failed])
    assert math.isclose(found["geometric_mean"], 2.0) and found["models"] == 2 and found["valid"]
    assert found["smallest"] == {"model": "x", "ratio": 1.0}
    assert summary.summarize([other])["geometric_mean"] is None


def test_a_disturbed_row_marks_the_mean() -> None:
    report = suite(model("x", row("graphopt", 1.0), row("a", 2.0, valid=False)))
    assert not report["summary"]["valid"] and "not valid" in summary.format_suite(report)


def test_markdown_has_a_column_for_every_peer_that_ran() -> None:
    report = suite(
        model("x", row("graphopt", 0.01), row("a", 0.02), row("b", 0.005, error=1.0)),
        model("y", row("graphopt", 0.002), row("a", 0.003, valid=False), counts=False),
        {"name": "f", "title": "f", "configuration": "f", "counts": True, "failed": "too large"},
    )
    lines = summary.format_markdown(report).splitlines()
    assert lines[0] == "| model | graphopt | a | b | best peer / graphopt | load s | peak memory | slow kernels |"
    assert lines[2] == "| x | 10.0 | 20.0 | 5.00 (wrong result) | 2.00x | 0.10 | 1.0 MB | 0 |"
    assert lines[3] == "| y (no schedule written for it) | 2.00 | 3.00 | none | 1.50x (not valid) | 0.10 | 1.0 MB | 0 |"
    assert lines[4].startswith("| f | failed |") and {line.count("|") for line in lines[:5]} == {9}
    assert "- x: T(a=1)" in lines and "- graphopt: graphopt 1.0" in lines


def test_charts_are_pngs(tmp_path: Path) -> None:
    path = tmp_path / "chart.png"
    chart.draw_models(str(path), suite(model("x", row("graphopt", 0.01), row("onnxruntime", 2.0))) | {"peers": ["tvm"]})
    assert path.read_bytes().startswith(PNG)
    chart.draw_kernels(str(path), kernels(kernel("gemm 1"), kernel("norm", kind="norm", roof=None, share_of_roof=None)))
    assert path.read_bytes().startswith(PNG)


def test_names_of_models() -> None:
    assert choose_models(None) == list(MODELS) and choose_models("gpt2, minilm") == ["gpt2", "minilm"]
    assert sum(item.counts for item in MODELS.values()) == 7 and len(MODELS) == 9
    with pytest.raises(UnknownNameError, match="did you mean 'resnet50'"):
        choose_models("resnet-50")


def test_configurations_say_what_differs_from_the_default() -> None:
    described = MODELS["llama-8x768"].describe()
    assert described.startswith("Llama-style 8x768: LlamaForCausalLM(hidden_size=768, num_hidden_layers=8,")
    assert described.endswith("weights from seed 0, 64 tokens")
    assert MODELS["resnet50"].describe().endswith("(num_labels=1000), weights from seed 0, 1x3x224x224")
    assert "its own weights, 128 tokens" in MODELS["minilm"].describe()


@pytest.mark.filterwarnings("ignore")
def test_models_are_the_same_every_time() -> None:
    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    item = SuiteModel("t", "LlamaForCausalLM", "logits", small, tokens=5, options={"use_cache": False})
    (first, inputs), (second, again) = item.build(), item.build()
    assert torch.equal(first(*inputs), second(*again)) and first(*inputs).shape == (1, 5, 9)


class TinyModel(SuiteModel):
    def build(self) -> tuple[Any, tuple[Any, ...]]:
        if self.title == "Broken":
            raise CompileError("it cannot be compiled")
        return Dense(1).eval(), (torch.ones(3, 8),)


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models in place of the suite's, without roofs."""
    monkeypatch.setattr(e2e, "find_meter", lambda threads: None)
    tiny = {"broken": TinyModel("Broken", "Dense", ""), "tiny": TinyModel("Tiny", "Dense", "", {"seed": 1})}
    for module in (models, e2e):
        monkeypatch.setattr(module, "MODELS", tiny)


def test_a_suite_writes_text_json_markdown_and_chart(cli: Cli, tiny_suite: None) -> None:
    options = ("--against", "onnxruntime", "--rounds", 1, "--threads", 1)
    outcome = cli("benchmark", "--suite", "e2e", *options, "--json", "x.json", "--markdown", "x.md", "--chart", "x.png")
    report = json.loads(Path("x.json").read_text())
    broken, tiny = report["models"]
    assert outcome.code == 1 and broken["failed"] == "it cannot be compiled"
    assert [row["side"] for row in tiny["rows"]] == ["graphopt", "onnxruntime"] and tiny["best_peer"] == "onnxruntime"
    assert report["summary"]["models"] == 1 and tiny["kernels"] == 1
    assert "Tiny: Dense(seed=1), weights from seed 0" in outcome.out and "geometric mean" in outcome.out
    assert "| Tiny |" in Path("x.md").read_text() and Path("x.png").read_bytes().startswith(PNG)


def test_what_was_finished_survives_an_interrupt(cli: Cli, tiny_suite: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = e2e.measure_model

    def interrupted(name: str, *rest: Any) -> dict[str, Any]:
        if name == "tiny":
            raise KeyboardInterrupt
        return real(name, *rest)

    monkeypatch.setattr(e2e, "measure_model", interrupted)
    outcome = cli("benchmark", "--suite", "e2e", "--against", "", "--json", "x.json")
    assert outcome.code == 130 and "failed" in outcome.out
    assert [item["name"] for item in json.loads(Path("x.json").read_text())["models"]] == ["broken"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--suite", "e2e", "--models", "bert"), "unknown model 'bert'"),
        (("--suite", "kernels", "--models", "convolve"), "unknown kernel 'convolve'"),
        (("--suite", "kernels", "--against", "openvino"), "leave out --against"),
        (("--suite", "e2e", "--chart", "x.svg"), ".png"),
        (("--suite", "e2e", "--size", "batch=1"), "--size"),
        (("--suite", "e3e"), "e3e"),
    ],
)
def test_wrong_suites(cli: Cli, words: tuple[str, ...], expected: str) -> None:
    cli("benchmark", *words).refused(expected)


def kernel(name: str, **changes: Any) -> dict[str, Any]:
    about = {"kind": "gemm", "name": name, "calls": 0, "flops": 100, "bytes": 10, "peak": 100.0, "rules": ["r"]}
    figures = {"seconds": 2.0, "torch_seconds": 4.0, "ratio": 2.0, "roof": "FMA", "share_of_roof": 0.5}
    return {**about, **figures, "valid": True, "error": 0.0, **changes}


def kernels(*found: Any) -> dict[str, Any]:
    roofs = {"flops_per_second": 1e9, "levels": [{"name": "L1", "bytes_per_second": 1e9}]}
    about = {"cpu": "C", "cores": [0], "rounds": 3, "turn_seconds": 0.2, "roofs": roofs}
    return {**about, "kernels": list(found), "summary": kernel_summary.summarize(found)}


def test_shares_are_weighted_by_time_over_minilm() -> None:
    slow = kernel("a", calls=1, seconds=9.0, ratio=0.9)
    found = kernels(
        slow, kernel("b", calls=3, seconds=1.0), kernel("c", ratio=1.2), kernel("d", kind="conv", ratio=0.1)
    )
    assert found["summary"]["minilm_share_of_peak"] == pytest.approx((1 + 3) / (9 + 3))
    assert found["summary"]["minilm_seconds"] == 12 and found["summary"]["minilm_shapes"] == 2
    assert found["summary"]["smallest_ratio"] == {"kernel": "a", "ratio": 0.9}
    text = kernel_summary.format_suite(found)
    assert "33.3% of the FMA peak" in text and "at least 0.90x (a)" in text


def test_kernels_that_failed_or_were_disturbed_are_said_to_be() -> None:
    failed = {"kind": "gemm", "name": "f", "calls": 6, "failed": "no"}
    found = kernels(failed, kernel("b", calls=3, valid=False))
    assert found["summary"]["minilm_shapes"] == 1 and not found["summary"]["valid"]
    assert "not valid" in kernel_summary.format_suite(found) and "f failed: no" in kernel_summary.format_kernel(failed)
    assert kernel_summary.format_markdown(found).splitlines()[2].startswith("| f |")
    assert not kernel_summary.is_right(failed)


def test_choice_of_kernels_by_kind_and_name() -> None:
    assert choose_cases(None) == CASES and len({case.name for case in CASES}) == len(CASES)
    assert {case.kind for case in choose_cases("attention,norm")} == {"attention", "norm"}
    assert [case.calls for case in choose_cases("gemm 128x384x1536, gemm 128x384x384")] == [6, 6]


@pytest.mark.parametrize(
    "name",
    [
        "gemm 128x384x1536",
        "attention Llama-style",
        "conv 3x3 512-512 at 7",
        "rms_norm 64x768",
        *(case.name for case in CASES if case.kind == "movement"),
    ],
)
def test_the_nodes_that_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import graphopt
    from graphopt.tools.benchmarking import kernel_cases

    monkeypatch.setattr(kernel_cases, "cold_bytes", lambda: 3 * 8 * 384 * 1536)
    (case,) = choose_cases(name)
    program = graphopt.capture(*case.build())
    nodes = case.wanted(program)
    operators = [str(node.target) for node in program.nodes() if node.name in nodes]
    assert len(operators) == len(nodes) == (3 if case.kind == "gemm" else 1)
    assert all(case.operator in operator for operator in operators)


def test_kernels_are_found_by_the_nodes_they_compute() -> None:
    from graphopt.runtime.manifest import KernelInfo

    found = {"a": KernelInfo("r", nodes={"main": ("x", "y")}), "b": KernelInfo("r", nodes={"main": ("z",)})}
    assert kernels_of(found, {"y"}) == ["a"]


@pytest.mark.slow
def test_a_kernel_is_measured_beside_torch_and_the_peak(cli: Cli) -> None:
    names = "layer_norm 128x384,attention Llama-style"
    outcome = cli("benchmark", "--suite", "kernels", "--models", names, "--rounds", 1, "--threads", 1, "--json")
    assert outcome.code == 0
    for found in outcome.json["kernels"]:
        assert found["seconds"] > 0 and found["torch_seconds"] > 0 and found["flops"] > 0 and found["peak"] > 1e9
        assert found["roof"] is not None and found["rules"]
