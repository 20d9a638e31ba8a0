"""Samples that may leave either way are found, and left out of what compiled code is held to."""

from __future__ import annotations

import torch

from graphopt.checking.close_decisions import close_samples
from tests.passes.exit_models import inputs, network, with_form


def test_a_sample_at_its_threshold_is_close() -> None:
    x = inputs(6)
    program = network(None)
    everything = with_form(program, "multi-output", [0.5, 0.5])
    values = dict(zip([spec.name for spec in everything.outputs], everything(x), strict=True))
    at = float(values["confidence_at_0"][2])
    for form in ("multi-output", "cond", "staged"):
        near = close_samples(with_form(program, form, [at + 5e-5, 1.5]), (x,))
        assert near.tolist() == [number == 2 for number in range(6)]
        far = close_samples(with_form(program, form, [at + 5e-3, 1.5]), (x,))
        assert not far[2]


def test_decisions_that_are_not_come_to_are_not_close() -> None:
    """A sample that all others leave with at the first exit is not asked at the second."""
    x = inputs(4)
    program = network(None)
    values = dict(zip(("output", "exit"), with_form(program, "cond", [0.0, 0.5])(x), strict=True))
    assert values["exit"].tolist() == [0] * 4
    assert not close_samples(with_form(program, "cond", [0.0, 0.5]), (x,)).any()
    assert torch.equal(close_samples(with_form(program, "cond", [1.5, 1.5]), (x,)), torch.zeros(4, dtype=torch.bool))
