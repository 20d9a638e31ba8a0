"""qdq-fusion on small graphs: where each rule fires, where it must not, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import graphopt
from graphopt.contract import PassContext, PassResult
from graphopt.errors import PassError
from graphopt.passes.qdq_fusion import QDQFusion
from graphopt.program import Program

F = nn.functional
ops = torch.ops.graphopt


class Quantized(nn.Module):
    """A function of numbers and of what quantizes them."""

    bias: Tensor
    mask: Tensor
    low: Tensor
    high: Tensor
    codes: Tensor

    def __init__(self, function: Callable[..., Any], **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in tensors.items():
            self.register_buffer(name, value)
        for name, scale in (("step", 0.05), ("fine", 0.011), ("wide", 0.3)):
            self.register_buffer(name, torch.tensor(scale))
        self.register_buffer("zero", torch.tensor(120, dtype=torch.uint8))
        self.register_buffer("signed", torch.tensor(-5, dtype=torch.int8))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)

    def q(self, x: Tensor, scale: str = "step", **options: Any) -> Tensor:
        result: Tensor = ops.quantize(x, getattr(self, scale), self.zero, **{**BYTE, **options})
        return result

    def d(self, x: Tensor, scale: str = "step", axis: int | None = None) -> Tensor:
        result: Tensor = ops.dequantize(x, getattr(self, scale), self.zero, axis=axis, qmin=0, qmax=255, dtype=F32)
        return result

    def qd(self, x: Tensor, scale: str = "step") -> Tensor:
        return self.d(self.q(x, scale), scale)

    def w(self, name: str = "weight", axis: int | None = 0) -> Tensor:
        codes, scales = getattr(self, name), getattr(self, f"{name}_scale")
        result: Tensor = ops.dequantize(codes, scales, None, axis=axis, qmin=-127, qmax=127, dtype=F32)
        return result


F32 = torch.float32
BYTE = {"qmin": 0, "qmax": 255, "dtype": torch.uint8}


def weights(*shape: int, scales: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    scale = torch.rand(shape[0] if scales is None else scales, generator=generator) / 400 + 1e-3
    return {"weight": codes, "weight_scale": scale, "bias": torch.randn(shape[0], generator=generator)}


def fused(module: Quantized, *inputs: Tensor) -> tuple[Program, Program, PassResult]:
    """The program before and after, which agree: codes but for one step near to halves."""
    program = graphopt.capture(module, inputs)
    result = QDQFusion().run(program, PassContext(target="cpu"))
    for before, after in zip(program(*inputs), result.program(*inputs), strict=True):
        apart = (before.double() - after.double()).abs()
        assert float(apart.max()) <= (1 if not before.is_floating_point() else 0.31)
        assert float((apart > 1e-4).double().mean()) < 0.01
    again = QDQFusion().run(result.program, PassContext(target="cpu"))
    assert not again.rewrites or {rewrite.rule for rewrite in again.rewrites} <= {"qdq-fusion/unsigned"}
    return program, result.program, result


def names(program: Program) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in program.nodes() if node.op == "call_function"]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 24, generator=torch.Generator().manual_seed(0)) * 3


def test_linear_with_bias_activation_and_quantize(x: Tensor) -> None:
    module = Quantized(lambda m, x: m.q(F.gelu(F.linear(m.qd(x), m.w(), m.bias)), "fine"), **weights(16, 24))
    _, after, result = fused(module, x)
    assert names(after) == ["graphopt.quantize", "graphopt.qlinear"]
    assert [d.reason for d in result.declined] == ["the program's input is numbers"]
    assert "0 at a fallback" in result.notes[-1]


def test_clip_residual_and_numbers(x: Tensor) -> None:
    def run(m: Quantized, x: Tensor) -> Any:
        up = m.q(F.relu(F.linear(m.qd(x), m.w(), m.bias) + m.qd(x[:, :16], "wide")), "fine")
        return up, F.linear(m.qd(x, "wide"), m.w())

    _, after, _ = fused(Quantized(run, **weights(16, 24)), x)
    assert names(after).count("graphopt.qlinear") == 2 and "aten.relu" not in names(after)
    (node,) = [n for n in after.nodes() if "qlinear" in str(n.target) and n.kwargs["dtype"] == torch.uint8]
    assert node.kwargs["qmin"] == 120  # the code of 0


def test_a_bias_in_steps_of_the_sums_is_added_to_them(x: Tensor) -> None:
    def run(m: Quantized, x: Tensor) -> Tensor:
        bias = ops.dequantize(m.codes, m.bias_scale, None, axis=0, qmin=-(2**31), qmax=2**31 - 1, dtype=F32)
        return m.q(F.linear(m.qd(x), m.w(), bias))

    given = weights(16, 24)
    given["codes"] = torch.arange(16, dtype=torch.int32) * 50
    exact = (torch.tensor(0.05).double() * given["weight_scale"].double()).float()
    for scale, dtype in ((exact, torch.int32), (exact * 1.01, torch.float32)):
        _, after, _ = fused(Quantized(run, bias_scale=scale, **given), x)
        (node,) = [n for n in after.nodes() if "qlinear" in str(n.target)]
        bias = node.args[5]
        assert isinstance(bias, Node) and bias.meta["val"].dtype == dtype


def test_convolution_pool_and_sum() -> None:
    def run(m: Quantized, x: Tensor) -> Tensor:
        a = m.qd(F.conv2d(m.qd(x), m.w(), m.bias, stride=2, padding=1))
        a = m.qd(F.max_pool2d(a, 3, 1, 1))
        return m.q(F.relu(a + m.qd(x[:, :8, ::2, ::2], "fine")), "wide")

    _, after, result = fused(Quantized(run, **weights(8, 12, 3, 3)), torch.randn(2, 12, 8, 8))
    assert [name for name in names(after) if "quant" not in name and "slice" not in name] == [
        "graphopt.qconv",
        "aten.max_pool2d",
        "graphopt.qadd",
    ]
    assert "0 at a fallback" in result.notes[-1]


@pytest.mark.parametrize(
    ("sides", "options", "padding"),
    [
        ((0, 1, 0, 1), {"stride": 2}, [0, 0, 1, 1]),
        ((1, 1, 2, 2), {}, [2, 1]),
        ((2, 0, 1, 0), {"padding": 1, "dilation": 2}, [2, 3, 1, 1]),
        ((0, 1, 1, 0), {"groups": 3, "stride": 2}, [1, 0, 0, 1]),
        ((3, 0, 0, 0), {}, None),  # further than the window reaches
        ((-1, 0, 0, 0), {}, None),
        ((0, 0, 0, 0, 6, 0), {"channels": 6}, None),
    ],
)
def test_what_is_padded_before_a_convolution_is_its_own_padding(
    sides: tuple[int, ...], options: dict[str, int], padding: list[int] | None
) -> None:
    def run(m: Quantized, x: Tensor) -> Tensor:
        given = {name: value for name, value in options.items() if name != "channels"}
        return m.q(F.conv2d(F.pad(m.qd(x), sides), m.w(), m.bias, **given))

    module = Quantized(run, **weights(6, 12 // options.get("groups", 1), 3, 3))
    images = torch.randn(2, 12 - options.get("channels", 0), 9, 9, generator=torch.Generator().manual_seed(0)) * 3
    program, after, result = fused(module, images)
    assert torch.equal(program(images)[0], after(images)[0]) and "0 at a fallback" in result.notes[-1]
    kept = [] if padding else ["aten.constant_pad_nd"]
    assert names(after) == ["graphopt.quantize", *kept, "graphopt.qconv"]
    (node,) = [n for n in after.nodes() if "qconv" in str(n.target)]
    assert node.kwargs["padding"] == (padding or [0, 0])


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 2, "dilation": 2},
        {"stride": 3, "groups": 4},
        {"padding": "same"},
        {"padding": "valid", "groups": 12},
    ],
)
def test_convolutions_over_one_axis(options: dict[str, Any]) -> None:
    def run(m: Quantized, x: Tensor) -> Any:
        y = F.conv1d(F.pad(m.qd(x), (1, 0)), m.w(), m.bias, **options)
        first = m.q(F.gelu(y + m.qd(x.mean(2, keepdim=True).expand(y.shape), "fine")), "fine")
        return first, F.conv1d(m.qd(x), m.w(), **options)

    module = Quantized(run, **weights(12, 12 // options.get("groups", 1), 3))
    _, after, result = fused(module, torch.randn(2, 12, 31, generator=torch.Generator().manual_seed(0)) * 3)
    assert names(after).count("graphopt.qconv") == 2 and "aten.conv1d" not in names(after)
    assert "0 at a fallback" in result.notes[-1]
    x = torch.randn(2, 12, 31, generator=torch.Generator().manual_seed(4))
    session = graphopt.compile(after, threads=2).session()
    for array, wanted in zip(session.run(None, {"inputs.0": x.numpy()}), after(x), strict=True):
        assert (torch.from_numpy(array).double() - wanted.double()).abs().max() <= (
            0 if array.dtype == "uint8" else 1e-4
        )


def test_padding_with_a_number_that_has_a_code_is_exact(x: Tensor) -> None:
    def run(m: Quantized, x: Tensor) -> Any:
        ends = [m.q(F.pad(m.qd(x), (1, 2), value=value)) for value in (0.0, 3.5, 0.07, -1e9)]
        other = m.q(F.pad(m.qd(x), (1, 2), value=0.07), "fine")  # no code of the first scale stands for it
        return *ends, m.q(F.pad(m.qd(x[None]), (2, 1), "reflect")), other

    program, after, result = fused(Quantized(run), x)
    assert all(torch.equal(a, b) for a, b in zip(program(x), after(x), strict=True))
    assert names(after).count("graphopt.dequantize") == 1
    assert "pad has no form on codes" in result.notes[-1]


def test_moves_and_chains_are_exact(x: Tensor) -> None:
    def run(m: Quantized, x: Tensor) -> Any:
        moved = m.q(m.qd(x).reshape(5, 4, 6).transpose(1, 2))
        other = m.q(m.qd(x).t(), "fine")
        y = m.qd(x)
        chain = m.q(0.5 * y * (1 + torch.erf(y / 1.4142)), "fine")
        joined = m.q(torch.cat([m.qd(x), m.qd(x, "wide")]))
        return moved, other, chain, joined

    program, after, _ = fused(Quantized(run), x)
    assert all(torch.equal(a, b) for a, b in zip(program(x), after(x), strict=True))
    assert "graphopt.dequantize" not in names(after) and names(after).count("graphopt.table256") == 3


def test_codes_of_constants_are_constants(x: Tensor) -> None:
    module = Quantized(lambda m, x: m.q(m.qd(x) + m.qd(m.number, "fine"), "wide"), number=torch.linspace(-3, 3, 24))
    _, after, _ = fused(module, x)
    assert names(after) == ["graphopt.quantize", "graphopt.qadd"]


def test_sizes_that_vary_stay_so() -> None:
    def run(m: Quantized, images: Tensor) -> Tensor:
        y = m.qd(F.conv2d(F.pad(m.qd(images), (0, 1, 2, 1)), m.w(), m.bias, stride=2))
        return m.q(m.qd(F.max_pool2d(y, 2)).mean((2, 3)), "fine")

    images = torch.randn(2, 4, 12, 12)
    module = Quantized(run, **weights(8, 4, 3, 3))
    program = graphopt.capture(module, (images,), dynamic_shapes={"inputs.0": {0: "batch"}})
    result = QDQFusion(fail_on_fallback=True).run(program, PassContext(target="cpu"))
    assert names(result.program) == ["graphopt.quantize", "graphopt.qconv", "aten.max_pool2d", "graphopt.qsum"]
    sizes = [str(node.meta["val"].shape[0]) for node in result.program.nodes() if node.op == "call_function"]
    assert len(set(sizes)) == 1 and not sizes[0].isdigit()
    session = graphopt.compile(result.program, threads=1).session()
    for batch in (1, 5):
        some = torch.randn(batch, 4, 12, 12)
        (found,) = session.run(None, {"inputs.0": some.numpy()})
        assert torch.equal(torch.from_numpy(found), result.program(some)[0])


def test_differences_and_multiples_are_sums_of_other_scales(x: Tensor) -> None:
    def run(m: Quantized, x: Tensor) -> Any:
        a, b = m.qd(x), m.qd(x.flip(0), "fine")
        return m.q(a - b, "wide"), m.q(torch.relu(torch.add(a, b, alpha=3)), "wide"), m.q(b - a, "fine")

    program, after, _ = fused(Quantized(run), x)
    assert names(after).count("graphopt.qadd") == 3 and "graphopt.dequantize" not in names(after)
    wanted, found, session = program(x), after(x), graphopt.compile(after, threads=1).session()
    for array, a, b in zip(session.run(None, {"inputs.0": x.numpy()}), found, wanted, strict=True):
        assert (a.int() - b.int()).abs().max() <= 1 and (a != b).float().mean() < 0.1
        assert torch.equal(torch.from_numpy(array), a)


def test_signed_codes_become_unsigned(x: Tensor) -> None:
    def run(m: Quantized, x: Tensor) -> Tensor:
        signed = {"qmin": -128, "qmax": 127}
        codes = ops.quantize(x, m.step, m.signed, **signed, dtype=torch.int8)
        y = F.linear(ops.dequantize(codes, m.step, m.signed, **signed, dtype=F32), m.w())
        result: Tensor = ops.quantize(y, m.step, m.signed, **signed, dtype=torch.int8)
        return result

    _, after, _ = fused(Quantized(run, **weights(16, 24)), x)
    first = next(n for n in after.nodes() if "quantize" in str(n.target))
    assert first.kwargs["dtype"] == torch.uint8 and after(x)[0].dtype == torch.int8


def test_matrix_products_of_activations() -> None:
    def run(m: Quantized, a: Tensor, b: Tensor) -> Tensor:
        return m.q(m.qd(a) @ m.qd(b, "fine"), "wide")

    _, after, _ = fused(Quantized(run), torch.randn(2, 7, 16), torch.randn(2, 16, 9))
    assert "graphopt.qmatmul" in names(after)
    _, after, result = fused(Quantized(run), torch.randn(1, 1, 200000), torch.randn(1, 200000, 1))
    assert "graphopt.qmatmul" not in names(after)
    assert "200000 products of two activations may not fit int32" in result.notes[-1]


def test_a_quantize_goes_before_moves(x: Tensor) -> None:
    def run(m: Quantized, x: Tensor) -> Any:
        y = F.gelu(m.qd(x))
        return m.q(y.reshape(5, 4, 6).transpose(1, 2), "fine"), m.q(F.linear(m.qd(x, "wide"), m.w()).view(-1), "fine")

    program, after, result = fused(Quantized(run, **weights(16, 24)), x)
    assert torch.equal(program(x)[0], after(x)[0])
    assert "graphopt.dequantize" not in names(after) and "aten.gelu" not in names(after)
    assert "2 x the program's input is numbers" in result.notes[-1]


def test_what_is_read_twice_or_given_out_keeps_its_quantize_behind_it(x: Tensor) -> None:
    def run(m: Quantized, x: Tensor) -> Any:
        y = F.gelu(m.qd(x)).reshape(24, 5)
        return m.q(y, "fine"), y

    _, after, _ = fused(Quantized(run), x)
    order = names(after)
    assert "aten.gelu" in order and order.count("graphopt.quantize") == 2
    assert order[-1] == "graphopt.quantize"


def test_no_code_stands_for_nan(x: Tensor) -> None:
    def run(m: Quantized, x: Tensor) -> Any:
        y = m.qd(x)
        guarded = y.masked_fill(torch.isnan(y), 0.0)
        return m.q(guarded), m.q(guarded, "fine")

    program, after, _ = fused(Quantized(run), x)
    assert names(after) == ["graphopt.quantize", "graphopt.table256"]
    assert all(torch.equal(a, b) for a, b in zip(program(x), after(x), strict=True))


def test_a_guard_of_numbers_that_are_no_codes_stays(x: Tensor) -> None:
    x[0, 0] = float("nan")
    module = Quantized(lambda m, x: m.q(F.linear(m.qd(x.masked_fill(torch.isnan(x), 2.0)), m.w())), **weights(16, 24))
    _, after, _ = fused(module, x)
    assert "aten.masked_fill.Scalar" in names(after)


@pytest.mark.parametrize("extreme", [float("inf"), -float("inf"), float("nan")])
def test_infinities_and_nan_before_a_table(x: Tensor, extreme: float) -> None:
    x[0, 0] = extreme
    module = Quantized(lambda m, x: m.q(torch.log(m.qd(x)), "fine"))  # NaN and -inf for half of the codes
    program, after, _ = fused(module, x)
    assert torch.equal(program(x)[0], after(x)[0]) and "graphopt.table256" in names(after)


def test_choices_between_codes_and_constants_are_exact(x: Tensor) -> None:
    def run(m: Quantized, x: Tensor) -> Any:
        mask = m.mask
        filled = m.q(m.qd(x).masked_fill(mask, -1.5), "fine")
        chosen = m.q(torch.where(x > 0.3, m.qd(x), m.qd(x, "wide")), "fine")
        constants = m.q(torch.where(x > 0.3, m.low, m.high), "wide")
        return filled, chosen, constants

    mask = torch.rand(5, 24, generator=torch.Generator().manual_seed(4)) > 0.5
    numbers = {"low": torch.tensor(0.0), "high": torch.tensor(-3.4e38)}
    program, after, result = fused(Quantized(run, mask=mask, **numbers), x)
    assert all(torch.equal(a, b) for a, b in zip(program(x), after(x), strict=True))
    assert (
        "graphopt.dequantize" not in names(after)
        and names(after).count("aten.where") + names(after).count("aten.where.self") == 3
    )
    assert "0 at a fallback" in result.notes[-1]


def test_a_constant_is_joined_with_codes(x: Tensor) -> None:
    codes = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    for scale, tables in (("step", 0), ("wide", 0)):

        def run(m: Quantized, x: Tensor, scale: str = scale) -> Any:
            return m.q(torch.cat([m.d(m.codes, scale), m.qd(x)]))

        program, after, _ = fused(Quantized(run, codes=codes), x)
        assert torch.equal(program(x)[0], after(x)[0]) and names(after).count("graphopt.table256") == tables
        assert "graphopt.dequantize" not in names(after)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda m, x: (m.q(y := F.linear(m.qd(x), m.w())), y), None),
        (lambda m, x: m.q(F.linear(x, m.w())), "its input is not dequantized from 8-bit codes"),
        (lambda m, x: m.q(F.linear(m.qd(x), m.w(axis=1))), "its weight has scales along axis 1"),
        (lambda m, x: m.q(F.linear(m.qd(x), m.w() * 2)), "its weight is not dequantized"),
        (lambda m, x: m.q(torch.cumsum(m.qd(x), 1)), "cumsum has no form on codes"),
    ],
)
def test_what_is_left_is_listed(x: Tensor, run: Any, reason: str | None) -> None:
    square = Quantized(run, **weights(24, 24))
    program, after, result = fused(square, x)
    if reason is None:  # the numbers are read by others: only the product itself is fused
        assert names(after).count("graphopt.quantize") == 2
        return
    assert any(reason in declined.reason for declined in result.declined), result.declined
    with pytest.raises(PassError, match="conversions are left at operators that are computed in float32"):
        QDQFusion(fail_on_fallback=True).run(program, PassContext(target="cpu"))


def test_narrow_bounds_are_kept(x: Tensor) -> None:
    module = Quantized(lambda m, x: m.q(F.linear(m.qd(x), m.w()), "fine", qmin=3, qmax=127), **weights(16, 24))
    _, after, _ = fused(module, x)
    found = after(x)[0]
    assert (int(found.min()), int(found.max())) == (3, 127)


@pytest.mark.parametrize(
    ("value", "code"),
    [(None, 120), (0.5, 130), (0.51, None)],
)
def test_codes_are_padded_where_one_stands_for_what_they_are_padded_with(value: float | None, code: int | None) -> None:
    def run(m: Quantized, x: Tensor) -> Tensor:
        return m.q(F.conv2d(F.pad(m.qd(x), (0, 1, 0, 1), "constant", value), m.w(), m.bias, stride=2))

    _, after, result = fused(Quantized(run, **weights(8, 4, 3, 3)), torch.randn(2, 4, 8, 8))
    assert ("graphopt.qconv" in names(after)) is (code is not None)
    assert (" 0 at a fallback" in result.notes[-1]) is (code is not None)
    for node in after.nodes():
        if str(node.target) == "aten.constant_pad_nd.default":
            assert node.args[2] == code
