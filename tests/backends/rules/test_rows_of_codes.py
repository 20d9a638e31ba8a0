"""Softmax and norms between codes: one kernel, codes as rounding has them, and float32 where numbers are read too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.arrays import array_of
from graphopt.capture import capture
from graphopt.compile import Artifact
from graphopt.operators import integer_elements, quantization  # noqa: F401

ops = torch.ops.graphopt
BYTE = {"qmin": 0, "qmax": 255}


class Between(nn.Module):
    """A function of the numbers that codes stand for, as codes again."""

    scale: Tensor
    zero: Tensor
    fine: Tensor
    least: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, function: Callable[[Between, Tensor], object], columns: int) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("scale", torch.tensor(0.0625))  # a power of two and an odd zero point: many ties
        self.register_buffer("zero", torch.tensor(117, dtype=torch.uint8))
        self.register_buffer("fine", torch.tensor(0.03125))
        self.register_buffer("least", torch.tensor(1 / 256))
        self.register_buffer("weight", torch.rand(columns, generator=generator) + 0.5)
        self.register_buffer("bias", torch.randn(columns, generator=generator))

    def forward(self, codes: Tensor) -> object:
        return self.function(self, ops.dequantize(codes, self.scale, self.zero, **BYTE, dtype=torch.float32))

    def codes(self, x: Tensor) -> Tensor:
        result: Tensor = ops.quantize(x, self.fine, self.zero, **BYTE, dtype=torch.uint8)
        return result


FUNCTIONS: dict[str, Callable[[Between, Tensor], object]] = {
    "softmax": lambda m, x: ops.quantize(x.softmax(-1), m.least, None, **BYTE, dtype=torch.uint8),
    "layer_norm": lambda m, x: m.codes(F.layer_norm(x, x.shape[-1:], m.weight, m.bias, 1e-6)),
    "rms_norm": lambda m, x: m.codes(F.rms_norm(x, x.shape[-1:], m.weight, 1e-6)),
    "log_softmax": lambda m, x: m.codes(x.log_softmax(-1)),
}


def compiled(module: nn.Module, *inputs: Tensor, target: str = "cpu") -> tuple[Artifact, list[np.ndarray]]:
    artifact = graphopt.compile(capture(module, inputs), target=target, threads=2)
    return artifact, artifact.session().run(
        None, {i.name: array_of(x) for i, x in zip(artifact.session().get_inputs(), inputs, strict=True)}
    )


def kernels(artifact: Artifact) -> list[str]:
    return list(artifact.manifest.variants[0].kernels)


def apart(found: np.ndarray, wanted: Tensor) -> np.ndarray:
    return np.abs(found.astype(int) - array_of(wanted).astype(int))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("target", ["cpu", "cpu:x86-64-v3"])
def test_from_codes_to_codes_in_one_kernel(name: str, target: str) -> None:
    for shape in ((2, 3, 128), (1, 5, 197), (7, 33)):
        codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        module = Between(FUNCTIONS[name], shape[-1])
        artifact, (found,) = compiled(module, codes, target=target)
        assert kernels(artifact) == [f"dequantize_{name}_quantize"]
        wanted = module(codes)
        assert isinstance(wanted, Tensor)
        assert apart(found, wanted).max() <= 1 and (apart(found, wanted) > 0).mean() < 0.002


def test_rows_that_are_too_long_for_the_stack_and_rows_of_symbolic_length() -> None:
    module = Between(FUNCTIONS["softmax"], 5000)
    codes = torch.randint(0, 256, (5, 5000), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    _, (found,) = compiled(module, codes)
    assert apart(found, module(codes)).max() <= 1
    program = capture(module, (codes[:, :40],), dynamic_shapes={"codes": {0: "rows", 1: "columns"}})
    session = graphopt.compile(program, threads=2).session()
    for rows, columns in ((1, 1), (3, 17), (8, 300)):
        part = codes[:rows, :columns].contiguous()
        (found,) = session.run(None, {"codes": array_of(part)})
        assert apart(found, module(part)).max() <= 1


def test_softmax_of_numbers_with_a_mask() -> None:
    """-inf gives the code of 0; a row of nothing else is NaN, which becomes the lowest code."""

    class Masked(Between):
        def forward(self, x: Tensor) -> object:
            return self.function(self, x)

    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    x[0, 3:] = x[1, 7] = -torch.inf
    x[2] = -torch.inf
    module = Masked(FUNCTIONS["softmax"], 40)
    artifact, (found,) = compiled(module, x)
    assert kernels(artifact) == ["softmax_quantize"]
    assert apart(found, module(x)).max() <= 1
    assert not found[2].any() and not found[0, 3:].any()


def test_numbers_that_others_read_are_stored() -> None:
    def both(m: Between, x: Tensor) -> object:
        y = F.layer_norm(x, x.shape[-1:], m.weight, m.bias, 1e-6)
        return m.codes(y), y, x.sum(-1)

    codes = torch.randint(0, 256, (9, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    module = Between(both, 64)
    artifact, found = compiled(module, codes)
    assert not any("layer_norm_quantize" in name for name in kernels(artifact))
    wanted = module(codes)
    assert isinstance(wanted, tuple)
    assert apart(found[0], wanted[0]).max() <= 1
    np.testing.assert_allclose(found[1], array_of(wanted[1]), rtol=1e-5, atol=1e-5)
