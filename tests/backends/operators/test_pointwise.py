"""Element-wise operators: every row of the table, dtypes, scalars, broadcasting and special values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.errors import CompileError

Check = Callable[..., None]

Cases = dict[str, Callable[..., Any]]

UNARY: Cases = {
    "neg": torch.neg,
    "abs": torch.abs,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "leaky_relu_slope": lambda x: F.leaky_relu(x, 0.3),
    "elu": F.elu,
    "elu_alpha": lambda x: F.elu(x, 0.7),
    "softplus": F.softplus,
    "mish": F.mish,
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "log_sigmoid": F.logsigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "log": lambda x: torch.log(x.abs() + 0.1),
    "log2": lambda x: torch.log2(x.abs() + 0.1),
    "log10": lambda x: torch.log10(x.abs() + 0.1),
    "log1p": lambda x: torch.log1p(x.abs()),
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.1),
    "square": torch.square,
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 0.1),
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": lambda x: torch.tan(x * 0.2),
    "atan": torch.atan,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "round_half": lambda x: torch.round(torch.round(x * 2) / 2),
    "trunc": torch.trunc,
    "frac": torch.frac,
    "sign": torch.sign,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "isfinite": torch.isfinite,
    "logical_not": torch.logical_not,
    "signbit": torch.signbit,
    "clamp": lambda x: x.clamp(-0.5, 0.75),
    "clamp_min": lambda x: x.clamp(min=0.1),
    "clamp_max": lambda x: x.clamp(max=0.1),
    "clamp_min_op": lambda x: torch.clamp_min(x, -0.25),
    "clamp_max_op": lambda x: torch.clamp_max(x, 1),
    "clamp_int": lambda x: x.clamp(-1, 1),
    "clamp_tensor": lambda x: torch.clamp(x, x - 1, x * 0.5),
    "clamp_crossed": lambda x: x.clamp(1.0, -1.0),
    "nan_to_num": lambda x: torch.nan_to_num(x, 1.0),
    "clone": lambda x: x.clone(),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "threshold": lambda x: F.threshold(x, 0.2, -3.0),
}

SCALARS: Cases = {
    "add_int": lambda x: x + 2,
    "add_float": lambda x: x + 2.5,
    "add_true": lambda x: x + True,
    "add_alpha": lambda x: torch.add(x, 3, alpha=2),
    "radd": lambda x: 1 + x,
    "sub": lambda x: x - 0.5,
    "sub_alpha": lambda x: torch.sub(x, x, alpha=3),
    "rsub": lambda x: 1 - x,
    "rsub_alpha": lambda x: torch.rsub(x, 4, alpha=2),
    "mul_int": lambda x: x * 3,
    "mul_float": lambda x: x * 0.25,
    "mul_bool": lambda x: x * True,
    "div": lambda x: x / 3,
    "rdiv": lambda x: 2 / (x + 7),
    "div_floor": lambda x: torch.div(x, 2, rounding_mode="floor"),
    "div_trunc": lambda x: torch.div(x, 2, rounding_mode="trunc"),
    "div_floor_negative": lambda x: torch.div(x, -3, rounding_mode="floor"),
    "div_trunc_negative": lambda x: torch.div(x, -3, rounding_mode="trunc"),
    "floor_divide": lambda x: x // 2,
    "floor_divide_float": lambda x: x // 1.5,
    "remainder": lambda x: x % 3,
    "remainder_negative": lambda x: x % -3,
    "remainder_float": lambda x: x % 0.7,
    "fmod": lambda x: torch.fmod(x, 3),
    "pow_0": lambda x: x**0,
    "pow_1": lambda x: x**1,
    "pow_2": lambda x: x**2,
    "pow_3": lambda x: x**3,
    "pow_5": lambda x: x**5,
    "pow_half": lambda x: x.abs() ** 0.5,
    "pow_fraction": lambda x: (x.abs() + 0.1) ** 1.7,
    "pow_negative_fraction": lambda x: (x.abs() + 1) ** -0.5,
    "pow_weights": lambda x: (x.abs().flatten()[:2] + 0.1) ** torch.tensor([0.5, 2.0]),
    "rpow": lambda x: 2.0**x,
    "clip": lambda x: torch.clip(x, -1, 1),
    "sign_squared": lambda x: (lambda s: s * s)(torch.sign(x)),
    "flag_squared": lambda x: (lambda s: s * s)((x > 0).to(x.dtype)),
    "eq": lambda x: x == 1,
    "ne": lambda x: x != 1.0,
    "lt": lambda x: x < 0.5,
    "le": lambda x: x <= 1,
    "gt": lambda x: x > 0.5,
    "ge": lambda x: x >= -1.5,
    "where_scalars": lambda x: torch.where(x > 0, 1.0, 2.0),
    "where_ints": lambda x: torch.where(x > 0, 1, 2),
    "where_scalar_other": lambda x: torch.where(x > 0, x, -1.0),
    "where_scalar_self": lambda x: torch.where(x > 0, 3.0, x),
    "masked_fill": lambda x: x.masked_fill(x > 0.5, -2),
    "masked_fill_infinite": lambda x: x.to(torch.float32).masked_fill(x > 0.5, -math.inf),
    "maximum_scalar": lambda x: torch.maximum(x, torch.tensor(1, dtype=x.dtype)),
    "masked_fill_lowest": lambda x: x.to(torch.float32).masked_fill(x > 0.5, -3.4028235e38),
    "fill": lambda x: torch.full_like(x, 3),
}

BINARY: Cases = {
    "add": torch.add,
    "add_alpha": lambda x, y: torch.add(x, y, alpha=3),
    "sub": torch.sub,
    "rsub": lambda x, y: torch.rsub(x, y),
    "mul": torch.mul,
    "div": torch.div,
    "div_floor": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "div_trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "floor_divide": lambda x, y: x // y,
    "remainder": torch.remainder,
    "fmod": torch.fmod,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "where": lambda x, y: torch.where(x > y, x, y),
    "where_broadcast": lambda x, y: torch.where(y > 0, x, y.to(torch.float64)),
    "masked_fill_tensor": lambda x, y: x.masked_fill(y > 1, torch.tensor(5, dtype=x.dtype)),
    "lerp": lambda x, y: torch.lerp(x.float(), y.float(), 0.25),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=2),
}

BITS: Cases = {
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
    "not": lambda x, y: ~x,
    "and_scalar": lambda x, y: x & 1,
    "or_scalar": lambda x, y: x | 1,
    "xor_scalar": lambda x, y: x ^ 1,
    "eq": lambda x, y: x == y,
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "maximum": lambda x, y: torch.maximum(x, y),
    "logical_not": lambda x, y: torch.logical_not(x),
    "to_float": lambda x, y: x.float() + y.double(),
    "where": lambda x, y: torch.where(x.bool(), y, x),
    "masked_fill": lambda x, y: x.masked_fill(y.bool(), True),
}

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
]
MAIN = (torch.float32, torch.int64)  # every case; the other dtypes take those below
FEWER = (
    *("neg", "abs", "relu", "gelu", "exp", "tanh", "sigmoid", "sqrt", "round", "isnan", "clamp", "elu"),
    *("add_alpha", "rsub_alpha", "mul_int", "div", "rdiv", "floor_divide", "remainder_float", "remainder_negative"),
    *("div_trunc_negative", "pow_3", "pow_fraction", "eq", "lt", "where_scalar_other", "masked_fill", "add_float"),
    *("sub", "maximum", "remainder", "where", "logical_xor", "fmod", "addcmul"),
)


def chosen(cases: Cases, *inputs: Tensor) -> Cases:
    """The cases that PyTorch itself has for these dtypes."""
    found = {}
    for name, case in cases.items():
        try:
            case(*inputs)
        except (RuntimeError, TypeError):
            continue
        if inputs[0].dtype in MAIN or name in FEWER:
            found[name] = case
    return found


def integers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    low = 0 if dtype is torch.uint8 else -9
    return torch.randint(low, 10, shape).to(dtype)


INF = math.inf
SPECIAL = torch.tensor([math.nan, INF, -INF, 0.0, -0.0, 3e38, -3e38, 88.8, -88.0, -104.0, 1.0, -1.0])


def test_unary(agree: Check) -> None:
    """At NaN, infinities and zeros too, in vectors and in the scalar tail; what gelu does is in docs/numerics.md."""
    cases = {name: case for name, case in UNARY.items() if name not in ("gelu", "gelu_tanh")}
    agree(cases, [torch.randn(3, 37) * 3], more=[(SPECIAL.repeat(10)[:111].view(3, 37),)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_unary_of_other_floats(agree: Check, dtype: torch.dtype) -> None:
    x = torch.randn(3, 37).to(dtype) * 3
    agree(chosen(UNARY, x), [x])


@pytest.mark.parametrize("shape", [(), (1,), (17,), (2, 1, 3, 5)])
def test_ranks(agree: Check, shape: tuple[int, ...]) -> None:
    names = ("gelu", "gelu_tanh", "clamp", "neg", "isnan")
    agree({name: UNARY[name] for name in names} | {"add": SCALARS["add_float"]}, [torch.randn(shape)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scalars(agree: Check, dtype: torch.dtype) -> None:
    x = integers((3, 21), dtype)
    agree(chosen(SCALARS, x), [x])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_unary_of_integers(agree: Check, dtype: torch.dtype) -> None:
    x = integers((3, 21), dtype)
    agree(chosen(UNARY, x), [x])


@pytest.mark.parametrize("dtype", DTYPES)
def test_binary(agree: Check, dtype: torch.dtype) -> None:
    x, y = integers((4, 3, 19), dtype), integers((3, 1), dtype)
    y = torch.where(y == 0, torch.ones_like(y), y)
    agree(chosen(BINARY, x, y), [x, y])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_bits(agree: Check, dtype: torch.dtype) -> None:
    x, y = integers((5, 18), dtype), integers((18,), dtype)
    x, y = (t if dtype is not torch.bool else torch.rand(t.shape) > 0.5 for t in (x, y))
    agree(BITS, [x, y])


def test_division_of_integers_never_traps(compiled: Callable[..., Any]) -> None:
    """PyTorch raises for a divisor of 0; compiled code gives 0, and the lowest number / -1 wraps around."""
    cases = {
        "floor": lambda x, y: x // y,
        "trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
        "rest": BINARY["remainder"],
    }
    run = compiled(cases, [torch.tensor([7, 7, 7]), torch.tensor([2, 3, 4])])
    low = torch.iinfo(torch.int64).min
    results = run(torch.tensor([5, low, -7]), torch.tensor([0, -1, 2]))
    assert [r.tolist() for r in results] == [[0, low, -4], [0, low, -3], [0, 0, 1]]


def test_promotion(agree: Check) -> None:
    names = ("add", "sub", "mul", "div", "maximum", "lt", "eq", "where", "remainder", "pow")
    cases = {name: case for name, case in (BINARY | {"pow": lambda x, y: (x.abs() + 1) ** y}).items() if name in names}
    flags = {f"flag_{name}": lambda x, y, f=cases[name]: f(x > 0, y) for name in ("add", "mul", "eq", "where")}
    agree(cases | flags, [integers((3, 17), torch.int64), torch.randn(17).abs() + 0.5])


def test_powers(agree: Check) -> None:
    exponents = (-3, -1, -0.5, 0.0, 2.5, 7, 12)
    cases: Cases = {f"power {e}": lambda x, e=e: (x.abs() + 0.5) ** e for e in exponents}
    cases |= {"of negative": lambda x: x**3.0, "tensor": lambda x: (x.abs() + 1) ** x, "square root": lambda x: x**0.5}
    cases |= {"integer": lambda x: (x * 3).long() ** 5, "base": lambda x: 3**x, "nan": lambda x: x**1.5}
    agree(cases, [torch.randn(3, 17)])


def test_power_of_integers_that_varies_is_refused(compiled: Callable[..., Any]) -> None:
    with pytest.raises(CompileError, match="raises integers to a power that varies"):
        compiled({"power": lambda x: x**x}, [torch.tensor([1, 2, 3])])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_casts(agree: Check, dtype: torch.dtype) -> None:
    agree({str(to): lambda x, to=to: x.to(to) for to in [*DTYPES, torch.bool]}, [integers((3, 21), dtype)])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_shifts(agree: Check, dtype: torch.dtype) -> None:
    """By more places than there are, and by less than none, too."""
    places = torch.tensor([0, 1, 7, 8, 31, 32, 63, 64, 200, 3] + ([] if dtype is torch.uint8 else [-1])).to(dtype)
    x = integers((4, len(places)), dtype)
    agree(
        {"left": torch.bitwise_left_shift, "right": torch.bitwise_right_shift, "by": lambda x, n: x << 3}, [x, places]
    )


def test_library_functions_of_shared_values(agree: Check) -> None:
    """Values that several nodes of one kernel read are bound to variables, calls of the C library take scalars."""

    def chain(x: Tensor) -> Tensor:
        y = torch.exp(x) + 1
        z = torch.log1p(y) * y + torch.expm1(y * 0.1)
        return torch.round(z) * z + torch.fmod(z, y)

    agree({"chain": chain, "matmul": lambda x: chain(x @ torch.ones(17, 20))}, [torch.randn(3, 17) * 0.1])


def test_constants_of_every_dtype(agree: Check) -> None:
    cases: Cases = {str(d): lambda x, d=d: (x + torch.arange(5).to(d)).float() for d in DTYPES}
    cases |= {f"scalar {d}": lambda x, d=d: (x * torch.tensor(3, dtype=d)).float() for d in DTYPES}
    agree(cases, [torch.randn(2, 5)])


def test_broadcasting_and_dynamic_sizes(agree: Check) -> None:
    cases = {
        "rows": lambda x, y: x + y,
        "columns": lambda x, y: x * y[:, :1],
        "scalar": lambda x, y: x - y.sum(),
        "outer": lambda x, y: x.unsqueeze(0) - y.unsqueeze(1),
        "size": lambda x, y: x / x.shape[0] + y.shape[1],
        "size_fraction": lambda x, y: x * (x.shape[0] / 3) - y * (1 / y.shape[1]),
        "size_root": lambda x, y: x * x.shape[1] ** -0.5 + (2 * y.shape[1] ** 0.5 + 1),
        "size_clamp": lambda x, y: x.clamp(max=0.5) * (x.shape[0] * x.shape[1] - 1),
        "chain": lambda x, y: torch.tanh(x * 2) * (y + 1) - x,
    }
    sizes = [(1, 1), (2, 16), (7, 31), (1, 33)]
    agree(
        cases,
        [torch.randn(3, 5), torch.randn(3, 5)],
        [{0: "batch", 1: "seq"}, {0: "batch", 1: "seq"}],
        [(torch.randn(n, m), torch.randn(n, m)) for n, m in sizes],
    )


def test_special_values_of_pairs(agree: Check) -> None:
    names = ("maximum", "minimum", "eq", "ne", "lt", "le", "where", "add", "mul", "logical_and", "logical_xor")
    cases = {name: BINARY[name] for name in names}
    agree(cases, [SPECIAL.repeat(3).unsqueeze(1).contiguous(), SPECIAL.repeat(3)])


def test_signs_of_zero(agree: Check) -> None:
    """1 / -0.0 is -inf: the sign survives where PyTorch keeps it."""
    names = ("neg", "relu", "abs", "clone", "sqrt", "round", "trunc", "floor", "ceil")
    cases = {name: lambda x, f=UNARY[name]: 1 / f(x) for name in names}
    agree(cases, [torch.tensor([0.0, -0.0, 2.0, -2.0])])


def test_denormals_may_be_zero(compiled: Callable[..., Any]) -> None:
    tiny = torch.tensor([1e-40, -1e-40, 1e-38 * 0.1, 2e-38])
    cases = {"copy": lambda x: x * 1, "sum": lambda x: x + x, "exp": lambda x: torch.exp(x * 0 - 90)}
    run = compiled(cases, [tiny])
    for result, want in zip(run(tiny), run.program(tiny), strict=True):
        assert ((result == want) | (result == 0)).all()


def test_nothing_cancels_that_may_be_nan(compiled: Callable[..., Any]) -> None:
    """Algebra of the reals that floats do not obey; a sign of zero shows in the reciprocal."""
    cases: dict[str, Callable[[Tensor], Any]] = {
        "minus_itself": lambda x: x - x,
        "equal": lambda x: x == x,
        "times_zero": lambda x: 1 / (x * 0),
        "times_minus_zero": lambda x: 1 / (-0.0 * x),
        "zero_over": lambda x: 1 / (0.0 / x),
        "minus_later": lambda x: (x + 1) - x,
        "minus_from_zero": lambda x: 1 / (0 - x),
        "lerp": lambda x: torch.lerp(x, x, 0.25),
        "floored": lambda x: torch.div(torch.tensor([-1.5]), x.abs(), rounding_mode="floor"),
        "filtered": lambda x: torch.where(x == x, x, 2.0),
    }
    x = torch.tensor([1.5, math.nan, math.inf, -math.inf, 0.0, -0.0, -3e37, 1e-3])
    for dtype in (torch.float32, torch.float64, torch.float16):
        run = compiled(cases, [x.to(dtype)])
        for spec, result, want in zip(run.program.outputs, run(x.to(dtype)), run.program(x.to(dtype)), strict=True):
            assert torch.equal(torch.nan_to_num(result, 7), torch.nan_to_num(want, 7)), (spec.name, result, want)
