"""Compiled operators against PyTorch: many in one module, since one build costs up to a second."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.arrays import array_of, tensor_of
from graphopt.capture import capture
from graphopt.compile import Artifact
from graphopt.program import Program

Case = Callable[..., Any]
Check = Callable[..., Any]


class Cases(nn.Module):
    """Every case applied to the same inputs; the names end up in the failure message."""

    def __init__(self, cases: Mapping[str, Case]) -> None:
        super().__init__()
        self.cases = dict(cases)

    def forward(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> dict[str, Any]:
        inputs = [x for x in (a, b, c) if x is not None]
        return {name: case(*inputs) for name, case in self.cases.items()}


class Compiled:
    """A compiled program as a function of tensors."""

    def __init__(self, program: Program, artifact: Artifact) -> None:
        self.program, self.artifact = program, artifact
        self.session = artifact.session()

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        feed = {spec.name: array_of(tensor) for spec, tensor in zip(self.program.inputs, tensors, strict=True)}
        results = self.session.run(None, feed)
        return [tensor_of(array, spec.dtype) for array, spec in zip(results, self.program.outputs, strict=True)]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """compiled(module or cases, inputs, dynamic=None) -> a function of tensors that runs the compiled code.

    `dynamic` is {axis: name} for each input or None. The check that `compile` itself makes is left to `agree`, which
    names every output that is wrong and looks at NaN too.
    """
    compiling = importlib.import_module("graphopt.compile")
    monkeypatch.setattr(compiling, "check_session", lambda *_: {})

    def build(
        subject: nn.Module | Mapping[str, Case],
        inputs: Sequence[Tensor],
        dynamic: Sequence[Mapping[int, str] | None] | None = None,
    ) -> Compiled:
        module = subject if isinstance(subject, nn.Module) else Cases(subject)
        names = list(inspect.signature(module.forward).parameters)
        shapes = {name: dict(axes) for name, axes in zip(names, dynamic or (), strict=False) if axes}
        program = capture(module, tuple(inputs), dynamic_shapes=shapes or None)
        return Compiled(program, compiling.compile(program, threads=2))

    return build


@pytest.fixture
def agree(compiled: Callable[..., Any]) -> Check:
    """agree(module or cases, inputs, dynamic=None, more=(), rtol=, atol=): equal values, shapes and dtypes.

    `more` are inputs at other sizes. Tolerances are those of float32. Returns what `compiled` does.
    """

    def check(
        subject: nn.Module | Mapping[str, Case],
        inputs: Sequence[Tensor],
        dynamic: Sequence[Mapping[int, str] | None] | None = None,
        more: Sequence[Sequence[Tensor]] = (),
        *,
        rtol: float = 2e-5,
        atol: float = 2e-6,
    ) -> Compiled:
        run = compiled(subject, inputs, dynamic)
        for tensors in (inputs, *more):
            outputs = zip(run.program.outputs, run(*tensors), run.program(*tensors), strict=True)
            found = [(spec.name, difference(result, want, rtol, atol)) for spec, result, want in outputs]
            problems = [f"{name}: {problem}" for name, problem in found if problem]
            assert not problems, f"at {[tuple(t.shape) for t in tensors]}:\n" + "\n".join(problems)
        return run

    return check


def difference(result: Tensor, want: Tensor, rtol: float, atol: float) -> str:
    """What is wrong with `result`, or nothing; NaN equals NaN, and narrow floats may be one rounding apart."""
    if result.shape != want.shape or result.dtype != want.dtype:
        return f"is {result.dtype}{list(result.shape)}, PyTorch gives {want.dtype}{list(want.shape)}"
    if want.dtype is torch.float64:
        rtol, atol = rtol * 1e-6, atol * 1e-6
    if want.dtype in (torch.float16, torch.bfloat16):
        rtol, atol = max(rtol, 2 * torch.finfo(want.dtype).eps), max(atol, torch.finfo(want.dtype).eps)
    if not want.is_floating_point():
        wrong = result != want
    else:
        wrong = ~torch.isclose(result, want, rtol=rtol, atol=atol, equal_nan=True)
    if not wrong.any():
        return ""
    return f"{int(wrong.sum())} of {want.numel()} differ, {result[wrong][:4].tolist()} for {want[wrong][:4].tolist()}"
