"""Compiled operators against PyTorch: many in one module, since one build costs up to a second."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture

Case = Callable[..., Any]
Check = Callable[..., None]


class Cases(nn.Module):
    """Every case applied to the same inputs; the names end up in the failure message."""

    def __init__(self, cases: Mapping[str, Case]) -> None:
        super().__init__()
        self.cases = dict(cases)

    def forward(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> dict[str, Any]:
        inputs = [x for x in (a, b, c) if x is not None]
        return {name: case(*inputs) for name, case in self.cases.items()}


@pytest.fixture
def agree(monkeypatch: pytest.MonkeyPatch) -> Check:
    """agree(module or cases, inputs, dynamic=None, more=(), rtol=, atol=): equal values, shapes and dtypes.

    `dynamic` is {axis: name} for each input or None; `more` are inputs at other sizes.
    """
    compiling = importlib.import_module("graphopt.compile")
    monkeypatch.setattr(compiling, "check_session", lambda *_: {})

    def check(
        subject: nn.Module | Mapping[str, Case],
        inputs: Sequence[Tensor],
        dynamic: Sequence[Mapping[int, str] | None] | None = None,
        more: Sequence[Sequence[Tensor]] = (),
        *,
        rtol: float = 2e-5,
        atol: float = 2e-6,
    ) -> None:
        module = subject if isinstance(subject, nn.Module) else Cases(subject)
        examples = tuple(inputs)
        names = [spec.name for spec in capture(module, examples).inputs] if dynamic else []
        shapes = {n: dict(d) for n, d in zip(names, dynamic or (), strict=True) if d}
        program = capture(module, examples, dynamic_shapes=shapes or None)
        session = compiling.compile(program, threads=2).session()
        for tensors in (examples, *more):
            feed = {spec.name: tensor.numpy() for spec, tensor in zip(program.inputs, tensors, strict=True)}
            results = [torch.from_numpy(array) for array in session.run(None, feed)]
            wanted = program(*tensors)
            problems = [
                f"{spec.name}: {problem}"
                for spec, result, want in zip(program.outputs, results, wanted, strict=True)
                if (problem := difference(result, want, rtol, atol))
            ]
            assert not problems, f"at {[tuple(t.shape) for t in tensors]}:\n" + "\n".join(problems)

    return check


def difference(result: Tensor, want: Tensor, rtol: float, atol: float) -> str:
    """What is wrong with `result`, or nothing; NaN equals NaN, and narrow floats may be one rounding apart."""
    if result.shape != want.shape or result.dtype != want.dtype:
        return f"is {result.dtype}{list(result.shape)}, PyTorch gives {want.dtype}{list(want.shape)}"
    if want.dtype in (torch.float16, torch.bfloat16):
        rtol, atol = max(rtol, 2 * torch.finfo(want.dtype).eps), max(atol, torch.finfo(want.dtype).eps)
    if not want.is_floating_point():
        wrong = result != want
    else:
        wrong = ~torch.isclose(result, want, rtol=rtol, atol=atol, equal_nan=True)
    if not wrong.any():
        return ""
    return f"{int(wrong.sum())} of {want.numel()} differ, {result[wrong][:4].tolist()} for {want[wrong][:4].tolist()}"
