"""Weights from a file in the place of float ones: what the program then computes, and what lut-matmul makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.contract import PassContext
from graphopt.errors import UnknownNameError, UsageError
from graphopt.low_bit import Grid, LowBitWeight, place_weights, rounded
from graphopt.low_bit.grids import Kind
from graphopt.passes.lut_matmul import LutMatmul
from graphopt.program import Program
from tests.passes.checking import captured

ops = torch.ops.graphopt


def program() -> Program:
    torch.manual_seed(0)
    return captured(nn.Sequential(nn.Linear(64, 72), nn.ReLU(), nn.Linear(72, 64)).eval(), torch.randn(3, 64))


def coded(source: Program, kind: Kind, bits: int, order: bool) -> dict[str, LowBitWeight]:
    found = {}
    for name in ("0.weight", "2.weight"):
        value = source.graph_module.state_dict()[name]
        permutation = torch.randperm(value.shape[1], generator=torch.Generator().manual_seed(2)) if order else None
        plain = rounded(value if permutation is None else value[:, permutation], Grid(kind, bits), 32)
        found[name] = replace(plain, permutation=permutation)
    return found


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize(
    ("kind", "bits"), [("affine", 4), ("affine", 8), ("odd", 2), ("sign", 1), ("nf4", 4), ("bitmod", 3), ("bitmod", 4)]
)
def test_the_program_computes_with_the_numbers_and_is_lowered_as_it_is(kind: Any, bits: int, order: bool) -> None:
    source = program()
    weights = coded(source, kind, bits, order)
    placed = place_weights(source, weights)
    x = source.examples[0]
    biases = [source.graph_module.state_dict()[f"{place}.bias"] for place in (0, 2)]
    first = torch.relu(nn.functional.linear(x, weights["0.weight"].dequantize(), biases[0]))
    wanted = nn.functional.linear(first, weights["2.weight"].dequantize(), biases[1])
    assert torch.equal(placed(x)[0], wanted)
    result = LutMatmul().run(placed, PassContext())
    assert len(result.rewrites) == 2 and all(note.endswith("as they were") for note in result.notes[1:])
    nodes = [node for node in result.program.nodes() if node.target is ops.lut_gemv.default]
    held = result.program.graph_module.state_dict(keep_vars=True)
    for node, weight in zip(nodes, weights.values(), strict=True):
        assert torch.equal(held[str(node.args[3].target)], weight.codes) and node.args[8] == bits  # type: ignore[union-attr]
        assert torch.equal(held[str(node.args[4].target)], weight.scale)  # type: ignore[union-attr]
    noise = (result.program(x)[0] - wanted).square().sum() / wanted.square().sum()
    assert float(noise) < 3e-4
    assert sum(node.target is torch.ops.aten.index_select.default for node in result.program.nodes()) == 2 * order


def test_a_table_that_whole_numbers_do_not_hold_is_left_alone() -> None:
    quantized = graphopt.optimize(program(), "quantize{weights=fp8}").program
    result = LutMatmul().run(quantized, PassContext())
    assert not result.rewrites and any("too close for whole numbers" in item.reason for item in result.declined)


def test_names_and_shapes_that_do_not_fit() -> None:
    source = program()
    weights = coded(source, "affine", 4, False)
    with pytest.raises(UnknownNameError, match=r"unknown weight '0.wieght'; did you mean '0.weight'"):
        place_weights(source, {"0.wieght": weights["0.weight"]})
    with pytest.raises(UsageError, match=r"weight '2.weight' is torch.float32\[64, 72\], and .* \[?torch.float32"):
        place_weights(source, {"2.weight": weights["0.weight"]})
