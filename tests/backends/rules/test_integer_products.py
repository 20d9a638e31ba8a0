"""Products of codes on every level: int32 sums bit for bit, and codes as the specification rounds them.

`compile` checks every case too: code for another machine runs here with the same sums made of other instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.arrays import array_of, tensor_of
from graphopt.backends.rules.integer_gemm import pack_words, words_of
from graphopt.backends.target import LEVELS, resolve_target
from graphopt.capture import capture
from graphopt.compile import Artifact
from graphopt.operators import integer_products  # noqa: F401

qlinear, qconv = torch.ops.graphopt.qlinear, torch.ops.graphopt.qconv
BYTE, NUMBER = {"dtype": torch.uint8}, {"dtype": torch.float32}
QUADS = "cpu:x86-64-v4-bf16"
KINDS = ["cpu:x86-64-v3", "cpu:x86-64-v3-vnni", "cpu:x86-64-v4", QUADS, "cpu:aarch64", "cpu:cortex-a78ae"]
SOME = [kind if kind == QUADS else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


def codes(*shape: int, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Tensor:
    low = 0 if dtype == torch.uint8 else -128
    return torch.randint(low, low + 256, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, False)


def compiled(module: nn.Module, inputs: tuple[Any, ...], target: str, dynamic: Any = None) -> tuple[Artifact, Any]:
    """The artifact and its program; compiling has compared their results, codes with codes."""
    program = capture(module, inputs, dynamic_shapes=dynamic)
    artifact = graphopt.compile(program, target=target, threads=2)
    return artifact, program


def rules(artifact: Artifact) -> set[str]:
    return {kernel.rule for kernel in artifact.manifest.variants[0].kernels.values()}


class Linears(nn.Module):
    """Tails of every kind: rows, columns, depth, in all the ways that sums go on."""

    SHAPES = ((1, 1), (3, 15), (4, 16), (33, 47), (384, 48), (130, 97))
    WAYS = ("numbers", "codes", "bias", "float_bias", "residual", "gelu")

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weights = nn.ParameterList([frozen(codes(n, k, dtype=torch.int8, seed=k)) for k, n in self.SHAPES])
        generator = torch.Generator().manual_seed(0)
        self.scales = nn.ParameterList([frozen(torch.rand(n, generator=generator) / 50 + 1e-4) for _, n in self.SHAPES])
        self.register_buffer("step", torch.tensor(0.02))
        self.register_buffer("zero", torch.tensor(99, dtype=dtype))
        self.register_buffer("into", torch.tensor(0.7))
        self.register_buffer("origin", torch.tensor(113, dtype=torch.uint8))
        self.whole = nn.ParameterList([frozen(torch.arange(n, dtype=torch.int32) * 999 - 9999) for _, n in self.SHAPES])
        self.number = nn.ParameterList([frozen(torch.randn(n, generator=generator)) for _, n in self.SHAPES])

    def forward(self, x: Tensor, added: Tensor) -> dict[str, Tensor]:
        found = {}
        for number, (weight, scale) in enumerate(zip(self.weights, self.scales, strict=True)):
            n, k = weight.shape
            way = self.WAYS[number]
            bias = {"bias": self.whole, "float_bias": self.number, "residual": self.number}.get(way, [None] * 9)
            residual = (added[:, :n], self.step, self.origin) if way == "residual" else (None, None, None)
            result = (None, None) if way == "numbers" else (self.into, self.origin)
            options: Mapping[str, Any] = {"activation": "gelu"} if way == "gelu" else {}
            given = (x[:, :k], self.step, self.zero, weight, scale, bias[number])
            found[way] = qlinear(*given, *result, *residual, **(NUMBER if way == "numbers" else BYTE), **options)
        return found


@pytest.mark.parametrize("target", SOME)
@pytest.mark.parametrize("dtype", [torch.uint8, pytest.param(torch.int8, marks=pytest.mark.slow)])
def test_every_tail_of_rows_columns_and_depth(target: str, dtype: torch.dtype) -> None:
    for rows, dynamic in ((7, None), (67, {"x": {0: "rows"}, "added": {0: "rows"}})):
        inputs = (codes(rows, 384, dtype=dtype), codes(rows, 97, seed=9))
        artifact, _ = compiled(Linears(dtype), inputs, target, dynamic)
        assert "integer-gemm" in rules(artifact) and "packed-gemm" not in rules(artifact)
        if dynamic:
            break


class Deep(nn.Module):
    """The sums furthest from 0 that int32 has to hold, in parts of a panel and under windows."""

    def __init__(self) -> None:
        super().__init__()
        weights = [torch.full((3, 65536), weight).to(torch.int8) for weight in (127, -127, -128)]
        self.weights = nn.ParameterList(map(frozen, weights))
        self.filters = nn.ParameterList(frozen(weight.view(-1, 4096, 4, 4)) for weight in weights)
        self.register_buffer("one", torch.tensor(1.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rest = (self.one, None, *(None,) * 5)
        window = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
        found = []
        for weight, filters in zip(self.weights, self.filters, strict=True):
            found.append(qlinear(x, self.one, None, weight, *rest, **NUMBER))
            found.append(qconv(x.view(-1, 4096, 4, 4), self.one, None, filters, *rest, **window, **NUMBER))
        return tuple(found)


@pytest.mark.parametrize("target", [*KINDS, "cpu:sapphirerapids"])
def test_sums_do_not_saturate(target: str) -> None:
    """Pairs of 255 * 127 leave 16 bits, in which VPMADDUBSW adds them."""
    x = torch.full((5, 65536), 255, dtype=torch.uint8)
    artifact, program = compiled(Deep(), (x,), target)
    kind = "amx" if resolve_target(target).amx else "integer"
    assert rules(artifact) >= {f"{kind}-gemm", f"{kind}-convolution"}
    assert artifact.report["errors"]["main"] == 0
    sums = [255 * weight * 65536 for weight in (127, -127, -128) for _ in range(2)]
    assert [{int(number) for number in each.flatten()} for each in program(x)] == [{wanted} for wanted in sums]


class Images(nn.Module):
    """1 x 1, strided, padded with a zero point that is not 0, dilated, grouped, depthwise; few and odd channels."""

    CASES: tuple[tuple[int, int, int, Mapping[str, Any]], ...] = (
        (16, 24, 1, {}),
        (16, 8, 1, {"stride": 2}),
        (3, 16, 5, {"stride": 2, "padding": 2}),
        (16, 33, 3, {"padding": 1}),
        (8, 8, 3, {"dilation": 2, "padding": 2}),
        (24, 24, 3, {"padding": 1, "stride": 2, "groups": 24}),
        (16, 32, 3, {"padding": 1, "groups": 4}),
        (12, 12, 3, {"padding": 1, "groups": 4}),
        (512, 40, 3, {"padding": 1}),
        (24, 24, 3, {"padding": [0, 0, 1, 1], "stride": 2, "groups": 24}),
        (3, 16, 3, {"padding": [0, 1, 2, 0], "stride": 2}),
        (16, 8, 1, {"padding": [0, 0, 0, 1]}),
        (12, 12, 3, {"padding": [2, 0, 0, 1], "groups": 4}),
        (64, 64, 3, {"padding": 1, "groups": 64}),
        (80, 80, 3, {"padding": [0, 0, 1, 1], "stride": 2, "groups": 80}),
        (96, 96, 5, {"padding": [2, 1, 0, 4], "dilation": [1, 2], "groups": 96}),
        (200, 200, 3, {"padding": [1, 2, 0, 0], "dilation": 2, "stride": [1, 2], "groups": 200}),
        (64, 64, 1, {"groups": 64}),
        (32, 32, 3, {"padding": 1, "groups": 32}),
        (56, 56, 3, {"padding": [1, 0, 1, 2], "stride": 2, "groups": 56}),
        (112, 112, 3, {"padding": 1, "groups": 112}),
    )

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            [
                frozen(codes(o, c // options.get("groups", 1), t, t, dtype=torch.int8, seed=n))
                for n, (c, o, t, options) in enumerate(self.CASES)
            ]
        )
        self.register_buffer("step", torch.tensor(0.01))
        self.register_buffer("into", torch.tensor(1.3))
        self.register_buffer("zero", torch.tensor(131, dtype=torch.uint8))
        counts = [outputs for _, outputs, *_ in self.CASES]
        self.scales = nn.ParameterList([frozen(torch.arange(1, n + 1) / 400) for n in counts])
        self.biases = nn.ParameterList([frozen(torch.arange(n, dtype=torch.int32) * 777 - 9999) for n in counts])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = []
        parameters = zip(self.weights, self.scales, self.biases, self.CASES, strict=True)
        for weight, scales, bias, (inputs, _, _, given) in parameters:
            options = {name: given.get(name, other) for name, other in _DEFAULTS.items()}
            options = {name: value if isinstance(value, list) else [value] * 2 for name, value in options.items()}
            operands = (x[:, :inputs], self.step, self.zero, weight, scales, bias)
            result = (self.into, self.zero, None, None, None)
            found.append(qconv(*operands, *result, **options, groups=given.get("groups", 1), **BYTE))
        return tuple(found)


_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1}


@pytest.mark.parametrize("target", SOME)
def test_convolutions(target: str) -> None:
    artifact, _ = compiled(Images(), (codes(2, 512, 9, 11),), target)
    assert {"integer-gemm", "integer-convolution", "depthwise"} <= rules(artifact)


@pytest.mark.slow
def test_convolutions_of_any_batch() -> None:
    artifact, program = compiled(Images(), (codes(2, 512, 9, 11),), "cpu", {"x": {0: "batch"}})
    x = codes(5, 512, 9, 11, seed=3)
    for spec, array, wanted in zip(
        program.outputs, artifact.session().run(None, {"x": array_of(x)}), program(x), strict=True
    ):
        assert torch.equal(tensor_of(array, spec.dtype), wanted), spec.name


class Summed(nn.Module):
    """A convolution whose codes are added to others, with scales of powers of two, so that many numbers are halves."""

    def __init__(self, step: float, zeros: tuple[int, int, int], bounds: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("weight", codes(72, 20, 1, 1, dtype=torch.int8) % 8)
        self.bounds = {"qmin": bounds[0], "qmax": bounds[1], "dtype": torch.uint8}
        for name, scale in (("coarse", 0.5), ("fine", 0.25), ("step", step)):
            self.register_buffer(name, torch.tensor(scale))
        for name, zero in zip(("x_zero", "y_zero", "sum_zero"), zeros, strict=True):
            self.register_buffer(name, torch.tensor(zero, dtype=torch.uint8))

    def forward(self, x: Tensor, added: Tensor) -> Tensor:
        x, added = x.permute(0, 3, 1, 2), added.permute(0, 3, 1, 2)
        result = (self.step, self.y_zero, None, None, None)
        options = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
        y = qconv(x, self.coarse, self.x_zero, self.weight, self.fine, None, *result, **options, **self.bounds)
        given = (y, self.coarse, self.y_zero, added, self.fine, self.x_zero, self.coarse, self.sum_zero)
        total: Tensor = torch.ops.graphopt.qadd(*given, **self.bounds)
        return total.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("step", "zeros", "bounds"),
    [(32.0, (131, 117, 99), (0, 255)), (16.0, (0, 0, 7), (7, 201)), (1e-9, (128, 3, 250), (0, 255))],
)
def test_sums_of_codes_end_the_product_before_them(step: float, zeros: Any, bounds: Any) -> None:
    """With the smallest step numbers leave int32 before they are clipped."""
    inputs = (codes(2, 5, 7, 20), codes(2, 5, 7, 72, seed=4))
    artifact, program = compiled(Summed(step, zeros, bounds), inputs, "cpu")
    assert rules(artifact) <= {"integer-gemm", "amx-gemm"}
    feed = dict(zip(("x", "added"), map(array_of, inputs), strict=True))
    assert np.array_equal(artifact.session().run(None, feed)[0], array_of(program(*inputs)[0]))


def test_the_target_says_how_codes_are_multiplied() -> None:
    found = {name: words_of(resolve_target(name)).products for name in LEVELS}
    assert found["cpu:x86-64-v4-vnni"] == found["cpu:x86-64-v3-vnni"] == found["cpu:armv8.6-a"] == "4 codes of uint8"
    assert found["cpu:cortex-a78ae"] == "4 codes of int8"
    assert found["cpu:x86-64-v4"] == found["cpu:x86-64-v3"] == found["cpu:aarch64"] == "2 codes of int16"


def test_packing_keeps_words_together() -> None:
    weight = np.arange(-15, 15, dtype=np.int8).reshape(5, 6)
    packed = pack_words(weight, 4, words_of(resolve_target("cpu:x86-64-v4-vnni")))
    assert packed.shape == (2, 2, 4, 4)
    flat = packed.transpose(0, 2, 1, 3).reshape(8, 8)
    assert np.array_equal(flat[:5, :6], weight) and not flat[5:].any() and not flat[:, 6:].any()


class MatrixProducts(nn.Module):
    """Of two computed operands: tails of rows, columns and depth, and either side lying along the depth."""

    SHAPES = ((3, 19, 32, 64), (2, 33, 64, 33), (2, 17, 133, 40), (1, 5, 13, 7), (4, 1, 1, 1), (1, 3, 130, 35))

    step: Tensor
    a_zero: Tensor
    b_zero: Tensor

    def __init__(self, types: tuple[torch.dtype, torch.dtype], zeros: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(0.03))
        for name, zero, dtype in zip(("a_zero", "b_zero"), zeros, types, strict=True):
            self.register_buffer(name, torch.tensor(zero - (128 if dtype == torch.int8 else 0), dtype=dtype))

    def forward(self, operands: list[tuple[Tensor, Tensor]]) -> Any:
        found = []
        for number, (a, b) in enumerate(operands):
            a = a.transpose(-1, -2) if number % 3 == 1 else a
            b = b.transpose(-1, -2) if number % 2 else b
            given = (a, self.step, self.a_zero, b, self.step, self.b_zero)
            found.append(torch.ops.graphopt.qmatmul(*given, None, None, **NUMBER))
            found.append(
                torch.ops.graphopt.qmatmul(
                    *given, self.step, self.a_zero, dtype=self.a_zero.dtype, **BOUNDS[self.a_zero.dtype]
                )
            )
        return found


BOUNDS = {torch.uint8: {"qmin": 0, "qmax": 255}, torch.int8: {"qmin": -128, "qmax": 127}}


def operands_of(types: tuple[torch.dtype, torch.dtype]) -> list[tuple[Tensor, Tensor]]:
    found = []
    for number, (batch, m, k, n) in enumerate(MatrixProducts.SHAPES):
        left = (batch, k, m) if number % 3 == 1 else (batch, m, k)
        right = (batch, n, k) if number % 2 else (batch, k, n)
        found.append((codes(*left, dtype=types[0], seed=number), codes(*right, dtype=types[1], seed=9 - number)))
    return found


@pytest.mark.parametrize("target", SOME)
@pytest.mark.parametrize("zeros", [(0, 128), (117, 131), (255, 0)])
def test_products_of_two_activations(target: str, zeros: tuple[int, int]) -> None:
    types = [(torch.uint8, torch.uint8), (torch.int8, torch.uint8), (torch.uint8, torch.int8)][zeros[0] % 3]
    module, operands = MatrixProducts(types, zeros), operands_of(types)
    artifact, _ = compiled(module, (operands,), target)
    assert "integer-batched-gemm" in rules(artifact) and "generic" not in rules(artifact)
    if "x86" not in target:  # compiling has compared it
        return
    session = artifact.session()
    flat = [x for pair in operands for x in pair]
    names = [each.name for each in session.get_inputs()]
    found = session.run(None, {name: array_of(x) for name, x in zip(names, flat, strict=True)})
    for number, wanted in enumerate(module(operands)):
        assert np.array_equal(found[number], array_of(wanted)), number


def test_an_activation_that_all_of_a_batch_multiply_and_sizes_at_run_time() -> None:
    class Product(MatrixProducts):
        def forward(self, a: Tensor, b: Tensor) -> Any:  # type: ignore[override]
            given = (a, self.step, self.a_zero, b, self.step, self.b_zero)
            return torch.ops.graphopt.qmatmul(*given, None, None, **NUMBER)

    module = Product((torch.uint8, torch.uint8), (3, 250))
    for left, right in (((4, 7, 32), (32, 20)), ((2, 3, 7, 32), (3, 32, 20)), ((1, 7, 32), (5, 32, 20))):
        a, b = codes(*left), codes(*right, seed=1)
        artifact, _ = compiled(module, (a, b), QUADS)
        assert np.array_equal(
            artifact.session().run(None, {"a": array_of(a), "b": array_of(b)})[0], array_of(module(a, b))
        )
    program = capture(module, (codes(2, 7, 32), codes(2, 32, 20)), dynamic_shapes={"a": {1: "m"}, "b": {2: "n"}})
    session = graphopt.compile(program, target=QUADS, threads=2).session()
    for m, n in ((1, 1), (9, 33), (40, 64)):
        a, b = codes(2, m, 32), codes(2, 32, n, seed=3)
        assert np.array_equal(session.run(None, {"a": array_of(a), "b": array_of(b)})[0], array_of(module(a, b)))


@pytest.mark.parametrize("target", ["cpu:x86-64-v4", QUADS])
def test_the_largest_sums_of_two_activations(target: str) -> None:
    """255 times 255 as often as int32 holds it, and 255 times -255."""
    depth = 33000

    class Product(MatrixProducts):
        def forward(self, a: Tensor, b: Tensor) -> Any:  # type: ignore[override]
            given = (a, self.step, self.a_zero, b, self.step, self.b_zero)
            return torch.ops.graphopt.qmatmul(*given, None, None, **NUMBER)

    a = torch.full((1, 3, depth), 255, dtype=torch.uint8)
    for zeros, code in (((0, 0), 255), ((0, 255), 0)):
        module = Product((torch.uint8, torch.uint8), zeros)
        b = torch.full((1, depth, 5), code, dtype=torch.uint8)
        artifact, _ = compiled(module, (a, b), target)
        found = artifact.session().run(None, {"a": array_of(a), "b": array_of(b)})[0]
        assert np.array_equal(found, array_of(module(a, b)))
