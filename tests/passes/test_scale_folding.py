"""Constant scales before and after products: folded, exact, and left alone with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.contract import PassContext
from graphopt.passes.constant_folding import ConstantFolding
from graphopt.passes.gated_attention import GatedAttention
from graphopt.passes.scale_folding import ScaleFolding, reshaped
from tests.passes.checking import captured, check_pass, targets


class Of(nn.Module):
    """`forward(x)` of a module with layers and a scale of the given shape."""

    def __init__(self, forward: Callable[[Of, Tensor], Tensor], *scale: int, out: int = 12) -> None:
        super().__init__()
        self.of = forward
        self.scale = nn.Parameter(torch.randn(scale))
        self.linear, self.second = nn.Linear(8, out), nn.Linear(12, 8)
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        self.grouped = nn.Conv1d(8, 12, 3, padding="same", groups=2)
        self.matrix = nn.Parameter(torch.randn(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self, x)


def of(forward: Callable[[Of, Tensor], Tensor], *scale: int) -> Of:
    torch.manual_seed(0)
    return Of(forward, *scale).eval()


ROWS, MAPS = (3, 5, 8), (2, 8, 6, 6)
FOLDS: dict[str, tuple[Of, tuple[int, ...]]] = {
    "linear": (of(lambda m, x: m.linear(x * m.scale), 8), ROWS),
    "a number": (of(lambda m, x: m.linear(0.3 * x)), ROWS),
    "a quotient": (of(lambda m, x: m.linear(x / m.scale), 8), ROWS),
    "a gate": (of(lambda m, x: m.linear(x * m.scale), 1, 1, 8), ROWS),
    "zeros": (of(lambda m, x: m.linear(x * m.scale.relu()), 8), ROWS),
    "addmm": (of(lambda m, x: torch.addmm(m.linear.bias, x * m.scale, m.matrix, alpha=2), 8), (5, 8)),
    "matmul": (of(lambda m, x: (x * m.scale) @ m.matrix, 8), ROWS),
    "convolution": (of(lambda m, x: m.conv(x / m.scale), 8, 1, 1), MAPS),
    "convolution in groups": (of(lambda m, x: m.grouped(x * m.scale), 8, 1), (2, 8, 7)),
    "after linear": (of(lambda m, x: m.linear(x) * m.scale, 12), ROWS),
    "after linear, a quotient": (of(lambda m, x: m.linear(x) / 3), ROWS),
    "after matmul": (of(lambda m, x: m.scale * (x @ m.matrix), 12), ROWS),
    "after addmm": (of(lambda m, x: torch.addmm(m.linear.bias, x, m.matrix, beta=2) * m.scale, 12), (5, 8)),
    "after convolution": (of(lambda m, x: m.conv(x) * m.scale, 12, 1, 1), MAPS),
    "after convolution in groups": (of(lambda m, x: m.grouped(x) * m.scale, 12, 1), (2, 8, 7)),
    "behind another factor": (of(lambda m, x: m.linear(x * m.scale * x.sigmoid()), 8), ROWS),
    "a scale of a factor": (of(lambda m, x: m.linear(x * (m.scale * x.sigmoid()) / x.exp()), 8), ROWS),
    "heads in rows": (of(lambda m, x: m.linear((x.unflatten(-1, (4, 2)) * m.scale).flatten(-2)), 4, 1), ROWS),
    "heads before rows": (
        of(
            lambda m, x: m.linear(
                (x.unflatten(-1, (4, 2)).transpose(1, 2) * m.scale).transpose(1, 2).reshape(x.shape[0], -1, 8)
            ),
            *(4, 1, 1),
        ),
        ROWS,
    ),
}


@pytest.mark.parametrize("name", FOLDS)
def test_folds(name: str) -> None:
    module, shape = FOLDS[name]
    program = folded_constants(captured(module, torch.randn(shape)))
    before = targets(program)
    result = check_pass(program, ScaleFolding(), rewrites=1)
    gone = "aten.div" if "aten.div" in before and name != "a scale of a factor" else "aten.mul"
    assert targets(result.program).count(gone) == before.count(gone) - 1
    for old, new in zip(program(*program.examples), result.program(*program.examples), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


def test_two_scales_fold_into_one_product() -> None:
    module = of(lambda m, x: m.second(m.linear(x * 0.7 / m.scale) * 3.0), 8)
    result = check_pass(captured(module, torch.randn(ROWS)), ScaleFolding(), rewrites=3)
    assert targets(result.program) == ["aten.linear", "aten.linear"]


def test_sizes_may_be_symbolic() -> None:
    module, shape = FOLDS["heads before rows"]
    program = captured(module, torch.randn(shape), dynamic={"x": {0: "batch", 1: "length"}})
    result = check_pass(program, ScaleFolding(), rewrites=1)
    for batch, length in ((1, 1), (2, 9)):
        x = torch.randn(batch, length, 8)
        torch.testing.assert_close(result.program(x)[0], program(x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (of(lambda m, x: m.linear(y := x * m.scale) + y.sum(), 8), ROWS, None),
        (of(lambda m, x: m.linear((y := x * m.scale) * y), 8), ROWS, None),
        (of(lambda m, x: m.linear(x * m.scale), 5, 1), ROWS, "differ along other axes"),
        (of(lambda m, x: m.conv(x * m.scale), 6), MAPS, "differ along other axes"),
        (of(lambda m, x: m.linear(m.scale / x), 8), ROWS, None),
        (of(lambda m, x: m.second(m.linear(x) + m.linear(x * m.scale)), 8), ROWS, "the weight of linear_1 is read 2"),
        (of(lambda m, x: m.linear(x) * 2 + m.linear(x.sin()), 8), ROWS, "the weight of linear is read 2"),
        (of(lambda m, x: (y := m.linear(x)) * 2 + y), ROWS, "linear is used by mul, add"),
        (of(lambda m, x: F.linear(x * m.scale, x[0]), 8), ROWS, "is no constant"),
        (of(lambda m, x: F.linear(x, m.linear.weight, x[0, 0].repeat(2)[:12]) * 2), ROWS, "the bias of linear is no"),
        (of(lambda m, x: m.linear(x / (m.scale * 0)), 8), ROWS, "times the scale is not finite"),
        (of(lambda m, x: m.linear(x) / (m.scale * 0), 12), ROWS, "times the scale is not finite"),
        (of(lambda m, x: m.linear((x * m.scale).relu()), 8), ROWS, None),
        (of(lambda m, x: m.linear(x[:, :1, :1] * m.scale), 8), ROWS, "it makes torch.float32[3, 1, 8] of"),
        (of(lambda m, x: m.linear(x.half() * m.scale), 8), ROWS, "of torch.float16[3, 5, 8]"),
    ],
)
def test_leaves(module: Of, shape: tuple[int, ...], reason: str | None) -> None:
    program = folded_constants(captured(module, torch.randn(shape)))
    check_pass(program, ScaleFolding(), 0, reason)


def test_what_is_no_product_is_said() -> None:
    result = ScaleFolding().run(captured(of(lambda m, x: (x * 2).relu()), torch.randn(ROWS)), PassContext())
    assert "mul is read by relu (aten.relu.default), no product by a weight" in result.near_misses[0].reason


def test_half_precision_stays_finite_or_stays() -> None:
    module = of(lambda m, x: m.linear(x * m.scale), 8).half()
    with torch.no_grad():
        module.scale[0], module.linear.weight[0, 0] = 6e4, 6e4
    check_pass(captured(module, torch.randn(ROWS).half()), ScaleFolding(), 0, "is not finite in torch.float16")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_float_type_is_exact(dtype: torch.dtype) -> None:
    module = of(lambda m, x: m.linear(x * m.scale) * 0.3, 8).to(dtype)
    program = captured(module, torch.randn(ROWS).to(dtype))
    (report,) = graphopt.optimize(program, [ScaleFolding()], strict=True).report.passes
    assert len(report.rewrites) == 2 and not report.rolled_back


def test_a_weight_that_trains_stays_one() -> None:
    module, shape = FOLDS["linear"]
    program = ScaleFolding().run(captured(module, torch.randn(shape)), PassContext()).program
    assert [item.shape for item in program.graph_module.parameters()] == [(12, 8), (12,)]


class Gated(nn.Module):
    """Attention whose gate depends on no input: sigmoid(theta), one a head or one a channel."""

    def __init__(self, *theta: int) -> None:
        super().__init__()
        self.packed, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.theta = nn.Parameter(torch.randn(theta)) if theta else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.packed(x).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        if self.theta is not None:
            attended = attended * torch.sigmoid(self.theta)
        found: Tensor = self.out(attended.flatten(2))
        return found


@pytest.mark.parametrize("theta", [(4, 1), (4, 4)])
def test_a_gate_that_depends_on_no_input_leaves_the_ungated_graph(theta: tuple[int, int]) -> None:
    """The new weights are within one unit in the last place of W * sigmoid(theta)."""
    gated, plain = Gated(*theta).eval(), Gated().eval()
    x = torch.randn(2, 5, 16)
    result = graphopt.optimize(captured(gated, x), "constant-folding,scale-folding", strict=True).program
    assert targets(result) == targets(captured(plain, x))
    assert gated.theta is not None
    exact = (gated.out.weight.double().unflatten(-1, (4, 4)) * torch.sigmoid(gated.theta).double()).flatten(1)
    (weight,) = (value for name, value in result.graph_module.named_parameters() if name.startswith("scale_folding"))
    unit = torch.finfo(torch.float32).eps * exact.abs()
    assert bool(((weight.double() - exact).abs() <= unit).all())
    torch.testing.assert_close(result(x)[0], gated(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["headwise", "elementwise"])
def test_the_factor_of_a_doubled_gate_goes_into_the_output_projection(mode: str) -> None:
    x = torch.randn(2, 5, 16)
    program = captured(Gated().eval(), x)
    doubled, plain = (
        GatedAttention(mode=mode, form=form).run(program, PassContext()).program  # type: ignore[arg-type]
        for form in ("doubled", "plain")
    )
    result = check_pass(doubled, ScaleFolding(), rewrites=1)
    assert sorted(targets(result.program)) == sorted(targets(plain))
    assert torch.equal(result.program(x)[0], plain(x)[0])


def test_factors_spread_over_the_last_axes_alone() -> None:
    heads = torch.arange(4.0).reshape(1, 4, 1)
    assert reshaped(heads, (7, 4, 2), (7, 8)).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]  # type: ignore[union-attr]
    assert reshaped(heads, (7, 4, 2), (7, 2, 2, 2)).shape == (1, 2, 2, 2)  # type: ignore[union-attr]
    assert reshaped(heads, (7, 4, 2), (14, 4)) is None
    assert reshaped(torch.ones(1, 1), (7, 8), (56,)).shape == (1,)  # type: ignore[union-attr]
    assert reshaped(torch.ones(4, 1, 1), (4, 1 << 10, 1 << 10), (1 << 22,)) is None


def folded_constants(program: graphopt.Program) -> graphopt.Program:
    return ConstantFolding().run(program, PassContext()).program
