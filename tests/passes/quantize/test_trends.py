"""What 8 bits cost networks that were trained, and ONNX Runtime on the files that come of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnxruntime
import pytest
import torch

import graphopt
from graphopt.data.dataset import open_data
from graphopt.program import Program
from graphopt.tools.benchmarking import digits_cnn, digits_vit, quantization_cases
from graphopt.tools.benchmarking.small_transformers import Case
from tests.models import program as model

SEEDS = (0, 1, 2)


@cache
def case(kind: str, seed: int) -> Case:
    if kind == "cnn":
        return digits_cnn.case(seed, widths=(16, 32, 32), side=16)
    return digits_vit.case(seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "vit"])
@pytest.mark.parametrize("passes", ["quantize", "quantize{calibration=mse,bias-correction=true}"])
def test_digits_lose_less_than_half_a_point_over_three_seeds(kind: str, passes: str) -> None:
    lost = []
    for seed in SEEDS:
        trained = case(kind, seed)
        result = graphopt.optimize(trained.program, f"O2,{passes}", data=trained.data, metric=trained.metric)
        assert result.report.metric is not None and result.report.metric.before > 0.88
        lost.append(100 * (result.report.metric.before - result.report.metric.after))
    assert sum(lost) / len(lost) < 0.5 and max(lost) < 1.5, lost


@pytest.mark.slow
def test_sentences_keep_their_embeddings() -> None:
    """An eighth of the data of `graphopt benchmark --suite quantization --models minilm`: there 0.9963 and 0.9955."""
    chosen = quantization_cases.CASES["minilm"]
    assert chosen.least == {"cosine": 0.995, "spearman": 0.99}
    subject = chosen.build()
    fit = subject.data[: len(subject.data) * 4 // 5]
    few = [*fit[::8], *subject.data[-3:]]
    result = graphopt.optimize(subject.program, chosen.passes, data=few, verify="structure")
    found = subject.figures(result.program, open_data(few, subject.program).held_out)
    assert all(found[name] >= bound for name, bound in chosen.least.items()), found


def check_with_onnxruntime(program: Program, passes: str, path: Path, codes: int) -> None:
    """The same numbers from ONNX Runtime without its rewriting, and from the file read again."""
    quantized = graphopt.optimize(program, passes).program
    quantized.to_onnx(str(path))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    again = graphopt.capture(path)
    assert sum(tensor.dtype is torch.int8 for tensor in again.graph_module.state_dict().values()) == codes
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, program.examples, strict=True)}
    (wanted,), (found,) = quantized(*program.examples), session.run(None, feed)
    tolerance = 1e-4 * float(wanted.abs().max())
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=tolerance)
    torch.testing.assert_close(again(*program.examples)[0], wanted, rtol=0, atol=tolerance)


def test_onnxruntime_computes_what_the_program_does(tmp_path: Path) -> None:
    check_with_onnxruntime(model("mlp"), "quantize", tmp_path / "m.onnx", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "passes", "codes"),
    [
        ("resnet", "O2,quantize", 13),
        ("bert", "O2,quantize{weights=int8,activations=dynamic-int8}", 8),
        ("bert", "O2,quantize{weights=int4,group-size=12}", 8),
        ("bert", "O2,quantize{weights=nf4,group-size=12}", 0),
        ("mlp", "quantize{weights=fp8}", 0),
    ],
)
def test_onnxruntime_computes_every_form(name: str, passes: str, codes: int, tmp_path: Path) -> None:
    check_with_onnxruntime(model(name), passes, tmp_path / "m.onnx", codes)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4", "nf4", "fp8"])
@pytest.mark.parametrize("activations", ["int8", "dynamic-int8"])
def test_every_form_compiles(weights: str, activations: str) -> None:
    groups = ",group-size=8" if weights in ("int4", "nf4") else ""
    passes = f"quantize{{weights={weights},activations={activations}{groups}}}"
    program = graphopt.optimize(model("mlp"), passes).program
    (found,) = graphopt.compile(program).session().run(None, {"x": program.examples[0].numpy()})
    (wanted,) = program(*program.examples)
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))
