"""Each architecture runs from torch and from ONNX, compiled, with equal answers, operators and rewrites.

`python -m tests.architectures` prints the table.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.architectures.forms import (
    ANY_BATCH,
    ANY_LENGTH,
    CANNOT,
    COUNTS_DIFFER,
    FORMS,
    TOLERANCE,
    Outcome,
    error_at_other_sizes,
    fired,
    outcome,
    taken_in,
)
from tests.architectures.zoo import ARCHITECTURES

QUICK = ("distilbert", "llama_with_cache")


@functools.cache
def done(name: str, form: str) -> tuple[Outcome, dict[str, int]]:
    return outcome(name, form), fired(taken_in(name, form)[0])


def _cases() -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES]


@pytest.mark.parametrize("name", _cases())
def test_equal_answers_operators_and_rewrites(name: str) -> None:
    """Of the passes that change the model: how much there is to clean up is the exporter's affair."""
    wanted, rewrites = done(name, "torch")
    for form in FORMS:
        if (name, form) in CANNOT:
            continue
        found, passes = done(name, form)
        assert found.error < TOLERANCE, f"{name} from {form}: {found.error}"
        same = found.operators == wanted.operators
        assert same == ((name, form) not in COUNTS_DIFFER), f"{name} from {form}: {found.operators}"
        assert passes == rewrites, f"{name} from {form}: {passes}"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", (*ANY_LENGTH, *ANY_BATCH))
def test_other_sizes_than_exported(name: str, form: str) -> None:
    assert error_at_other_sizes(name, form) < TOLERANCE


def test_there_are_enough() -> None:
    from_onnx = {name for name in ARCHITECTURES if {(name, "dynamo"), (name, "torchscript")} - CANNOT.keys()}
    assert len(ARCHITECTURES) >= 40 and len(from_onnx) >= 25
