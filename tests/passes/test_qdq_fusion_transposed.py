"""Transposed convolutions on codes: every way in which windows overlap, against the program, and compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.contract import PassContext
from graphopt.passes.qdq_fusion import QDQFusion
from graphopt.program import Program

F = nn.functional
ops = torch.ops.graphopt
BYTE: dict[str, Any] = {"qmin": 0, "qmax": 255, "dtype": torch.uint8}
F32: dict[str, Any] = {"qmin": 0, "qmax": 255, "dtype": torch.float32}


class Upward(nn.Module):
    """quantize(relu(conv_transpose2d(...))), its bias in steps of the sums, and numbers of another; uint8 weights."""

    def __init__(self, taps: Any, options: Mapping[str, Any], channels: int = 8, outputs: int = 6) -> None:
        super().__init__()
        generator, groups = torch.Generator().manual_seed(1), options.get("groups", 1)
        taps = (taps, taps) if isinstance(taps, int) else taps
        self.options = options
        codes = torch.randint(0, 256, (channels, outputs // groups, *taps), generator=generator)
        self.register_buffer("weight", codes.to(torch.uint8))
        scales = torch.rand(outputs // groups, generator=generator) / 400 + 1e-3
        self.register_buffer("scales", scales)
        origin = torch.randint(90, 160, (outputs // groups,), generator=generator)
        self.register_buffer("origin", origin.to(torch.uint8))
        self.register_buffer("bias", torch.arange(outputs, dtype=torch.int32) * 999 - 2000)
        self.register_buffer("bias_scale", scales.repeat(groups) * 0.05)
        self.register_buffer("step", torch.tensor(0.05))
        self.register_buffer("fine", torch.tensor(0.031))
        self.register_buffer("zero", torch.tensor(121, dtype=torch.uint8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = ops.dequantize(ops.quantize(x, self.step, self.zero, **BYTE), self.step, self.zero, **F32)
        weight = ops.dequantize(self.weight, self.scales, self.origin, axis=1, **F32)
        whole = {"qmin": -(2**31), "qmax": 2**31 - 1, "dtype": torch.float32}
        bias = ops.dequantize(self.bias, self.bias_scale, None, axis=0, **whole)
        up = F.conv_transpose2d(x, weight, bias, **self.options)
        return ops.quantize(torch.relu(up), self.fine, self.zero, **BYTE), F.conv_transpose2d(x, weight, **self.options)


def names(program: Program) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in program.nodes() if node.op == "call_function"]


WAYS: list[tuple[Any, Mapping[str, Any]]] = [
    (2, {"stride": 2}),
    (4, {"stride": 2, "padding": 1}),
    (3, {"stride": 2, "padding": 1, "output_padding": 1}),
    (3, {"padding": 1}),
    (3, {"stride": 3, "padding": 2, "dilation": 2, "output_padding": (1, 2)}),
    ((1, 5), {"stride": 2, "padding": (0, 4)}),
    (2, {"stride": 4}),
    (3, {"stride": 2, "groups": 2}),
]


@pytest.mark.parametrize("number", range(len(WAYS)))
def test_transposed_convolutions(number: int) -> None:
    taps, options = WAYS[number]
    x = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0)) * 3
    program = graphopt.capture(Upward(taps, options), (x,), dynamic_shapes={"x": {0: "batch"}})
    result = QDQFusion(fail_on_fallback=True).run(program, PassContext())
    assert names(result.program).count("graphopt.qconv") == 2 and "aten.relu" not in names(result.program)
    codes, numbers = result.program(x)
    wanted, exact = program(x)
    assert codes.shape == wanted.shape and (codes.int() - wanted.int()).abs().max() <= 1
    assert (codes != wanted).float().mean() < 0.01
    assert torch.allclose(numbers, exact, atol=1e-4 * float(exact.abs().max()))
    session = graphopt.compile(result.program, threads=2).session()
    for array, found in zip(session.run(None, {"x": x.numpy()}), (codes, numbers), strict=True):
        assert (torch.from_numpy(array).double() - found.double()).abs().max() <= (
            0 if array.dtype == "uint8" else 1e-4
        )


@pytest.mark.parametrize(
    ("shape", "stride", "reason"),
    [((2, 8, 5, 6), (1, 2), "its strides along both axes differ"), ((8, 5, 6), (2, 2), "no batch axis")],
)
def test_what_is_left_is_listed(shape: tuple[int, ...], stride: tuple[int, int], reason: str) -> None:
    program = graphopt.capture(Upward(3, {"stride": stride}), (torch.randn(shape),))
    declined = QDQFusion().run(program, PassContext()).declined
    assert any(reason in item.reason and item.rule.endswith("fallback") for item in declined), declined
