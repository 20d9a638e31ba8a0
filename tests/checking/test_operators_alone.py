"""Operators on codes side by side: what is compared, and which differences are none; PyTorch plays kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.checking.operators_alone import Alone, alone, compare
from graphopt.errors import VerificationError
from graphopt.program import Program
from tests.models import program as model
from tests.passes.checking import captured


def parts_of(program: Program, passes: str = "quantize,qdq-fusion") -> Alone:
    found = alone(graphopt.optimize(program, passes, verify="off").program)
    assert found is not None
    return found


def results_of(parts: Alone) -> list[Tensor]:
    return [value.clone() for value in parts.program(*parts.program.examples)]


def test_every_operator_is_fed_what_the_program_feeds_it() -> None:
    program = graphopt.optimize(model("mlp"), "quantize,qdq-fusion", verify="off").program
    parts = alone(program)
    assert parts is not None and not parts.left_out
    assert [name.split(".")[1] for name in parts.operators] == ["quantize", "qlinear", "qlinear"]
    results = results_of(parts)
    torch.testing.assert_close(results[-1], program(*program.examples)[0], rtol=0, atol=0)
    account = compare(parts, results)
    assert account.operators == 3 and account.flipped == 0
    assert account.codes == results[0].numel() + results[1].numel()


def test_a_wrong_operator_is_named_and_those_behind_it_are_not() -> None:
    parts = parts_of(model("mlp"))
    results = results_of(parts)
    results[1][0, 0] += 1
    name = parts.program.outputs[1].name
    with pytest.raises(VerificationError, match=rf"qlinear.default at '{name}', .* gives 1 of .* off by up to 1 "):
        compare(parts, results)
    results = results_of(parts)
    results[2] += 1
    with pytest.raises(VerificationError, match="is off by 1"):
        compare(parts, results)


class Ties(nn.Module):
    """Codes of numbers that lie on a half, beside it, and far from it."""

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = torch.tensor(0.5), torch.tensor(0, dtype=torch.uint8)
        codes: Any = torch.ops.graphopt.quantize.default(x, scale, zero, qmin=0, qmax=255, dtype=torch.uint8)
        return torch.ops.graphopt.dequantize.default(codes, scale, zero, qmin=0, qmax=255, dtype=torch.float32)


def test_a_code_may_fall_on_the_other_side_of_a_half_and_nowhere_else() -> None:
    x = torch.tensor([1.25, 1.25 + 1e-6, 1.3, 3.0])  # 2.5, hardly more, 2.6 and 6 steps
    parts = alone(captured(Ties(), x))
    assert parts is not None
    eager = results_of(parts)
    assert eager[0].tolist() == [2, 3, 3, 6]
    for codes, flipped in (([3, 3, 3, 6], 1), ([3, 2, 3, 6], 2)):
        found = compare(parts, [torch.tensor(codes, dtype=torch.uint8), eager[1]])
        assert found.flipped == flipped
    for codes in ([2, 3, 2, 6], [2, 3, 3, 7], [4, 3, 3, 6]):
        with pytest.raises(VerificationError, match="gives 1 of 4 codes"):
            compare(parts, [torch.tensor(codes, dtype=torch.uint8), eager[1]])


def test_programs_without_codes_have_nothing_to_compare() -> None:
    assert alone(model("mlp")) is None


def test_sizes_that_vary_are_those_of_the_examples() -> None:
    program = captured(nn.Linear(8, 4), torch.randn(3, 8), dynamic={"input": {0: "batch"}})
    parts = parts_of(program)
    assert [spec.shape for spec in parts.program.outputs] == [(3, 8), (3, 4)]


def test_compile_compares_kernels() -> None:
    program = graphopt.optimize(model("mlp"), "quantize,qdq-fusion", verify="off").program
    report = graphopt.compile(program, check_operators=True).report
    found = report["operators"]["main"]
    assert found["operators"] == 3 and found["left_out"] == [] and found["flipped"] <= found["codes"] // 100


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_kernels_of_whole_models_are_right_one_by_one(name: str) -> None:
    program = graphopt.optimize(model(name), "O2,quantize,qdq-fusion", verify="off").program
    found = graphopt.compile(program, check_operators=True).report["operators"]["main"]
    assert found["operators"] >= 14 and found["flipped"] <= found["codes"] // 100
