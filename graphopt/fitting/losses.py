"""What is made small: a task loss on labels, the distance from a teacher's outputs, or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.errors import UnknownNameError, UsageError
from graphopt.program import Program

Outputs = tuple[Tensor, ...]
TaskLoss = Callable[[Outputs, Tensor | None], Tensor]
DISTANCES = ("mse", "relative", "kl", "cosine")


@dataclass(frozen=True)
class Distillation:
    """The distance of the program's outputs from the teacher's, averaged over `outputs` (none: all of a float type).

    `kind`: "mse", the mean squared difference; "relative", that over the mean square of the teacher's; "cosine",
    1 - cosine along the last axis; "kl", the Kullback-Leibler divergence of softmax(output / temperature) along the
    last axis from the teacher's, times temperature squared (Hinton, Vinyals, Dean 2015, arXiv 1503.02531). The mean
    "relative" distance of `features`, further outputs of both such as inner layers, is added to it, and a `task` loss
    of (outputs, label) `task_weight` times.
    """

    kind: Literal["mse", "relative", "kl", "cosine"] = "mse"
    outputs: tuple[str, ...] = ()
    temperature: float = 1.0
    task: TaskLoss | None = None
    task_weight: float = 1.0
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in DISTANCES:
            raise UsageError(f"kind={self.kind!r} is none of {', '.join(DISTANCES)}")
        for field, names in (("outputs", self.outputs), ("features", self.features)):
            if isinstance(names, str):
                raise UsageError(f"{field}={names!r} must be a tuple of names: {field}=({names!r},)")
        if not self.temperature > 0:
            raise UsageError(f"temperature={self.temperature} must be positive")
        if self.temperature != 1 and self.kind != "kl":
            raise UsageError(f"temperature={self.temperature} has no effect on {self.kind!r}; leave it out")
        if self.task_weight != 1 and self.task is None:
            raise UsageError(f"task_weight={self.task_weight} has no effect without a task loss; leave it out")


Loss = Literal["mse", "relative", "kl", "cosine", "cross-entropy"] | Distillation | TaskLoss | None
Pairs = Sequence[tuple[str, str, int, int]]  # the kind of distance, the output's name, its place here and there
Objective = Callable[[tuple[Tensor, ...], Outputs, Tensor | None], Tensor]  # of inputs, outputs and label


def cross_entropy(outputs: Outputs, label: Tensor | None) -> Tensor:
    """Mean cross entropy of the first output, logits along the last axis, and integer labels, -100 being left out."""
    if label is None:
        raise UsageError("the loss 'cross-entropy' needs labels, but the data has none; give them, or a teacher")
    logits = outputs[0]
    if logits.shape[:-1].numel() != label.numel():
        raise UsageError(
            f"the first output, {list(logits.shape)}, has logits for {logits.shape[:-1].numel()} labels, but the label "
            f"of these samples is {list(label.shape)}"
        )
    return functional.cross_entropy(logits.flatten(0, -2), label.flatten().long())


def make_objective(program: Program, loss: Loss, teacher: Program | None) -> Objective:
    """The loss as a function of inputs, outputs and label. Raises UsageError where loss and teacher do not fit."""
    if loss is None:
        loss = "mse"
        if teacher is None:
            raise UsageError("give a loss ('cross-entropy', or a function of outputs and labels), or a teacher")
    if isinstance(loss, str) and loss in DISTANCES:
        loss = Distillation(loss)  # type: ignore[arg-type]
    if isinstance(loss, Distillation):
        return _distill(program, loss, teacher)
    if loss == "cross-entropy":
        loss = cross_entropy
    if not callable(loss):
        raise UsageError(f"loss={loss!r} is none of {', '.join(DISTANCES)}, cross-entropy and no function")
    if teacher is not None:
        raise UsageError("a teacher has no effect on this loss; put the loss into Distillation(task=...)")
    task = loss
    return lambda inputs, outputs, label: task(outputs, label)


def _distill(program: Program, loss: Distillation, teacher: Program | None) -> Objective:
    if teacher is None:
        raise UsageError(f"the loss {loss.kind!r} is a distance from a teacher's outputs; give teacher=...")
    names = loss.outputs or tuple(
        spec.name for spec in program.outputs if spec.dtype.is_floating_point and spec.name not in loss.features
    )
    order = _input_order(program, teacher)
    pairs = [(loss.kind, name, *_positions(program, teacher, name)) for name in _not_empty(program, names)]
    features = [("relative", name, *_positions(program, teacher, name)) for name in loss.features]

    def objective(inputs: tuple[Tensor, ...], outputs: Outputs, label: Tensor | None) -> Tensor:
        targets = teacher(*(inputs[index] for index in order))

        def mean(group: Pairs) -> Tensor:
            found = [_distance(kind, loss, name, outputs[at], targets[other]) for kind, name, at, other in group]
            return torch.stack(found).mean()

        total = mean(pairs) + mean(features) if features else mean(pairs)
        return total if loss.task is None else total + loss.task_weight * loss.task(outputs, label)

    return objective


def _not_empty(program: Program, names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise UsageError(f"{program.name} has no output of a float type to distil")
    return names


def _positions(program: Program, teacher: Program, name: str) -> tuple[int, int]:
    """Where the output of this name is in the program and in the teacher."""
    found = []
    for one in (program, teacher):
        known = [spec.name for spec in one.outputs]
        if name not in known:
            raise UnknownNameError(f"output of {one.name}", name, known)
        spec = one.outputs[known.index(name)]
        if not spec.dtype.is_floating_point:
            raise UsageError(f"output {name!r} of {one.name} is {spec.dtype}; distil outputs of a float type")
        found.append(known.index(name))
    return found[0], found[1]


def _input_order(program: Program, teacher: Program) -> list[int]:
    ours = {spec.name: (index, spec.dtype) for index, spec in enumerate(program.inputs)}
    for spec in teacher.inputs:
        if spec.name not in ours:
            raise UnknownNameError(f"input of {program.name}, which the teacher takes,", spec.name, ours)
        if ours[spec.name][1] != spec.dtype:
            raise UsageError(f"input {spec.name!r} is {spec.dtype} for the teacher, {ours[spec.name][1]} here")
    return [ours[spec.name][0] for spec in teacher.inputs]


def _distance(kind: str, loss: Distillation, name: str, output: Tensor, target: Tensor) -> Tensor:
    if output.shape != target.shape:
        raise UsageError(f"output {name!r} is {list(output.shape)}, the teacher's is {list(target.shape)}")
    target = target.to(output.dtype)
    if kind == "mse":
        return functional.mse_loss(output, target)
    if kind == "relative":
        return functional.mse_loss(output, target) / target.square().mean().clamp(min=torch.finfo(target.dtype).tiny)
    if kind == "cosine":
        return (1 - functional.cosine_similarity(output, target, dim=-1)).mean()
    ours, theirs = ((value / loss.temperature).log_softmax(-1) for value in (output, target))
    return (theirs.exp() * (theirs - ours)).sum(-1).mean() * loss.temperature**2
