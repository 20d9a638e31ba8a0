from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import graphopt
from graphopt.checking.evidence import make_samples
from graphopt.checking.structure import find_defect
from tests import models
from tests.passes.checking import captured


def test_captured_programs_are_well_formed() -> None:
    for case in (models.mlp(), models.branching(), models.counter(), models.tied(), models.dict_output()):
        program = graphopt.capture(case[0], case[1], dynamic_shapes=case[2])
        assert find_defect(program, program) is None


def test_bound_inputs_stay_bound() -> None:
    program = captured(nn.Linear(4, 4), torch.randn(6, 4))
    bound = replace(program, bound={"input": torch.zeros(6, 4)})
    assert find_defect(bound, replace(bound, bound={"input": torch.zeros(6, 4)})) is None
    for other in ({}, {"input": torch.ones(6, 4)}):
        assert find_defect(bound, replace(bound, bound=other)) == "its bound inputs have changed"


def test_samples_cover_the_sizes_worth_checking() -> None:
    program = captured(nn.Linear(4, 4), torch.randn(6, 4), dynamic={"input": {0: "rows"}})
    rows = {sample.inputs[0].shape[0] for sample in make_samples(program, seed=0)[0]}
    assert {1, 6} < rows and len(rows) == 3
