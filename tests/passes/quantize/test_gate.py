"""Codes stay only where they are measured to be faster; the measurement itself is played, but for one slow test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.contract import PassContext, Timing
from graphopt.data.dataset import open_data
from graphopt.passes.quantize import Quantize
from graphopt.pipeline import Pipeline
from graphopt.program import Program
from graphopt.race import Outcome
from graphopt.report import PassReport
from tests.models import program as model
from tests.passes.checking import captured, targets

QLINEAR = torch.ops.graphopt.qlinear.default
OVERHEAD = 100.0  # of a conversion, in products of a float layer


class Chain(nn.Module):
    """A small layer, then two large ones with an activation between, each group behind a norm that ends a region."""

    def __init__(self, widths: tuple[int, ...] = (4, 32)) -> None:
        super().__init__()
        self.small = nn.ModuleList(nn.Linear(4, width) for width in widths[1:])
        self.norm = nn.LayerNorm(widths[-1])
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = sum(layer(x).tanh() for layer in self.small)
        return self.down(nn.functional.gelu(self.up(self.norm(y))))


def seconds(program: Program) -> float:
    """A product of floats is 1, one of codes a quarter, and every conversion has a price."""
    total = 0.0
    for node in program.nodes():
        name = str(node.target)
        if name in ("aten.linear.default", "graphopt.qlinear.default"):
            weight = max(item.meta["val"].numel() for item in node.all_input_nodes if item.op == "get_attr")
            total += weight * (1 if name.startswith("aten") else 0.25)
        total += OVERHEAD * (name in ("graphopt.quantize.default", "graphopt.dequantize.default"))
    return total


class Raced:
    """A race by the price of operators, and what ran in it."""

    def __init__(self, price: Callable[[Program], float] = seconds) -> None:
        self.price = price
        self.pairs: list[tuple[Program, Program]] = []

    def __call__(self, first: Program, second: Program) -> Outcome:
        self.pairs.append((first, second))
        before, after = self.price(first), self.price(second)
        return Outcome(Timing(before, 1), Timing(after, 1), after < before)


def run(program: Program, race: Raced, **options: Any) -> tuple[Program, PassReport]:
    feed = {spec.name: value for spec, value in zip(program.inputs, program.examples, strict=True)}
    context = PassContext(data=open_data([feed] * 4, program))
    found, report = Pipeline((Quantize(**options),), context, "structure", strict=False, race=race).run(program)
    return found, report.passes[0]


def chain(*widths: int) -> Program:
    torch.manual_seed(0)
    return captured(Chain(widths or (4, 32)).eval(), torch.randn(6, 4))


def quantized_layers(program: Program) -> list[str]:
    """Layers that read a dequantized value, by the node of the original that they come from."""
    found = []
    for node in program.nodes():
        if str(node.target) == "aten.linear.default":
            found += [node.name] if str(node.all_input_nodes[0].target) == "graphopt.dequantize.default" else []
    return found


def test_the_small_region_goes_back_and_the_large_one_stays() -> None:
    race = Raced()
    program, report = run(chain(), race)
    assert len(quantized_layers(program)) == 2 and targets(program).count("aten.linear") == 3
    small, large, whole = report.regions
    assert small.nodes == ("linear",) and not small.kept and small.seconds_with > small.seconds_without == 128
    assert large.nodes == ("linear_1", "linear_2") and large.kept and large.seconds_without == 2 * 2048
    assert large.seconds_with == 2 * 2048 / 4 + OVERHEAD  # of one conversion: the activation between gives codes
    assert whole.nodes == () and whole.kept and whole.seconds_without == 128 + 2 * 2048
    (reason,) = [item.reason for item in report.declined if item.node == "linear"]
    assert reason == "its region is not measured to be faster in codes"
    assert not report.slower


def test_both_forms_compute_the_region_from_what_the_examples_bring_it() -> None:
    original, race = chain(), Raced()
    run(original, race)
    assert len(race.pairs) == 3
    for before, after in race.pairs:
        assert [spec.name for spec in before.inputs] == [spec.name for spec in after.inputs]
        for one, other in zip(before(*before.examples), after(*before.examples), strict=True):
            assert float((one - other).abs().max()) <= 0.03 * float(one.abs().max())
    _, (large, _), _ = race.pairs
    (result,) = large(*large.examples)
    torch.testing.assert_close(result, original(*original.examples)[0])


def test_nothing_stays_where_the_whole_is_not_faster() -> None:
    race = Raced(lambda program: seconds(program) if len(targets(program)) < 5 else 1.0)
    original = chain()
    program, report = run(original, race)
    assert program.graph_module is original.graph_module and not report.rewrites
    assert [region.kept for region in report.regions] == [False, True, False]
    reasons = {item.node: item.reason for item in report.declined}
    assert reasons["linear_1"] == "the program is not measured to be faster in codes"


def test_regions_of_one_form_are_measured_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    race = Raced()
    _, report = run(captured(Twice().eval(), torch.randn(5, 24)), race)
    assert len(race.pairs) == 2  # the first region, and the whole
    assert [region.nodes for region in report.regions] == [("linear",), ("linear_1",), ("linear_2",), ()]
    assert len({(region.seconds_with, region.seconds_without) for region in report.regions[:3]}) == 1


def test_layers_that_share_codes_are_one_region() -> None:
    _, report = run(chain(4, 32, 32, 32), Raced())
    assert report.regions[0].nodes == ("linear", "linear_1", "linear_2")


def test_a_network_in_codes_throughout_is_one_region() -> None:
    race = Raced(lambda program: float(len(targets(program))))
    _, report = run(graphopt.optimize(model("resnet"), "O2", verify="off").program, race)
    assert len(report.regions) <= 2 and len(report.regions[0].nodes) > 10


def test_without_keep_if_faster_nothing_is_measured() -> None:
    program = chain()
    result = graphopt.optimize(program, "quantize")
    assert not result.report.passes[0].regions and len(quantized_layers(result.program)) == 3


def test_artifacts_keep_the_verdicts_without_the_times() -> None:
    program, _ = run(chain(), Raced())
    assert program.history[-1]["regions"][0] == {"nodes": ["linear"], "kept": False}


@pytest.mark.slow
def test_the_real_race_and_the_report_agree() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 512), nn.LayerNorm(512), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)]
    program = captured(nn.Sequential(*layers).eval(), torch.randn(64, 8))
    result = graphopt.optimize(program, "quantize,qdq-fusion", keep_if_faster=True, threads=1)
    report = result.report.passes[0]
    assert all(region.seconds_with > 0 and region.seconds_without > 0 for region in report.regions)
    parts = [region for region in report.regions if region.nodes]
    assert [region.nodes for region in parts] == [("linear",), ("linear_1", "linear_2")]
    kept = {name for region in parts if region.kept for name in region.nodes}
    if not all(region.kept for region in report.regions if not region.nodes):
        kept = set()
    back = {item.node for item in report.declined if "faster" in item.reason}
    assert back == {"linear", "linear_1", "linear_2"} - kept
