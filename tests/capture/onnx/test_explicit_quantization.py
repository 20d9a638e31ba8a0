"""Integer operators as ONNX: codes within one of ONNX Runtime's; read and fused again they are the same operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import graphopt
from graphopt.contract import PassContext
from graphopt.errors import UsageError
from graphopt.matcher import arguments, parameter_names
from graphopt.operators import dynamic_products, dynamic_quantization, integer_products, integer_sums  # noqa: F401
from graphopt.passes.qdq_fusion import QDQFusion
from graphopt.program import Program, get_attribute
from tests.passes.test_qdq_fusion_models import KINDS, MODELS, draw, quantized_file, without_optimizations

ops = torch.ops.graphopt
BYTE = {"qmin": 0, "qmax": 255, "dtype": torch.uint8}
NONE = (None, None, None)
CODE = {"qmin": -128, "qmax": 127, "dtype": torch.int8}


class Operators(nn.Module):
    """A function of codes, with a module's constants."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.function = function
        for name, value in {
            "scale": torch.tensor(0.05),
            "other": torch.tensor(0.031),
            "coarse": torch.tensor(0.21),
            "minus": torch.tensor(-0.05),
            "zero": torch.tensor(120, dtype=torch.uint8),
            "low": torch.tensor(3, dtype=torch.uint8),
            "signed": torch.tensor(-5, dtype=torch.int8),
            "weight": torch.randint(-127, 128, (16, 24), generator=generator).to(torch.int8),
            "square": torch.randint(-127, 128, (16, 16), generator=generator).to(torch.int8),
            "narrow": torch.randint(-127, 128, (8, 24), generator=generator).to(torch.int8),
            "kernel": torch.randint(-127, 128, (8, 2, 3, 3), generator=generator).to(torch.int8),
            "rows": torch.rand(16, generator=generator) / 400 + 1e-3,
            "filters": torch.rand(8, generator=generator) / 400 + 1e-3,
            "bias": torch.randn(16, generator=generator),
            "counted": torch.randint(-999, 999, (8,), generator=generator).to(torch.int32),
            "table": torch.randint(0, 256, (256,), generator=generator).to(torch.uint8),
            "numbers": torch.randn(256, generator=generator),
        }.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def linear(m: Any, x: Tensor, into: Any, residual: Any = NONE, **options: Any) -> Tensor:
    given = (x, m.scale, m.zero, m.weight, m.rows, m.bias, *into, *residual)
    result: Tensor = ops.qlinear(*given, **{**BYTE, **options})
    return result


def convolution(m: Any, x: Tensor, padding: list[int], **options: Any) -> Tensor:
    given = (x, m.scale, m.zero, m.kernel, m.filters, m.counted, m.coarse, m.zero, *NONE)
    shape = {"stride": [2, 1], "padding": padding, "dilation": [1, 2], "groups": 2}
    result: Tensor = ops.qconv(*given, **shape, **{**BYTE, **options})
    return result


def two(m: Any, target: Any, x: Tensor, into: Any, **options: Any) -> Tensor:
    b_scale = options.pop("b_scale", m.other)
    result: Tensor = target(x, m.scale, m.zero, x.flip(0), b_scale, m.low, *into, **{**BYTE, **options})
    return result


def average(m: Any, x: Tensor, padding: list[int], divisor: int | None = None, ceil_mode: bool = False) -> Tensor:
    result: Tensor = ops.qavg_pool(
        *(x, m.scale, m.zero, m.other, m.low),
        **{
            "kernel_size": [3, 2],
            "stride": [2, 1],
            "padding": padding,
            "divisor": divisor,
            "ceil_mode": ceil_mode,
            **BYTE,
        },
    )
    return result


def dynamic(m: Any, x: Tensor, axis: int | None) -> Tensor:
    result: Tensor = ops.dynamic_qlinear(*ops.dynamic_quantize(x, axis=axis), m.weight, m.rows, m.bias)
    return result


SIGNED = {"activation": "hardswish", **CODE}
CODES = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
IMAGES = torch.randint(0, 256, (2, 4, 9, 10), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
NUMBERS = CODES / 40.0 - 2
CASES: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "linear": (lambda m, x: linear(m, x, (m.coarse, m.zero)), CODES),
    "linear of three axes": (lambda m, x: linear(m, x, (m.coarse, m.zero)), CODES[None]),
    "counted bias": (
        lambda m, x: ops.qlinear(x, m.scale, m.zero, m.narrow, m.filters, m.counted, m.coarse, m.zero, *NONE, **BYTE),
        CODES[None],
    ),
    "relu": (lambda m, x: linear(m, x, (m.coarse, m.zero), qmin=120), CODES),
    "clip": (lambda m, x: linear(m, x, (m.coarse, m.zero), qmin=125, qmax=131), CODES),
    "activation": (lambda m, x: linear(m, x, (m.other, m.zero), activation="gelu", qmax=200), CODES),
    "signed": (lambda m, x: linear(m, x, (m.coarse, m.signed), **SIGNED), CODES),
    "numbers": (lambda m, x: linear(m, x, (None, None), dtype=torch.float32), CODES),
    "residual": (
        lambda m, x: ops.qlinear(
            *(linear(m, x, (m.coarse, m.zero)), m.coarse, m.zero, m.square, m.rows, None, m.coarse, m.zero),
            *(x[:, :16], m.scale, m.low),
            **{**BYTE, "qmin": 120},
        ),
        CODES,
    ),
    "convolution": (lambda m, x: convolution(m, x, [1, 1]), IMAGES),
    "sides": (lambda m, x: convolution(m, x, [0, 1, 2, 0], activation="silu"), IMAGES),
    "sum": (lambda m, x: two(m, ops.qadd, x, (m.coarse, m.zero), qmin=120), CODES),
    "difference": (lambda m, x: two(m, ops.qadd, x, (m.coarse, m.zero), b_scale=m.minus), CODES),
    "product": (lambda m, x: two(m, ops.qmul, x, (m.coarse, m.zero)), CODES),
    "quotient": (
        lambda m, x: ops.qdiv(x, m.scale, m.zero, x.flip(0) // 2 + 9, m.other, m.low, m.coarse, m.zero, **BYTE),
        CODES,
    ),
    "matrices": (lambda m, x: two(m, ops.qmatmul, x[:4, :4], (m.coarse, m.zero)), CODES),
    "matrices of numbers": (lambda m, x: two(m, ops.qmatmul, x[:4, :4], (None, None), dtype=torch.float32), CODES),
    "mean": (lambda m, x: ops.qsum(x, m.scale, m.zero, m.other, m.low, dim=[2, 3], divisor=90, **BYTE), IMAGES),
    "total": (lambda m, x: ops.qsum(x, m.scale, m.zero, m.coarse, m.zero, dim=[1], keepdim=True, **BYTE), IMAGES),
    "windows": (lambda m, x: average(m, x, [1, 1], divisor=6), IMAGES),
    "windows that count": (lambda m, x: average(m, x, [1, 0]), IMAGES),
    "windows of a row": (
        lambda m, x: ops.qavg_pool(
            *(x, m.scale, m.zero, m.other, m.low), kernel_size=[2], stride=[2], padding=[0], divisor=2, **BYTE
        ),
        IMAGES[0],
    ),
    "table": (lambda m, x: ops.table256(x, m.table), CODES),
    "table of signed codes": (lambda m, x: ops.table256(linear(m, x, (m.coarse, m.signed), **CODE), m.numbers), CODES),
    "dynamic": (lambda m, x: dynamic(m, x, None), NUMBERS),
    "dynamic by row": (lambda m, x: dynamic(m, x, 1), NUMBERS),
}


def fused_again(path: str) -> Program:
    return QDQFusion().run(graphopt.capture(path), PassContext(target="cpu")).program


def integer_operators(program: Program) -> list[Any]:
    """Each with its options and constants; which rounding is meant does not matter where it divides constants."""
    found = []
    for _, module in program.graphs():
        for node in module.graph.nodes:
            if str(node.target).startswith("graphopt.") and "quantize" not in str(node.target):
                given = dict(zip(parameter_names(node.target), arguments(node), strict=True))
                given.pop("reciprocal", None)
                held = {
                    name: get_attribute(module, str(each.target)).double().tolist()
                    for name, each in given.items()
                    if isinstance(each, Node) and each.op == "get_attr"
                }
                options = {name: each for name, each in given.items() if not isinstance(each, Node)}
                found.append((str(node.target), options, held))
    return sorted(found, key=str)


class Everything(Operators):
    """All of `CASES` as outputs of one program, each with an input of its own: the exporter merges what is equal."""

    def __init__(self) -> None:
        super().__init__(lambda m, *inputs: None)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return {name: CASES[name][0](self, x) for name, x in zip(CASES, inputs, strict=True)}


def written(module: nn.Module, inputs: tuple[Tensor, ...], path: str, **options: Any) -> tuple[Program, Program]:
    """The program as it was written, and as it is read and fused again."""
    program = graphopt.capture(module, inputs, **options)
    program.to_onnx(path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return program, fused_again(path)


def run_by_onnxruntime(path: str, program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, inputs, strict=True)}
    return [torch.from_numpy(value) for value in without_optimizations(path).run(None, feed)]


def test_every_operator(tmp_path: Path) -> None:
    path, inputs = str(tmp_path / "m.onnx"), tuple(x for _, x in CASES.values())
    program, again = written(Everything(), inputs, path)
    for found in (run_by_onnxruntime(path, program, inputs), again(*inputs)):
        for spec, value, wanted in zip(program.outputs, found, program(*inputs), strict=True):
            assert value.dtype == wanted.dtype and value.shape == wanted.shape, spec.name
            apart = (value.double() - wanted.double()).abs()
            assert apart.max() <= (2e-5 if wanted.is_floating_point() else 1), spec.name
            assert (apart > 2e-5).double().mean() < 0.02, spec.name
    assert integer_operators(again) == integer_operators(program)
    assert len(integer_operators(program)) > len(CASES)


def test_a_divisor_of_windows_beyond_the_edge_has_no_form(tmp_path: Path) -> None:
    program = graphopt.capture(Operators(lambda m, x: average(m, x, [0, 0], divisor=6, ceil_mode=True)), (IMAGES,))
    with pytest.raises(UsageError, match="with ceil_mode and a divisor"):
        program.to_onnx(str(tmp_path / "m.onnx"))


def test_moves_of_codes_and_sizes_that_vary(tmp_path: Path) -> None:
    """What moves codes stays a move of codes, and integer operators on both sides of it are written out."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = torch.max_pool2d(convolution(m, x, [1, 1], qmin=120), [2, 2])
        y = torch.cat((y, y.flip(1)), 1).transpose(2, 3)[:, :, 1:]
        result: Tensor = ops.table256(
            ops.qadd(y, m.scale, m.zero, y, m.other, m.zero, m.scale, m.zero, **BYTE), m.table
        )
        return result

    path, module = str(tmp_path / "m.onnx"), Operators(run)
    program, again = written(module, (IMAGES,), path, dynamic_shapes={"inputs.0": {0: "n"}})
    for images in (IMAGES, IMAGES[:1].flip(2)):
        (wanted,) = program(images)
        for found in (*run_by_onnxruntime(path, program, [images]), *again(images)):
            assert (found == wanted).double().mean() > 0.98
    assert integer_operators(again) == integer_operators(program)
    assert "max_pool2d" in str(again.graph_module.graph)


def test_operators_in_branches(tmp_path: Path) -> None:
    def run(m: Any, x: Tensor, chosen: Tensor) -> Any:
        full = lambda x: linear(m, x, (m.coarse, m.zero), qmin=120)  # noqa: E731
        return torch.cond(chosen.sum() > 0, full, lambda x: ops.table256(x[:, :16], m.table), (x,))

    path = str(tmp_path / "m.onnx")
    program, again = written(Operators(run), (CODES, torch.ones(1)), path)
    for chosen in (torch.ones(1), -torch.ones(1)):
        (wanted,) = program(CODES, chosen)
        for found in (*run_by_onnxruntime(path, program, [CODES, chosen]), *again(CODES, chosen)):
            assert (found.double() - wanted.double()).abs().max() <= 1
    options = [[each[:2] for each in integer_operators(side)] for side in (again, program)]  # constants are operands
    assert options[0] == options[1] and len(options[0]) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter and the quantizer
@pytest.mark.parametrize("kind", ["ours", "dynamic", "signed", "operators"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model(name: str, kind: str, tmp_path: Path) -> None:
    """Quantized here or by ONNX Runtime, fused, written: the same in ONNX Runtime, the same operators once fused."""
    if kind in KINDS:
        program, steps = graphopt.capture(quantized_file(name, KINDS[kind], tmp_path)), "O2"
    else:
        torch.manual_seed(0)
        program = graphopt.capture(MODELS[name][0]().eval(), (draw(MODELS[name][1], 0),))
        steps = "O2,quantize" if kind == "ours" else "O2,quantize{activations=dynamic-int8}"
    program = graphopt.optimize(program, f"{steps},qdq-fusion", verify="off").program
    path, x = str(tmp_path / "written.onnx"), draw(MODELS[name][1], 10)
    if "dynamic_qconv" in str(program.graph_module.graph):
        with pytest.raises(UsageError, match="dynamic_qconv"):
            program.to_onnx(path)
        return
    program.to_onnx(path)
    (wanted,), (found,) = program(x), run_by_onnxruntime(path, program, [x])
    assert (found - wanted).abs().max() <= wanted.abs().max() / 50
    assert integer_operators(fused_again(path)) == integer_operators(program)
    assert integer_operators(program)


@torch.library.custom_op("graphopt::without_onnx_form", mutates_args=())
def without_onnx_form(x: Tensor) -> Tensor:
    return x.clone()


without_onnx_form.register_fake(lambda x: torch.empty_like(x))


def test_an_operator_without_a_form_is_refused(tmp_path: Path) -> None:
    program = graphopt.capture(Operators(lambda m, x: without_onnx_form(x)), (CODES,))
    with pytest.raises(UsageError, match=r"without_onnx_form.*save a \.pt2, or write the \.onnx before the pass"):
        program.to_onnx(str(tmp_path / "m.onnx"))
    assert not list(tmp_path.iterdir())
