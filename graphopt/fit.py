"""The one loop in which passes learn: some weights of a program, on data, towards labels or a teacher."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from graphopt.data.dataset import Dataset, open_data
from graphopt.errors import UsageError
from graphopt.fitting import checkpoint as checkpoints
from graphopt.fitting.loop import Evaluation, FitProgress, Loop, Task
from graphopt.fitting.losses import Distillation, Loss, make_objective
from graphopt.fitting.options import FitOptions
from graphopt.fitting.trainable import Estimators, TrainingGraph, check_reach, choose_weights, with_weights
from graphopt.program import Program

__all__ = ["Distillation", "Evaluation", "FitOptions", "FitProgress", "FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """The program with the weights of `best_step`, the step with the least loss on held-out data (0: as it came in).

    `history` has every evaluation, the first one before any step; `seconds` counts interrupted runs too.
    """

    program: Program
    trained: tuple[str, ...]
    history: tuple[Evaluation, ...]
    stopped_by: Literal["steps", "patience"]
    best_step: int
    seconds: float


def fit(
    program: Program,
    data: Any,
    *,
    train: Sequence[str],
    loss: Loss = None,
    teacher: Program | None = None,
    estimators: Estimators | None = None,
    options: FitOptions | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Callable[[FitProgress], None] | None = None,
) -> FitResult:
    """Train the weights that `train` names; the program that comes in stays as it is, and the rest is shared.

    train: names or patterns (`*`, `?`, `[...]`) of parameters; buffers are trained under their full names only.
    data: what `graphopt.data.dataset.open_data` takes, or a Dataset; samples to fit on are held in memory, in the order
        of `options.seed`.
    loss: "cross-entropy" of the first output (logits along its last axis) and integer labels; a function of (outputs,
        label), a tuple of tensors in the program's order and a tensor or None, that returns a tensor of one number;
        or, with a `teacher` that takes the program's inputs, "mse" (the default then), "relative", "kl", "cosine" or
        a `Distillation`. It is averaged over samples.
    estimators: by the name of a node, what computes it during training, called with its arguments: a function of
        `graphopt.gradient_estimators` for a step or a rounding. Held-out data is run without them, as deployed. What
        such a function draws from PyTorch's global generator is the same in every fit with the same seed.
    checkpoint: a file that is replaced at every evaluation and on Ctrl-C. With `resume`, a fit goes on from it to the
        very bits it would have come to without the break; it begins anew where there is no file.
    progress: called after every step.

    Weights of 16 bits are trained in float32. The program runs from its initial state for every sample.

    Raises UsageError and UnknownNameError for unusable arguments, among them a weight that gets no gradient; FitError
    where a loss or gradient is not finite or PyTorch cannot compute it; WriteError where the checkpoint cannot be
    written. KeyboardInterrupt passes through.
    """
    if not isinstance(program, Program):
        raise UsageError(f"fit takes a Program, got {type(program).__name__}; make one with graphopt.capture")
    options = FitOptions() if options is None else options
    if not isinstance(options, FitOptions):
        raise UsageError(f"options is {type(options).__name__}; write options=graphopt.FitOptions(epochs=...)")
    estimators = estimators or {}
    weights = choose_weights(program, train)
    training, deployed = (TrainingGraph(program, weights, nodes) for nodes in (estimators, {}))
    check_reach(program, weights, estimators)
    dataset = data if isinstance(data, Dataset) else open_data(data, program)
    samples = {"fit": len(dataset.fit), "held out": len(dataset.held_out)}
    if not all(samples.values()):
        raise UsageError("the data has nothing to fit on or nothing to hold out; give at least two samples")
    task = Task(
        training=training,
        deployed=deployed,
        objective=make_objective(program, loss, teacher),
        fit=tuple(dataset.fit),
        held_out=tuple(dataset.held_out),
        options=options,
        identity=checkpoints.identity(weights, options, _described(loss, teacher, estimators), samples),
        path=None if checkpoint is None else Path(checkpoint),
        progress=progress,
    )
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        loop = _open(task, resume)
        stopped_by = loop.run()
    return FitResult(
        program=with_weights(program, weights, loop.best),
        trained=tuple(weight.name for weight in weights),
        history=tuple(loop.at.history),
        stopped_by=stopped_by,
        best_step=loop.at.best_step,
        seconds=loop.at.seconds,
    )


def _open(task: Task, resume: bool) -> Loop:
    loop = Loop(task)
    if resume and task.path is None:
        raise UsageError("resume=True needs checkpoint=..., the file to go on from")
    if task.path is not None and task.path.exists():
        if not resume:
            raise UsageError(f"the checkpoint {task.path} exists; write resume=True to go on from it, or delete it")
        loop.restore(checkpoints.load(task.path, task.identity))
    else:
        loop.save()  # a folder that cannot be written shows now, and an interrupt finds a whole checkpoint
    return loop


def _described(loss: Loss, teacher: Program | None, estimators: Estimators) -> str:
    """What a checkpoint remembers of functions: their names."""
    if isinstance(loss, Distillation):
        task = "" if loss.task is None else f", {loss.task_weight} of {_name(loss.task)}"
        inner = f" and of {', '.join(loss.features)}" if loss.features else ""
        text = f"{loss.kind} of {', '.join(loss.outputs) or 'all outputs'}{inner} at {loss.temperature}{task}"
    else:
        text = loss if isinstance(loss, str) else "default" if loss is None else _name(loss)
    taught = f" from {teacher.name}" if teacher is not None else ""
    nodes = [f"{_name(function)} for {node}" for node, function in sorted(estimators.items())]
    return "; ".join((text + taught, *nodes))


def _name(function: Callable[..., object]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
