"""The float64 run that exact passes are judged against, and the error of a result against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree

from graphopt.checking.samples import CANNOT_RUN
from graphopt.interpreter import ProgramInterpreter
from graphopt.program import Program

NARROW = (torch.float32, torch.float16, torch.bfloat16)


def run_float64(program: Program, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Outputs, then new state, with every floating-point value and constant in float64.

    An operator without a float64 kernel runs in the program's own types; its result is widened again. So are the
    program's own results where it does not run as a whole: an index that rounds otherwise may be out of range.
    """
    values = [widen(value) for value in (*inputs, *(item.initial for item in program.state))]
    try:
        with torch.no_grad():
            return tuple(_Float64(program.graph_module).run(*values))
    except CANNOT_RUN:
        outputs, state = program.step(tuple(inputs))
        return tuple(map(widen, (*outputs, *state)))


def widen(value: Any) -> Any:
    """Floating-point tensors as float64, complex ones as complex128; anything else as it is."""
    if isinstance(value, torch.Tensor):
        if value.dtype in NARROW:
            return value.double()
        if value.dtype == torch.complex64:
            return value.to(torch.complex128)
    return value


def call_float64(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One call with its floating-point values, and the types among its arguments, in float64.

    Raises one of CANNOT_RUN where the operator has no kernel for that.
    """
    if target is torch.ops.higher_order.cond:
        predicate, when_true, when_false, operands = args
        branch = when_true if bool(predicate) else when_false
        return tuple(_Float64(branch).run(*map(widen, operands)))
    args, kwargs = map_aggregate((tuple(args), dict(kwargs)), lambda value: _wide_type(widen(value)))
    result = target(*args, **kwargs)
    return widen(result) if isinstance(result, torch.Tensor) else _pytree.tree_map(widen, result)


class _Float64(ProgramInterpreter):
    """Runs one graph in float64; `fetch_attr` and `compute` are where values come into being."""

    def fetch_attr(self, target: str) -> Any:
        return widen(super().fetch_attr(target))

    def compute(self, node: Node) -> Any:
        if node.op != "call_function":
            return super().compute(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        try:
            return call_float64(node.target, args, kwargs)
        except CANNOT_RUN:
            narrow = [_narrow(value, source) for value, source in zip(args, node.args, strict=True)]
            named = {name: _narrow(value, node.kwargs[name]) for name, value in kwargs.items()}
            return _pytree.tree_map(widen, node.target(*narrow, **named))  # type: ignore[operator]


def _wide_type(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value in NARROW else torch.complex128 if value == torch.complex64 else value
    return value


def _narrow(value: Any, source: Any) -> Any:
    """`value` in the types that the program itself has at `source`."""
    if isinstance(source, Node):
        own = _pytree.tree_leaves(source.meta.get("val"))
        leaves, structure = _pytree.tree_flatten(value)
        if len(own) != len(leaves):
            return value
        pairs = zip(leaves, own, strict=True)
        return _pytree.tree_unflatten(
            [leaf.to(fake.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf, fake in pairs], structure
        )
    if isinstance(source, (list, tuple)):
        return [_narrow(item, origin) for item, origin in zip(value, source, strict=True)]
    return value


def errors(result: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """|result - reference| of every element, float64: 0 for equal infinities and for NaN in both, inf for other NaN."""
    left, right = widen(result), widen(reference)
    equal = same_elements(left, right)
    whole = not (left.is_floating_point() or left.is_complex())
    if whole:
        left, right = left.double(), right.double()
    difference = torch.where(equal, torch.zeros_like(left), left - right).abs()
    if whole:  # float64 cannot tell neighbours above 2**53 apart
        difference = torch.where(equal, difference, difference.clamp_min(1.0))
    return torch.where(difference.isnan(), torch.full_like(difference, torch.inf), difference)


def same_elements(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Where two tensors are equal, NaN being equal to NaN."""
    return (left == right) | (left.isnan() & right.isnan())


def largest_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest of `errors`; 0 for empty tensors."""
    return float(errors(result, reference).max()) if result.numel() else 0.0


def magnitude(reference: torch.Tensor) -> float:
    """max |finite value| of a reference; 0 for none."""
    wide = widen(reference)
    if not (wide.is_floating_point() or wide.is_complex()):
        wide = wide.double()
    finite = wide[wide.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0
