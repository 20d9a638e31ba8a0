"""Each rewrite on its own: the old and the new nodes run on the same inner values, and must agree.

The program before the pass runs once for every sample, and the values that rewrites read are kept. What an earlier
rewrite of the pass made is computed on the way, so a rewrite of a rewrite has its values too. A rewrite in a branch
that a sample does not take is left to the samples that take it.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx.node import map_aggregate
from torch.utils import _pytree

from graphopt.checking.evidence import Sample, prepare
from graphopt.checking.exactness import RELATIVE, Verdict, judge
from graphopt.checking.reference import call_float64, widen
from graphopt.checking.samples import CANNOT_RUN, first_line
from graphopt.instance import Instance, Step, Value
from graphopt.interpreter import ProgramInterpreter
from graphopt.program import Program

Values = dict[str, Any]


def check_instances(program: Program, instances: Sequence[Instance], samples: Sequence[Sample]) -> dict[str, Verdict]:
    """The worst verdict on every instance, by id, over the samples that reach it; none on what no sample reaches.

    `program` is the one before the pass, `instances` are in the order in which they were made. Random operators, and
    outputs whose type or shape the rewrite changes on purpose, are left to the check of the whole program.
    """
    checkable = [instance for instance in instances if not _is_random(instance)]
    wanted = set().union(*(instance.reads() for instance in checkable)) if checkable else set()
    verdicts: dict[str, Verdict] = {}
    for sample in samples if checkable else ():
        values = record_values(prepare(program, sample), sample.inputs, wanted)
        for instance in checkable:
            verdict = _check(instance, values, wanted)
            if verdict is not None:
                verdict = Verdict(verdict.error, verdict.reason and f"{verdict.reason}, on {sample.label}")
                verdicts[instance.id] = _worse(verdicts.get(instance.id), verdict)
    return verdicts


def record_values(program: Program, inputs: Iterable[torch.Tensor], wanted: set[str]) -> Values:
    """The values of the nodes in `wanted`, "true_graph_0.linear" in a sub-graph, in one run from the initial state."""
    values: Values = {}

    def see(name: str, value: Any) -> None:
        if name in wanted:
            values[name] = value

    with torch.no_grad():
        ProgramInterpreter(program.graph_module, see=see).run(*inputs, *(item.initial for item in program.state))
    return values


def _worse(known: Verdict | None, new: Verdict) -> Verdict:
    if known is None or (known.reason is None and new.reason is not None):
        return new
    return new if known.reason is None and new.error > known.error else known


def _is_random(instance: Instance) -> bool:
    targets = (step.target for step in (*instance.old, *instance.new))
    return any(isinstance(item, OpOverload) and torch.Tag.nondeterministic_seeded in item.tags for item in targets)


def _check(instance: Instance, values: Values, wanted: set[str]) -> Verdict | None:
    if not instance.reads() <= values.keys():
        return None
    with torch.no_grad():
        old = _run(instance.old, values)
        reference = _run_float64(instance.old, values, old)
        try:
            new = _run(instance.new, values)
        except CANNOT_RUN as error:
            return Verdict(math.inf, f"does not run: {first_line(error)}")
    values.update((name, value) for name, value in new.items() if name in wanted)
    found = ChainMap(new, old, values)
    results = [found[item.name] if isinstance(item, Value) else item for item in instance.new_outputs]
    worst: Verdict | None = None
    for name, result in zip(instance.old_outputs, results, strict=True):
        verdict = _compare(old[name], result, reference[name])
        if verdict is not None:
            worst = _worse(worst, Verdict(verdict.error, verdict.reason and f"{name} {verdict.reason}"))
    return worst


def _compare(old: Any, new: Any, reference: Any) -> Verdict | None:
    """The worst of all tensors and numbers in a result; None where the rewrite gives another type or shape."""
    worst: Verdict | None = None
    leaves = [_pytree.tree_leaves(value) for value in (old, new, reference)]
    if len(leaves[0]) != len(leaves[1]):
        return None
    for left, right, exact in zip(*leaves, strict=True):
        if type(left) is not type(right) and not (isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)):
            return None
        if not isinstance(left, torch.Tensor):
            worst = _worse(worst, _judge_numbers(left, right))
        elif (left.dtype, left.shape) == (right.dtype, right.shape):
            worst = _worse(worst, judge(left, right, exact))
        else:
            return None
    return worst


def _judge_numbers(old: Any, new: Any) -> Verdict:
    """Sizes and what is computed of them: Python has them in float64 already."""
    equal = math.isclose(old, new, rel_tol=RELATIVE) if isinstance(old, float) else old == new
    return Verdict(0.0) if equal else Verdict(math.inf, f"is {new} instead of {old}")


def _run(steps: Sequence[Step], outside: Values) -> Values:
    made: Values = {}
    for step in steps:
        if step.target is None:
            made[step.name] = step.args[0]
            continue
        args, kwargs = _arguments(step, made, outside)
        made[step.name] = step.target(*args, **kwargs)
    return made


def _run_float64(steps: Sequence[Step], outside: Values, own: Values) -> Values:
    """With every floating-point value in float64; a step that cannot gives what it gave in its own types, widened."""
    made: Values = {}
    for step in steps:
        if step.target is None:
            made[step.name] = widen(step.args[0])
            continue
        args, kwargs = _arguments(step, made, outside)
        try:
            made[step.name] = call_float64(step.target, args, kwargs)
        except CANNOT_RUN:
            made[step.name] = _pytree.tree_map(widen, own[step.name])
    return made


def _arguments(step: Step, made: Values, outside: Values) -> tuple[Any, Any]:
    """Positional and named arguments, with values in place of names."""

    def value(leaf: Any) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        return made[leaf.name] if leaf.name in made else outside[leaf.name]

    return map_aggregate(step.args, value), map_aggregate(dict(step.kwargs), value)
