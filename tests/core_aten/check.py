"""Samples compiled together and compared with PyTorch; one that fails is taken apart to name the calls at fault."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from graphopt.arrays import array_of, tensor_of
from graphopt.capture import capture
from graphopt.errors import GraphoptError
from tests.core_aten.samples import (
    DTYPE_EXCEPTIONS,
    EXCEPTIONS,
    EXCLUDED,
    FIRST_ONLY,
    SAMPLES,
    UNSPECIFIED,
    core_overloads,
    name_of,
)
from tests.core_aten.tensors import Call, Tensors

_TOLERANCES = {  # relative and absolute
    torch.float64: (1e-11, 1e-12),
    torch.float32: (2e-5, 5e-6),
    torch.float16: (5e-3, 5e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}


@dataclass(frozen=True, eq=False)
class Case:
    """One call of one overload; `others` holds its tensors at another number of rows, if it is compiled dynamically."""

    name: str
    overload: torch._ops.OpOverload
    call: Call
    others: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        return _tensors(self.call)

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The results with these in place of the call's own tensors; sizes as tensors."""
        leaves, form = _pytree.tree_flatten((self.call.args, self.call.kwargs))
        pending = iter(tensors)
        args, kwargs = _pytree.tree_unflatten([next(pending) if isinstance(v, Tensor) else v for v in leaves], form)
        result = self.overload(*args, **kwargs)
        results = result if isinstance(result, (tuple, list)) else [result]
        results = results[:1] if name_of(self.overload) in FIRST_ONLY else results
        return [r if isinstance(r, Tensor) else torch.full((1,), r) for r in results]


def _tensors(call: Call) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]


def cases_of(overload: torch._ops.OpOverload, dtype: torch.dtype, rows: int = 3) -> list[Case]:
    """The samples of an overload that PyTorch itself computes in `dtype`; none where that is an exception."""
    if (name_of(overload), dtype) in DTYPE_EXCEPTIONS:
        return []
    samples = SAMPLES[name_of(overload)](Tensors(dtype, rows))
    cases = [Case(f"{name_of(overload)}[{number}]", overload, call) for number, call in enumerate(samples)]
    return [case for case in cases if _is_computed(case)]


def _is_computed(case: Case) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case(case.tensors)
    except (RuntimeError, NotImplementedError, TypeError, IndexError, ValueError):
        return False
    return True


def dynamic_cases_of(overload: torch._ops.OpOverload, dtype: torch.dtype, rows: int, others: int) -> list[Case]:
    """The samples with an axis that follows the number of rows, and no number that does."""
    found = []
    for case, other in zip(cases_of(overload, dtype, rows), cases_of(overload, dtype, others), strict=True):
        pairs = list(zip(case.tensors, other.tensors, strict=True))
        if _numbers(case.call) == _numbers(other.call) and any(a.shape != b.shape for a, b in pairs):
            found.append(Case(case.name, case.overload, case.call, tuple(other.tensors)))
    return found


def _numbers(call: Call) -> list[Any]:
    return [leaf for leaf in _pytree.tree_leaves((call.args, call.kwargs)) if not isinstance(leaf, Tensor)]


class Calls(nn.Module):
    """All cases as one module, a tensor that several of them read being one input."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.cases = list(cases)
        self.inputs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.places: list[list[int]] = []
        for case in cases:
            pairs = list(zip(case.tensors, case.others or case.tensors, strict=True))
            self.inputs.update({(id(a), id(b)): (a, b) for a, b in pairs})
            order = {key: number for number, key in enumerate(self.inputs)}
            self.places.append([order[id(a), id(b)] for a, b in pairs])

    def forward(self, tensors: list[Tensor]) -> list[list[Tensor]]:
        return [case([tensors[p] for p in places]) for case, places in zip(self.cases, self.places, strict=True)]


def problems(cases: Sequence[Case]) -> dict[str, str]:
    """What is wrong with which case: "error: ..." where it does not compile, else how results differ."""
    try:
        return _compared(Calls(cases))
    except (GraphoptError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AssertionError) as e:
        if len(cases) == 1:
            return {cases[0].name: f"error: {type(e).__name__}: {str(e).strip().splitlines()[0]}"}
    half = len(cases) // 2
    return {**problems(cases[:half]), **problems(cases[half:])}


def _compared(module: Calls) -> dict[str, str]:
    compiling = importlib.import_module("graphopt.compile")
    pairs = list(module.inputs.values())
    axes = [{n: "rows" for n, (p, q) in enumerate(zip(a.shape, b.shape, strict=True)) if p != q} for a, b in pairs]
    shapes = {f"tensors.{number}": each for number, each in enumerate(axes) if each}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = capture(module, ([a for a, _ in pairs],), dynamic_shapes=shapes or None)
    with mock.patch.object(compiling, "check_session", lambda *_: {}):  # compared here, output by output
        session = compiling.compile(program, threads=2).session()
    found: dict[str, str] = {}
    for tensors in [[pair[side] for pair in pairs] for side in ((0, 1) if shapes else (0,))]:
        wanted = module(tensors)
        eager = program(*tensors)
        feed = {spec.name: array_of(tensor) for spec, tensor in zip(program.inputs, tensors, strict=True)}
        arrays = session.run(None, feed)
        results = [tensor_of(array, spec.dtype) for array, spec in zip(arrays, program.outputs, strict=True)]
        place = 0
        for case, want in zip(module.cases, wanted, strict=True):
            for each, once, result in zip(want, eager[place:], results[place:], strict=False):
                loose = name_of(case.overload) in UNSPECIFIED
                problem = difference(once, each, loose, "captured") or difference(result, each, loose, "compiled")
                if problem:
                    found.setdefault(case.name, problem)
            place += len(want)
    return found


def difference(result: Tensor, want: Tensor, unspecified: bool, label: str) -> str:
    """What is wrong with `result`, or nothing; NaN equals NaN, zeros differ by their sign."""
    if result.shape != want.shape or result.dtype != want.dtype:
        return f"{label}: {result.dtype}{list(result.shape)}, PyTorch gives {want.dtype}{list(want.shape)}"
    if unspecified:
        return ""
    wrong = result != want
    if want.is_floating_point():
        relative, absolute = _TOLERANCES[want.dtype]
        wrong = ~torch.isclose(result, want, rtol=relative, atol=absolute, equal_nan=True)
        wrong |= (result == 0) & (want == 0) & (torch.signbit(result) != torch.signbit(want))
    if not wrong.any():
        return ""
    examples = f"{result[wrong][:4].tolist()} for {want[wrong][:4].tolist()}"
    return f"{label}: {int(wrong.sum())} of {want.numel()} differ, {examples}"


def supported() -> list[torch._ops.OpOverload]:
    """Core overloads that are not left out by name."""
    return [overload for overload in core_overloads() if name_of(overload) not in {*EXCLUDED, *EXCEPTIONS}]


def problems_in_parts(cases: Sequence[Case], together: int = 100) -> dict[str, str]:
    """As `problems`, in programs of so many cases."""
    found: dict[str, str] = {}
    for first in range(0, len(cases), together):
        found |= problems(cases[first : first + together])
    return found
