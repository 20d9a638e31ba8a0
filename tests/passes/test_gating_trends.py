"""Gates on small networks that were trained: nothing changes when they come, and little when they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

import graphopt
from graphopt.contract import PassContext
from graphopt.data.dataset import open_data
from graphopt.data.metric import open_metric
from graphopt.passes.block_folding import BlockFolding
from graphopt.passes.gated_attention import GatedAttention
from graphopt.tools.benchmarking import char_lm, digits_vit
from graphopt.tools.benchmarking.small_transformers import Case


def check_identity(case: Case, *modes: Literal["headwise", "elementwise"]) -> None:
    (inputs,) = case.data[-1][0].values()
    for mode in modes:
        result = GatedAttention(mode=mode).run(case.program, PassContext())
        assert result.rewrites and not result.declined
        assert torch.equal(result.program(inputs)[0], case.program(inputs)[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fitted_gates_keep_the_accuracy(seed: int) -> None:
    case = digits_vit.case(seed)
    check_identity(case, "headwise", "elementwise")
    passes = "gated-attention{fit-steps=160}"
    found = graphopt.optimize(case.program, passes, data=case.data, metric=case.metric, seed=seed).report.metric
    assert found is not None and found.before > 0.88
    assert abs(found.after - found.before) <= 0.02


@pytest.mark.slow
def test_the_small_networks_are_learned_captured_gated_and_folded() -> None:
    for case in (char_lm.case(0, steps=2), digits_vit.case(0, steps=2)):
        assert len(case.trained.held_out) == 2 == case.trained.steps
        check_identity(case, "headwise")
        few = open_data(case.data[:4] + case.data[-2:], case.program)
        context = PassContext(data=few, metric=open_metric(case.metric))
        folded = BlockFolding(remove=1, heal_steps=2).run(case.program, context)
        assert "healing took" in folded.notes[-1]
        assert folded.program.count_operators() < case.program.count_operators()


@pytest.mark.slow
def test_both_passes_do_the_same_on_the_onnx_form(tmp_path: Path) -> None:
    for case in (char_lm.case(0, steps=2), digits_vit.case(0, steps=2)):
        file = tmp_path / f"{case.program.name}.onnx"
        case.program.to_onnx(str(file))
        again = graphopt.capture(file, case.program.examples)
        context = PassContext(data=open_data(case.data[-20:], case.program), metric=open_metric(case.metric))
        (inputs,) = case.data[-1][0].values()
        for pass_ in (GatedAttention(form="plain"), BlockFolding(remove=2)):
            ours, theirs = (pass_.run(program, context) for program in (case.program, again))
            assert len(ours.rewrites) == len(theirs.rewrites) > 0
            torch.testing.assert_close(theirs.program(inputs)[0], ours.program(inputs)[0], rtol=1e-4, atol=1e-5)
