"""Every forward, deterministic, real core ATen overload: captured, compiled and equal to PyTorch."""

from __future__ import annotations

import pytest
import torch

from tests.core_aten.check import Case, cases_of, dynamic_cases_of, problems, problems_in_parts, supported
from tests.core_aten.samples import EXCEPTIONS, EXCLUDED, SAMPLES, core_overloads, name_of


def _cases(dtype: torch.dtype) -> list[Case]:
    return [case for overload in supported() for case in cases_of(overload, dtype)]


def _report(found: dict[str, str]) -> str:
    return "\n".join(f"{name}: {problem}" for name, problem in found.items())


def test_every_core_overload_has_samples_or_a_reason() -> None:
    names = {name_of(overload) for overload in core_overloads()}
    assert names == {*SAMPLES, *EXCLUDED}
    assert not {*SAMPLES} & {*EXCLUDED}
    assert {*EXCEPTIONS} <= {*SAMPLES}


def test_every_sample_is_computed_by_pytorch_in_some_dtype() -> None:
    computed = {case.name for dtype in (torch.float32, torch.int64) for case in _cases(dtype)}
    expected = {
        f"{name}[{number}]" for name, samples in _made().items() if name not in EXCEPTIONS for number in range(samples)
    }
    assert computed == expected


def _made() -> dict[str, int]:
    from tests.core_aten.tensors import Tensors

    return {name: len(samples(Tensors(torch.float32))) for name, samples in SAMPLES.items()}


def test_the_first_sample_of_every_third_overload() -> None:
    cases = {case.overload: case for dtype in (torch.int64, torch.float32) for case in reversed(_cases(dtype))}
    assert len(cases) == len(supported())
    found = problems(sorted(cases.values(), key=lambda case: case.name)[::3])
    assert not found, _report(found)


@pytest.mark.slow
def test_every_sample_in_float32() -> None:
    found = problems_in_parts(_cases(torch.float32))
    assert not found, _report(found)


@pytest.mark.slow
def test_every_sample_with_an_axis_of_unknown_size() -> None:
    cases = [case for overload in supported() for case in dynamic_cases_of(overload, torch.float32, 6, 11)]
    assert len(cases) > 300
    found = problems_in_parts(cases)
    assert not found, _report(found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_every_sample_in_a_wide_dtype(dtype: torch.dtype) -> None:
    found = problems_in_parts(_cases(dtype))
    assert not found, _report(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.int32, torch.int8, torch.uint8, torch.bool], ids=str
)
def test_two_samples_of_every_overload_in_a_narrow_dtype(dtype: torch.dtype) -> None:
    """The first and the last; `python -m tests.core_aten --dtype` takes all."""
    each = [cases_of(overload, dtype) for overload in supported()]
    cases = [case for group in each for case in dict.fromkeys((*group[:1], *group[-1:]))]
    found = problems_in_parts(cases)
    assert not found, _report(found)
