"""Products of codes and weights that no int8 holds: bit for bit on every level, up to the largest sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.arrays import array_of, tensor_of
from graphopt.backends.operators.shifted_weights import Shifted
from graphopt.capture import capture
from graphopt.operators import dynamic_products, integer_products  # noqa: F401

ops = torch.ops.graphopt
NUMBER, REST = {"dtype": torch.float32}, (None,) * 5
KINDS = ["cpu", "cpu:x86-64-v3", "cpu:x86-64-v4-vnni", "cpu:aarch64"]


def codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def wide(*shape: int, seed: int = 1) -> nn.Parameter:
    """uint8 codes less a zero point for each output; all of the first output's fit int8."""
    zeros = codes(shape[0], *(1 for _ in shape[1:]), seed=seed + 1).to(torch.int16)
    zeros[0] = 128
    return nn.Parameter(codes(*shape, seed=seed).to(torch.int16) - zeros, False)


class Products(nn.Module):
    """Rows; then images: padded, strided, dilated, 1 x 1, of three channels, in groups of any size, depthwise."""

    CASES: tuple[tuple[int, int, int, Mapping[str, Any]], ...] = (
        (12, 20, 3, {"padding": [1, 1], "stride": [2, 2]}),
        (16, 24, 1, {}),
        (16, 24, 1, {"stride": [2, 2]}),
        (3, 16, 5, {"padding": [2, 0]}),
        (16, 32, 3, {"groups": 4, "padding": [1, 1]}),
        (12, 12, 3, {"groups": 4}),
        (64, 64, 3, {"groups": 64, "padding": [1, 0]}),
        (8, 9, 3, {"padding": [0, 1, 2, 0], "dilation": [2, 1]}),
    )

    def __init__(self) -> None:
        super().__init__()
        self.matrix = wide(33, 47)
        self.filters = nn.ParameterList([wide(o, c // d.get("groups", 1), t, t, seed=o) for c, o, t, d in self.CASES])
        self.register_buffer("one", torch.tensor(1.0))
        self.register_buffer("into", torch.tensor(997.0))
        self.register_buffer("zero", torch.tensor(77, dtype=torch.uint8))
        self.register_buffer("bias", torch.arange(33, dtype=torch.int32) * 999)

    def forward(self, x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        given = (rows, self.one, self.zero, self.matrix, self.one)
        found = [
            ops.qlinear(*given, self.bias, *REST, **NUMBER),
            ops.qlinear(*given, None, self.into, self.zero, None, None, None, dtype=torch.uint8),
            ops.dynamic_qlinear(*given, None),
        ]
        for weight, (channels, _, _, chosen) in zip(self.filters, self.CASES, strict=True):
            options = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], **chosen}
            x_given = (x[:, :channels], self.one, self.zero, weight, self.one, None)
            found.append(ops.qconv(*x_given, *REST, **options, **NUMBER))
        return tuple(found)


@pytest.mark.parametrize(
    "target", [kind if kind == "cpu" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_sums_are_exact(target: str) -> None:
    inputs = (codes(2, 64, 9, 11, seed=5), codes(7, 47, seed=6))
    program = capture(Products(), inputs, dynamic_shapes={"x": {0: "batch"}, "rows": {0: "rows"}})
    artifact = graphopt.compile(program, target=target, threads=2)
    assert artifact.report["errors"]["main"] == 0
    if target != "cpu":
        return
    for batch, rows in ((1, 1), (3, 33)):
        given = (codes(batch, 64, 9, 11, seed=batch), codes(rows, 47, seed=rows))
        feed = dict(zip(("x", "rows"), map(array_of, given), strict=True))
        found = artifact.session().run(None, feed)
        for spec, array, wanted in zip(program.outputs, found, program(*given), strict=True):
            assert torch.equal(tensor_of(array, spec.dtype), wanted), spec.name


@pytest.mark.parametrize("padding", [[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0]])
def test_a_stride_and_padding_that_keep_the_size(padding: list[int]) -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = wide(5, 8, 1, 1)
            self.register_buffer("one", torch.tensor(1.0))
            self.register_buffer("zero", torch.tensor(7, dtype=torch.uint8))

        def forward(self, x: Tensor) -> Any:
            window = {"stride": [2, 2], "padding": padding, "dilation": [1, 1]}
            return ops.qconv(x, self.one, self.zero, self.weight, self.one, None, *REST, **window, **NUMBER)

    x = codes(1, 8, 2, 2)
    program = capture(Strided(), (x,))
    (found,) = graphopt.compile(program, threads=2).session().run(None, {"x": x.numpy()})
    assert torch.equal(torch.from_numpy(found), *program(x))


@pytest.mark.parametrize("sign", [255, -255])
def test_the_largest_sums_do_not_saturate(sign: int) -> None:
    depth = 33024

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((3, depth), sign).to(torch.int16), False)
            self.filters = nn.Parameter(self.weight.view(3, -1, 4, 4).clone(), False)
            self.register_buffer("one", torch.tensor(1.0))

        def forward(self, x: Tensor) -> Any:
            window = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
            images = ops.qconv(
                x.view(2, -1, 4, 4), self.one, None, self.filters, self.one, None, *REST, **window, **NUMBER
            )
            return ops.qlinear(x, self.one, None, self.weight, self.one, None, *REST, **NUMBER), images

    x = torch.full((2, depth), 255, dtype=torch.uint8)
    session = graphopt.compile(capture(Deep(), (x,)), threads=2).session()
    for array in session.run(None, {"x": x.numpy()}):
        assert np.array_equal(array.ravel(), np.full(6, 255 * sign * depth, np.float32))


def test_what_is_missing_is_as_little_as_can_be() -> None:
    weight = torch.tensor([[-128, 127], [-127, 128], [-255, 0], [0, 255], [5, -3]]).to(torch.int16)
    shifted = Shifted.of(weight)
    assert shifted.shift is not None and shifted.shift.tolist() == [0, 1, -127, 128, 0]
    assert torch.equal(shifted.codes.int() + shifted.shift[:, None], weight.int())
    assert Shifted.of(weight[:1]).shift is None and Shifted.of(weight[:1].to(torch.int8)).shift is None
