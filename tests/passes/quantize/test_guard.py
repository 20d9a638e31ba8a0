"""The accuracy guard and budgets: a planted weak layer is found, bounds hold, what is held out decides nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.contract import PassContext, PassResult, Timing
from graphopt.data.dataset import Dataset, Sample, View, open_data
from graphopt.data.metric import measure, open_metric
from graphopt.errors import UsageError
from graphopt.levels import LEVELS
from graphopt.passes.quantize import Quantize
from graphopt.program import Program
from tests.passes.checking import captured


class Deep(nn.Module):
    """Four layers, of which the planted one reads a feature that is 300 and that it has no use for."""

    large: Tensor

    def __init__(self, planted: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.planted = planted
        self.register_buffer("large", torch.tensor([300.0] + [0.0] * 31))
        with torch.no_grad():
            self.layers[planted].weight[:, 0] = 0  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = torch.tanh(layer(x + self.large if number == self.planted else x))
        return x


def deep(planted: int) -> tuple[Program, Dataset]:
    torch.manual_seed(0)
    program = captured(Deep(planted).eval(), torch.randn(4, 32), dynamic={"x": {0: "batch"}})
    return program, open_data([{"x": torch.randn(4, 32)} for _ in range(20)], program)


def run(program: Program, data: Dataset | None, metric: Any = None, **options: Any) -> PassResult:
    context = PassContext(data=data, metric=None if metric is None else open_metric(metric))
    return Quantize(**options).run(program, context)


def layers_in_float(result: PassResult) -> list[str]:
    return [item.node for item in result.declined if "max-drop" in item.reason]


def ranking(result: PassResult) -> list[str]:
    (note,) = [note for note in result.notes if note.startswith("sensitivity")]
    return [item.split()[0] for item in note.rpartition("codes: ")[2].split(", ")]


@pytest.mark.parametrize("planted", range(4))
def test_the_planted_layer_is_the_most_sensitive_and_alone_goes_back(planted: int) -> None:
    program, data = deep(planted)
    large = [str(node) for node in program.graph_module.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert len(large) == 4
    result = run(program, data, max_drop=0.01)
    assert ranking(result)[0] == large[planted]
    assert layers_in_float(result) == [large[planted]]
    everything = run(program, data)
    snr = open_metric("snr")
    assert measure(result.program, data.held_out, snr, program) > 20  # dB, that is a share of 0.01
    assert measure(everything.program, data.held_out, snr, program) < 20


def test_the_account_says_what_the_loss_was_and_is() -> None:
    program, data = deep(1)
    result = run(program, data, max_drop=0.01)
    assert "max-drop=0.01 holds: noise's share of the power is" in result.notes[-1]
    assert "with 1 of 4 layers in float32" in result.notes[-1]
    points = [(point.value, -point.metric) for point in result.trade_offs]
    assert [value for value, _ in points] == [0, 1] and points[0][1] > 0.01 >= points[1][1]


def test_a_guard_that_holds_leaves_all_layers_in_codes_and_one_of_zero_leaves_none() -> None:
    program, data = deep(2)
    assert len(run(program, data, max_drop=1.0).rewrites) == len(run(program, data).rewrites)
    strict = run(program, data, max_drop=0.0)
    assert strict.program is program and not strict.rewrites and len(layers_in_float(strict)) == 4


def test_a_metric_of_the_users_is_held_to() -> None:
    """It says 0 where anything is quantized but the last layer, on the samples it is shown."""
    program, data = deep(0)
    seen: list[int] = []

    def near(outputs: list[Tensor], labels: Tensor | None) -> float:
        seen.append(len(outputs[0]))
        wanted = torch.cat([program(*sample.inputs)[0] for sample in data.for_fitting().held_out])
        return 1.0 if float((outputs[0] - wanted).abs().max()) < 0.02 else 0.0

    result = run(program, data, near, max_drop=0.5)
    assert layers_in_float(result)
    found = near([torch.cat([result.program(*sample.inputs)[0] for sample in data.for_fitting().held_out])], None)
    assert found == 1.0
    assert set(seen) == {4 * len(data.for_fitting().held_out)}


class Spy:
    """Data that tells which samples were read."""

    def __init__(self, count: int) -> None:
        self.samples = [Sample((torch.randn(4, 32),)) for _ in range(count)]
        self.read_from: set[int] = set()

    def read(self, start: int, stop: int) -> Any:
        for index in range(start, stop):
            self.read_from.add(index)
            yield self.samples[index]


@pytest.mark.parametrize("options", [{"max_drop": 0.01}, {"size_budget": 0.2, "group_size": 32}, {}])
def test_what_is_held_out_is_never_read(options: dict[str, Any]) -> None:
    program, _ = deep(0)
    spy = Spy(20)
    run(program, Dataset(View(spy, 0, 16), View(spy, 16, 20), False), **options)
    assert spy.read_from == set(range(16))


def weight_bytes(program: Program) -> int:
    """Of codes, of which those below 8 in magnitude are packed in pairs, and of their scales."""
    total = 0
    for node in program.nodes():
        if node.target is torch.ops.graphopt.dequantize.default and node.args[0].op == "get_attr":  # type: ignore[union-attr]
            codes, scale = (argument.meta["val"] for argument in node.args[:2])  # type: ignore[union-attr]
            total += codes.numel() // (2 if node.kwargs["qmax"] == 7 else 1) + 4 * scale.numel()
    return total


def test_a_budget_of_bytes_is_met_by_the_layers_that_mind_least() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64) for _ in range(4)]
    with torch.no_grad():
        layers[0].weight[::32] /= 1000  # features that are next to nothing, with weights by which
        layers[0].bias[::32] = 0  # all others of their group round to zero
        layers[1].weight[:, ::32] *= 100
    program = captured(nn.Sequential(*layers).eval(), torch.randn(8, 64), dynamic={"input": {0: "n"}})
    data = open_data([{"input": torch.randn(8, 64)} for _ in range(10)], program)
    floats = sum(layer.weight.numel() * 4 for layer in layers)
    for budget in (0.27, 0.25, 0.2):
        result = run(program, data, size_budget=budget, group_size=32)
        assert weight_bytes(result.program) <= budget * floats
        assert "linear_1" not in result.notes[-1].split(": ")[-1].split(", ")
    with pytest.raises(UsageError, match=r"size-budget=0\.1 cannot be met"):
        run(program, data, size_budget=0.1, group_size=32)


def test_a_budget_of_time_keeps_as_many_sensitive_layers_as_it_allows() -> None:
    """Time is made up: 1 a program, less 0.15 for each layer whose weight is stored in codes."""
    program, data = deep(3)

    def seconds(tried: Program) -> Timing | None:
        stored = sum(tensor.dtype is torch.int8 for tensor in tried.graph_module.state_dict().values())
        return Timing(1 - 0.15 * stored, 1)

    context = PassContext(data=data, measure=seconds)
    result = Quantize(latency_budget=0.6).run(program, context)
    assert "latency-budget=0.6 is met: 550.000 ms instead of 1000.000 ms" in result.notes[-1]
    back = [item.node for item in result.declined if "latency-budget" in item.reason]
    assert back == sorted(ranking(result)[: len(back)])
    timing = seconds(result.program)
    assert timing is not None and timing.seconds <= 0.6
    with pytest.raises(UsageError, match=r"latency-budget=0\.1 cannot be met"):
        Quantize(latency_budget=0.1).run(program, context)
    with pytest.raises(UsageError, match="needs a device"):
        Quantize(latency_budget=0.5).run(program, replace(context, measure=lambda program: None))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "none", "activations": "none"}, "leave nothing to do"),
        ({"weights": "int4", "calibration": "mse"}, "calibration and symmetric"),
        ({"weights": "none", "algorithm": "awq"}, "algorithm=awq"),
        ({"power_of_two": True}, "power-of-two"),
        ({"migration_strength": 0.5}, "migration-strength is of algorithm=smoothquant"),
        ({"percentile": 99.9}, "percentile is of calibration=percentile"),
        ({"group_size": 32}, "group-size is of granularity=per-group"),
        ({"group_size": 32, "weights": "int4", "granularity": "per-channel"}, "group-size is of granularity=per-group"),
        ({"weights": "int4", "size_budget": 0.2}, "size-budget chooses"),
        ({"size_budget": 0.2, "latency_budget": 0.2}, "exclude each other"),
        ({"max_drop": -1.0}, "max-drop=-1.0"),
        ({"percentile": 20.0}, "percentile=20.0"),
        ({"group_size": 0}, "group-size=0"),
        ({"migration_strength": 1.5}, "migration-strength=1.5"),
    ],
)
def test_options_that_have_no_meaning_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Quantize(**options)


def test_bounds_need_data() -> None:
    program, _ = deep(0)
    with pytest.raises(UsageError, match="give data"):
        run(program, None, max_drop=0.1)


def test_levels_never_quantize() -> None:
    assert all("quantize" not in names for names in LEVELS.values())


def test_data_is_taken_without_a_metric_and_without_checks() -> None:
    program, _ = deep(3)
    feeds = [{"x": torch.full((4, 32), 4.0)}, {"x": torch.full((4, 32), -3.0)}, {"x": torch.zeros(4, 32)}]
    result = graphopt.optimize(program, "quantize", data=feeds, verify="off").program
    scale = result.graph_module.get_buffer(str(_first(result).args[1]))
    assert float(scale) == pytest.approx(7 / 255)


def _first(program: Program) -> Any:
    return next(node for node in program.nodes() if node.target is torch.ops.graphopt.quantize.default)
