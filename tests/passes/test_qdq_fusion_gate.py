"""Codes that others wrote stay only where they are measured to be faster than float32; the measurement is played."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphopt
from graphopt.contract import PassContext, Timing
from graphopt.interpreter import ProgramInterpreter
from graphopt.passes import region_race
from graphopt.passes.qdq_fusion import QDQFusion
from graphopt.pipeline import Pipeline
from graphopt.program import Program
from graphopt.race import Outcome
from graphopt.report import PassReport
from tests.passes.test_qdq_fusion import Quantized, names, weights
from tests.passes.test_qdq_fusion_models import KINDS, MODELS, draw, quantized_file

F = torch.nn.functional
OVERHEAD = 300.0  # of a conversion, in products of a float layer


def price(program: Program) -> float:
    """A product of floats is 1, one of codes a quarter, and every conversion has a price."""
    total = 0.0
    for node in program.nodes():
        name = str(node.target)
        if name in ("aten.linear.default", "graphopt.qlinear.default"):
            weight = max(item.meta["val"].numel() for item in node.all_input_nodes if item.meta["val"].dim() == 2)
            total += weight * (1 if name.startswith("aten") else 0.25)
        total += OVERHEAD * (name == "graphopt.quantize.default")
    return total


class Raced:
    def __init__(self, price: Callable[[Program], float] = price) -> None:
        self.price = price
        self.pairs: list[tuple[Program, Program]] = []

    def __call__(self, first: Program, second: Program) -> Outcome:
        self.pairs.append((first, second))
        before, after = self.price(first), self.price(second)
        return Outcome(Timing(before, 1), Timing(after, 1), after < before)


def chain(m: Any, x: Tensor) -> Tensor:
    """A small layer, then two large ones with a relu that the range of the codes stands for, each behind a norm."""
    y = F.linear(m.qd(x), m.w(), m.bias)
    z = F.linear(m.qd(F.layer_norm(y, (16,))), m.w("up"))
    low = torch.ops.graphopt.quantize(z, m.fine, None, qmin=0, qmax=255, dtype=torch.uint8)
    z = torch.ops.graphopt.dequantize(low, m.fine, None, qmin=0, qmax=255, dtype=torch.float32)
    result: Tensor = F.linear(z, m.w("down"))
    return result


def quantized() -> tuple[Program, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = weights(16, 24)
    for name, shape in (("up", (128, 16)), ("down", (16, 128))):
        tensors[name] = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
        tensors[f"{name}_scale"] = torch.rand(shape[0], generator=generator) / 400 + 1e-3
    x = torch.randn(5, 24, generator=generator)
    return graphopt.capture(Quantized(chain, **tensors), (x,)), x


def run(program: Program, race: Raced) -> tuple[Program, PassReport]:
    found, report = Pipeline((QDQFusion(),), PassContext(), "numeric", strict=True, race=race).run(program)
    return found, report.passes[0]


def test_the_small_region_goes_back_and_the_large_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    class Counted(ProgramInterpreter):
        def run(self, *args: Any, **options: Any) -> Any:
            runs.append(self.path)
            return super().run(*args, **options)

    monkeypatch.setattr(region_race, "ProgramInterpreter", Counted)
    program, x = quantized()
    race = Raced()
    after, report = run(program, race)
    small, large, whole = report.regions
    assert small.nodes == ("linear",) and not small.kept
    assert (small.seconds_without, small.seconds_with) == (384, 384 / 4 + OVERHEAD)
    assert "linear_1" in large.nodes and "linear_2" in large.nodes and large.kept
    assert (large.seconds_without, large.seconds_with) == (4096, 1024 + OVERHEAD)
    assert whole.nodes == () and whole.kept and whole.seconds_without == 384 + 4096
    assert len(runs) == 1  # of the program, for the inputs of all regions
    assert names(after).count("aten.linear") == 1 and names(after).count("graphopt.qlinear") == 2
    assert float((after(x)[0] - program(x)[0]).abs().max()) <= 0.05 * float(program(x)[0].abs().max())
    reasons = [item.reason for item in report.declined if "faster" in item.reason]
    assert reasons == ["its region is not measured to be faster in codes"]


def test_both_forms_compute_the_region() -> None:
    """The float32 form keeps the relu that stands in a range of codes."""
    race = Raced()
    run(quantized()[0], race)
    assert len(race.pairs) == 3
    for before, after in race.pairs:
        assert "graphopt.quantize" not in names(before)
        for one, other in zip(before(*before.examples), after(*before.examples), strict=True):
            assert float((one - other).abs().max()) <= 0.05 * float(one.abs().max())


def test_nothing_stays_where_codes_are_never_faster() -> None:
    program, x = quantized()
    after, report = run(program, Raced(lambda program: float("graphopt.qlinear" in names(program))))
    assert not any(region.kept for region in report.regions) and len(report.regions) == 2
    assert not {"graphopt.quantize", "graphopt.qlinear"} & set(names(after))
    assert float((after(x)[0] - program(x)[0]).abs().max()) <= 0.05 * float(program(x)[0].abs().max())


def test_what_quantize_made_is_its_own_to_race() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
    program = graphopt.optimize(graphopt.capture(model, (torch.randn(3, 8),)), "quantize").program
    race = Raced()
    _, report = run(program, race)
    assert not race.pairs and not report.regions and "`quantize` made them" in " ".join(report.notes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter and the quantizer
@pytest.mark.parametrize(("name", "kind"), [*product(MODELS, ("signed", "unsigned")), ("inverted", "operators")])
def test_the_float_form_of_a_file(name: str, kind: str, tmp_path: Path) -> None:
    """Its results are near to those in codes, nothing of which is left."""
    program = graphopt.optimize(graphopt.capture(quantized_file(name, KINDS[kind], tmp_path)), "O2").program
    after, report = run(program, Raced(lambda program: float("graphopt.quantize" in names(program))))
    assert report.regions and not any(region.kept for region in report.regions)
    assert not [each for each in names(after) if each.startswith("graphopt.q")]
    x = draw(MODELS[name][1], 10)
    one, other = program(x)[0].flatten(), after(x)[0].flatten()
    assert float(torch.cosine_similarity(one, other, 0)) > 0.98
