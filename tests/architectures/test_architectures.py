"""Each architecture runs from torch and from ONNX, compiled, with equal answers and equal operators.

`python -m tests.architectures` prints the table.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.architectures.forms import CANNOT, COUNTS_DIFFER, FORMS, TOLERANCE, Outcome, outcome
from tests.architectures.zoo import ARCHITECTURES

QUICK = ("distilbert", "llama_with_cache")


@functools.cache
def done(name: str, form: str) -> Outcome:
    return outcome(name, form)


def _cases() -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES]


@pytest.mark.parametrize("name", _cases())
def test_equal_answers_and_operators(name: str) -> None:
    forms = [form for form in FORMS if (name, form) not in CANNOT]
    for form in forms:
        found = done(name, form)
        assert found.error < TOLERANCE, f"{name} from {form}: {found.error}"
        same = found.operators == done(name, "torch").operators
        assert same == ((name, form) not in COUNTS_DIFFER), f"{name} from {form}: {found.operators}"


def test_there_are_enough() -> None:
    from_onnx = {name for name in ARCHITECTURES if {(name, "dynamo"), (name, "torchscript")} - CANNOT.keys()}
    assert len(ARCHITECTURES) >= 40 and len(from_onnx) >= 25
