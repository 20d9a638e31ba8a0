"""Folds change no function, bit for bit with powers of two; scales do what their papers say; biases keep the mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.contract import PassContext, PassResult
from graphopt.data.dataset import Sample, open_data
from graphopt.data.metric import measure, open_metric
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize.activations import ActivationForm
from graphopt.passes.quantize.scaling import ROWS, Rows, Scaling
from graphopt.passes.quantize.smoothing import Smoothing
from graphopt.passes.quantize.weights import WeightForm
from graphopt.program import Program
from tests.models import program as model
from tests.passes.checking import captured

aten = torch.ops.aten


class Block(nn.Module):
    """Every fold: a norm before two linears, relu between linears, a gate, and a convolution in groups."""

    def __init__(self, rms: bool = False) -> None:
        super().__init__()
        self.norm: nn.Module = nn.RMSNorm(32) if rms else nn.LayerNorm(32)
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.gate, self.value, self.out = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = self.q(y) * self.k(y).sigmoid()
        y = y + self.down(torch.relu(self.up(x)))
        return y + self.out(nn.functional.silu(self.gate(x)) * self.value(x))


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 24, 3, groups=4)
        self.c, self.d = nn.Conv2d(24, 24, 3, groups=24, bias=False), nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))


def uneven(module: nn.Module, spread: float = 3.0) -> nn.Module:
    """With channels of very different sizes."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            rows = torch.exp(spread * torch.randn(parameter.shape[0], generator=generator) / 2)
            parameter.mul_(rows.reshape(-1, *[1] * (parameter.dim() - 1)))
    return module.eval()


def cases() -> dict[str, Program]:
    torch.manual_seed(0)
    return {
        "block": captured(uneven(Block()), torch.randn(2, 7, 32)),
        "rms": captured(uneven(Block(True)), torch.randn(2, 7, 32)),
        "maps": captured(uneven(Maps()), torch.randn(2, 3, 12, 12)),
    }


def fold(
    program: Program,
    algorithm: str,
    exact: bool = True,
    context: PassContext | None = None,
    strength: float | None = 0.5,
) -> PassResult:
    scaling, context = Scaling(power_of_two=exact), context or PassContext()
    samples = [Sample(tuple(program.examples))]
    if algorithm == "equalization":
        return scaling.equalized(program, context)
    if algorithm == "smoothquant":
        weight = WeightForm("int8", "per-channel")
        return Smoothing(strength, exact, weight, "int8", ActivationForm()).run(program, context, samples)
    return scaling.searched(program, context, samples, WeightForm("int4", "per-group", 16))


COUNTS = {
    ("equalization", "block"): 2, ("equalization", "rms"): 2, ("equalization", "maps"): 3,
    ("smoothquant", "block"): 3, ("smoothquant", "rms"): 3, ("smoothquant", "maps"): 3,
    ("awq", "block"): 3, ("awq", "rms"): 3,
}  # fmt: skip


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order: how work is shared among threads depends on what else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("algorithm", "name"), COUNTS)
def test_folds_by_powers_of_two_change_no_bit(algorithm: str, name: str) -> None:
    program = cases()[name]
    result = fold(program, algorithm)
    assert len(result.rewrites) == COUNTS[algorithm, name], result.declined
    old, new = (item.graph_module.state_dict().values() for item in (program, result.program))
    kept = sum(any(tensor is other or torch.equal(tensor, other) for other in old) for tensor in new)
    assert kept < len(new)
    for inputs in (program.examples, tuple(torch.randn_like(value) * 5 for value in program.examples)):
        assert torch.equal(result.program(*inputs)[0], program(*inputs)[0])


@pytest.mark.parametrize(("algorithm", "name"), COUNTS)
def test_other_folds_change_the_function_by_rounding_only(algorithm: str, name: str) -> None:
    program = cases()[name]
    result = fold(program, algorithm, exact=False)
    (before,), (after,) = program(*program.examples), result.program(*program.examples)
    assert float((before - after).abs().max()) <= 3e-6 * float(before.abs().max())


@pytest.mark.usefixtures("one_thread")
def test_folds_refused_one_by_one_leave_the_others() -> None:
    program = cases()["block"]
    ids = [item.id for item in fold(program, "smoothquant").rewrites]
    assert len(set(ids)) == 3
    for own in ids:
        alone = fold(program, "smoothquant", context=PassContext(allow=lambda id, own=own: id == own))  # type: ignore[misc]
        assert [item.id for item in alone.rewrites] == [own]
        assert torch.equal(alone.program(*program.examples)[0], program(*program.examples)[0])


class Shared(nn.Module):
    """None of these may fold: another reader of the value, a shared weight, no positive homogeneity, the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.e, self.f = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        u = self.b(torch.relu(self.a(x)))
        v = self.b(torch.relu(self.c(x)))  # b is read twice
        return y.sum() + self.d(y), u, v, self.f(nn.functional.gelu(self.e(x)))


def test_what_others_read_is_not_scaled() -> None:
    program = captured(Shared().eval(), torch.randn(3, 8))
    assert not fold(program, "equalization").rewrites
    (only,) = fold(program, "smoothquant").rewrites
    assert only.id == "quantize/smoothquant@layer_norm"


class Residual(nn.Module):
    """As in BERT: what the norm makes is read by two products and by the sum behind them."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        with torch.no_grad():
            self.norm.weight[[3, 17]] = gain

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.q(y) * self.k(y)


def residual(gain: float) -> Program:
    torch.manual_seed(0)
    return captured(uneven(Residual(gain), 0.1), torch.randn(4, 16, 32))


@pytest.mark.usefixtures("one_thread")
def test_a_multiplication_divides_what_a_residual_path_keeps() -> None:
    program = residual(40.0)
    result = fold(program, "smoothquant")
    multiplications = [
        [node.target for node in item.nodes()].count(aten.mul.Tensor) for item in (program, result.program)
    ]
    assert multiplications == [1, 2]  # one for both products
    for inputs in (program.examples, tuple(torch.randn_like(value) * 5 for value in program.examples)):
        assert torch.equal(result.program(*inputs)[0], program(*inputs)[0])
    (before,), (after,) = (
        program(*program.examples),
        fold(program, "smoothquant", exact=False).program(*program.examples),
    )
    assert float((before - after).abs().max()) <= 3e-6 * float(before.abs().max())


def test_a_multiplication_has_to_halve_the_error() -> None:
    assert fold(residual(40.0), "smoothquant", strength=None).rewrites
    even = fold(residual(1.0), "smoothquant", strength=None)
    assert not even.rewrites
    assert [item.reason for item in even.declined] == ["no strength has clearly less error than none"]


@pytest.mark.parametrize("activations", ["int8", "dynamic-int8"])
def test_the_searched_strength_is_about_as_good_as_the_best_that_is_given(activations: str) -> None:
    program = outliers()
    options = {"algorithm": "smoothquant", "activations": activations}
    found, weak, *given = (
        snr(run(program, **options, migration_strength=strength), program, "x")
        for strength in (None, 0.1, 0.5, 0.7, 0.9)
    )
    assert found > max(given) - 1.5 and found > weak + 3


def test_equalization_makes_ranges_equal() -> None:
    torch.manual_seed(0)
    pair = uneven(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    result = fold(captured(pair, torch.randn(3, 8)), "equalization", exact=False).program
    first, second = (tensor for tensor in result.graph_module.state_dict().values() if tensor.dim() == 2)
    if first.shape[1] != 8:
        first, second = second, first
    torch.testing.assert_close(first.abs().amax(1), second.abs().amax(0), rtol=1e-5, atol=0)


def snr(program: Program, reference: Program, inputs: str) -> float:
    generator = torch.Generator().manual_seed(9)
    shape = tuple(reference.examples[0].shape)
    data = open_data([{inputs: torch.randn(shape, generator=generator)} for _ in range(10)], reference)
    return measure(program, data.fit, open_metric("snr"), reference)


def run(program: Program, **options: Any) -> Program:
    torch.manual_seed(1)
    name, shape = program.inputs[0].name, tuple(program.examples[0].shape)
    data = open_data([{name: torch.randn(shape)} for _ in range(10)], program)
    return Quantize(**options).run(program, PassContext(data=data)).program


def test_equalization_saves_a_network_with_uneven_channels_in_codes_of_one_scale() -> None:
    program = cases()["maps"]
    plain, equal = (run(program, granularity="per-tensor", equalization=flag) for flag in (False, True))
    assert snr(equal, program, "x") > snr(plain, program, "x") + 6


class Outliers(nn.Module):
    """A norm that makes a few channels fifty times as large as the others, as those of large language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)
        with torch.no_grad():
            self.norm.weight[[3, 17, 40]] = 50.0
            for layer in (self.q, self.k):
                layer.weight.normal_(0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([self.q(y), self.k(y)], -1)


def outliers() -> Program:
    torch.manual_seed(0)
    return captured(Outliers().eval(), torch.randn(4, 16, 64))


def test_smoothquant_takes_outliers_from_activations() -> None:
    program = outliers()
    plain, smooth = (run(program, algorithm=name) for name in ("plain", "smoothquant"))
    assert snr(smooth, program, "x") > snr(plain, program, "x") + 3


def test_awq_is_better_than_rounding_where_channels_stand_out_and_no_worse_where_none_does() -> None:
    even = captured(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)), torch.randn(4, 16, 64))
    for program, gain in ((outliers(), 1.0), (even, -0.2)):
        options: dict[str, Any] = {"weights": "int4", "group_size": 64}
        plain, scaled = (run(program, algorithm=name, **options) for name in ("plain", "awq"))
        name = program.inputs[0].name
        assert snr(scaled, program, name) > snr(plain, program, name) + gain


def test_rows_are_kept_evenly_and_never_more_than_the_limit() -> None:
    rows = Rows()
    for start in range(0, 5000, 7):
        rows.update(torch.arange(start, min(start + 7, 5000)).float()[:, None])
        assert len(rows.kept) <= ROWS
    kept = rows.result()[:, 0]
    steps = kept.diff().unique()
    assert len(steps) == 1 and len(kept) > ROWS // 2 and kept[0] == 0


def _mean_error(program: Program, reference: Program, samples: list[Sample]) -> Tensor:
    axes = [axis for axis in range(program(*samples[0].inputs)[0].dim()) if axis != 1]
    differences = [(program(*s.inputs)[0] - reference(*s.inputs)[0]).double().mean(axes) for s in samples]
    return torch.stack(differences).mean(0)


@pytest.mark.parametrize("groups", [1, 4])
def test_corrected_biases_keep_the_mean_of_every_channel(groups: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 1, groups=groups, bias=groups == 1)
    program = captured(layer.eval(), torch.randn(2, 8, 5, 5))
    name = program.inputs[0].name
    samples = [Sample((torch.randn(2, 8, 5, 5) + 3,)) for _ in range(8)]
    data = open_data([{name: sample.inputs[0]} for sample in samples], program)
    fitted = list(data.fit)
    options: dict[str, Any] = {"weights": "int4", "granularity": "per-channel"}
    plain, corrected = (
        Quantize(**options, bias_correction=flag).run(program, PassContext(data=data)).program for flag in (False, True)
    )
    before, after = (_mean_error(item, program, fitted).abs() for item in (plain, corrected))
    assert float(after.max()) < 1e-5 < 1e-2 < float(before.max())


def test_all_of_it_at_once_on_a_transformer() -> None:
    program = graphopt.optimize(model("llama"), "O2", verify="off").program
    result = Quantize(algorithm="smoothquant", equalization=True, bias_correction=True).run(program, PassContext())
    rules = {item.rule for item in result.rewrites}
    assert {"quantize", "quantize/smoothquant"} <= rules
    ids = [item.id for item in result.rewrites]
    assert len(ids) == len(set(ids))
    (before,), (after,) = program(*program.examples), result.program(*program.examples)
    assert float((before - after).norm() / before.norm()) < 0.05
