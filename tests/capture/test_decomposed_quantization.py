"""Programs in the dialect of PT2E and torchao, by hand, in the shapes of their quantizers for x86 and XNNPACK."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

import graphopt
from graphopt.program import Program

F = nn.functional
ops = torch.ops.quantized_decomposed


class Dialect(nn.Module):
    """Activations of uint8 with weights from -128 (x86), or of int8 with weights from -127 (XNNPACK)."""

    weight: Tensor

    def __init__(self, function: Callable[..., Tensor], kind: str, weight: Tensor) -> None:
        super().__init__()
        self.function = function
        self.activations = (0, 255, torch.uint8) if kind == "x86" else (-128, 127, torch.int8)
        self.least = -128 if kind == "x86" else -127
        scales = weight.flatten(1).abs().amax(1) / 127
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        codes = ops.quantize_per_channel(weight, scales, zeros, 0, self.least, 127, torch.int8)
        self.register_buffer("weight", codes)
        self.bias = nn.Parameter(torch.linspace(-1, 1, len(scales)))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)

    def qd(self, x: Tensor, scale: float = 0.0234375, zero: int = 3) -> Tensor:
        codes = ops.quantize_per_tensor(x, scale, zero, *self.activations)
        result: Tensor = ops.dequantize_per_tensor(codes, scale, zero, *self.activations)
        return result

    def w(self) -> Tensor:
        given = (self.scales, self.zeros, 0, self.least, 127, torch.int8)
        result: Tensor = ops.dequantize_per_channel(self.weight, *given)
        return result


def names(program: Program) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in program.nodes() if node.op == "call_function"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_x86(m: Dialect, x: Tensor) -> Tensor:
    """Its results are numbers again where no product reads them."""
    return torch.relu(F.linear(m.qd(F.gelu(F.linear(m.qd(x), m.w(), m.bias)), 0.03125, 9), m.w(), m.bias))


def linear_xnnpack(m: Dialect, x: Tensor) -> Tensor:
    """Every result is rounded, the sum of two of them too."""
    y = m.qd(F.relu(F.linear(m.qd(x), m.w(), m.bias)), 0.03125, -128)
    return m.qd(y + m.qd(F.linear(y, m.w(), m.bias), 0.0625, 1), 0.0625, 5)


def convolution_x86(m: Dialect, x: Tensor) -> Tensor:
    y = m.qd(F.relu(F.conv2d(m.qd(x), m.w(), m.bias, 1, 1)), 0.03125, 0)
    return F.relu(F.conv2d(F.max_pool2d(y, 2), m.w(), m.bias, 1, 1) + F.max_pool2d(y, 2))


def convolution_xnnpack(m: Dialect, x: Tensor) -> Tensor:
    y = m.qd(F.hardtanh(F.conv2d(m.qd(x), m.w(), m.bias, 1, 1), 0.0, 6.0), 0.0234375, -128)
    return m.qd(F.adaptive_avg_pool2d(F.conv2d(y, m.w(), m.bias, 1, 1), 1), 0.0625, 2)


CASES = {
    "linear-x86": (linear_x86, "x86", draw(24, 24, seed=1), draw(5, 24), ["qlinear"] * 2),
    "linear-xnnpack": (linear_xnnpack, "xnnpack", draw(24, 24, seed=1), draw(5, 24), ["qlinear"] * 2 + ["qadd"]),
    "convolution-x86": (convolution_x86, "x86", draw(8, 8, 3, 3, seed=1), draw(2, 8, 8, 8), ["qconv"] * 2),
    "convolution-xnnpack": (convolution_xnnpack, "xnnpack", draw(8, 8, 3, 3, seed=1), draw(2, 8, 8, 8), ["qconv"] * 2),
}


@pytest.mark.parametrize("name", CASES)
def test_products_of_both_quantizers_compute_with_codes(name: str) -> None:
    function, kind, weight, x, wanted = CASES[name]
    module = Dialect(function, kind, weight / 4).eval()
    program = graphopt.capture(module, (x,))
    assert not any("quantized_decomposed" in each for each in names(program))
    assert torch.equal(program(x)[0], module(x))
    fused = graphopt.optimize(program, "O2,qdq-fusion{fail-on-fallback=true}").program
    found = names(fused)
    kinds = [each.removeprefix("graphopt.") for each in found if each.startswith("graphopt.q") and "quant" not in each]
    assert sorted(kinds) == sorted(wanted) and not {"aten.linear", "aten.conv2d"} & set(found)
    (name,) = [spec.name for spec in fused.inputs]
    (ours,) = graphopt.compile(fused, threads=2).session().run(None, {name: x.numpy()})
    assert np.abs(ours - module(x).detach().numpy()).max() <= 0.0625 * 1.01


def test_rounding_is_that_of_the_reciprocal_between_the_given_bounds() -> None:
    class Steps(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            narrow = ops.quantize_per_tensor(x, 0.1, -3, -100, 99, torch.int8)
            return narrow, ops.quantize_per_tensor(x, 0.7, 11, 0, 127, torch.uint8)

    x = torch.cat([torch.arange(-400, 400) * 0.05, torch.arange(-400, 400) * 0.35])
    program = graphopt.capture(Steps(), (x,))
    assert names(program) == ["graphopt.quantize"] * 2
    assert all(torch.equal(a, b) for a, b in zip(program(x), Steps()(x), strict=True))
    assert program(x)[0].min() == -100 and program(x)[0].max() == 99


def test_scales_that_are_tensors_and_channels_with_zero_points() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor([0.05], dtype=torch.float32))
            self.register_buffer("zero", torch.tensor([7], dtype=torch.int64))
            self.register_buffer("scales", torch.rand(6, generator=torch.Generator().manual_seed(2)) / 9 + 0.01)
            self.register_buffer("zeros", torch.arange(6))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            codes = ops.quantize_per_tensor(x, self.scale, self.zero, 0, 255, torch.uint8)
            each = ops.quantize_per_channel(x, self.scales, self.zeros, 1, -128, 127, torch.int8)
            whole = ops.dequantize_per_tensor(codes, self.scale, self.zero, 0, 255, torch.uint8)
            return whole, ops.dequantize_per_channel(each, self.scales, self.zeros, 1, -128, 127, torch.int8)

    x, module = draw(4, 6) * 3, Other()
    program = graphopt.capture(module, (x,))
    assert sorted(names(program)) == ["graphopt.dequantize"] * 2 + ["graphopt.quantize"] * 2
    assert all(torch.equal(a, b) for a, b in zip(program(x), module(x), strict=True))


def test_a_saved_program_of_the_dialect(tmp_path: Path) -> None:
    function, kind, weight, x, _ = CASES["linear-xnnpack"]
    module, path = Dialect(function, kind, weight / 4).eval(), tmp_path / "m.pt2"
    torch.export.save(torch.export.export(module, (x,)), path)
    program = graphopt.capture(str(path))
    assert torch.equal(program(x)[0], module(x)) and "graphopt.quantize" in names(program)


class Dynamic(Dialect):
    """A linear whose activations get their range as they are computed, as PT2E's dynamic quantizers write it."""

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        bounds = (*self.activations[:2], 2**-12, self.activations[2])
        scale, zero = ops.choose_qparams.tensor(x, *bounds)
        codes = ops.quantize_per_tensor.tensor(x, scale, zero, *self.activations)
        numbers = ops.dequantize_per_tensor.tensor(codes, scale, zero, *self.activations)
        result: Tensor = F.linear(numbers, self.w(), self.bias)
        return result


@pytest.mark.parametrize("kind", ["x86", "xnnpack"])
def test_dynamic_activations_become_integer_products(kind: str) -> None:
    x = draw(5, 24) + 0.4
    module = Dynamic(torch.relu, kind, draw(16, 24, seed=1))
    program = graphopt.capture(module, (x,))
    assert not any("quantized_decomposed" in name for name in names(program))
    fused = graphopt.optimize(program, "O2,qdq-fusion{fail-on-fallback=true}").program
    assert "graphopt.dynamic_qlinear" in names(fused) and "aten.linear" not in names(fused)
    session = graphopt.compile(fused, threads=1).session()
    for value in (x, -x.abs(), torch.zeros_like(x), 1e-6 * x):
        wanted = module(value).detach()
        assert torch.allclose(program(value)[0], wanted, atol=1e-6)
        (found,) = session.run(None, {session.get_inputs()[0].name: value.numpy()})
        assert np.abs(found - wanted.numpy()).max() <= 1e-5 * (1 + float(wanted.abs().max()))
