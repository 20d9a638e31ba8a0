"""The loop: change the weights, evaluate, remember the best, write down where it stands."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from graphopt.data.dataset import Sample
from graphopt.errors import FitError, UsageError
from graphopt.fitting import checkpoint
from graphopt.fitting.losses import Objective
from graphopt.fitting.options import FitOptions
from graphopt.fitting.order import seed_of, step_samples
from graphopt.fitting.trainable import TrainingGraph
from graphopt.progress import tell

MOMENTUM = 0.9


@dataclass(frozen=True)
class Evaluation:
    """After `step` changes of the weights: the mean loss of the steps since the last one, and that on held-out data."""

    step: int
    loss: float | None
    held_out: float


@dataclass(frozen=True)
class FitProgress:
    """After a step: how many are done, its loss, the last loss on held-out data, and seconds left (an estimate)."""

    step: int
    steps: int
    loss: float
    held_out: float
    seconds_left: float

    def __str__(self) -> str:
        return f"loss {self.loss:.4g}, held out {self.held_out:.4g}, {self.seconds_left:.0f} s left"


@dataclass(frozen=True)
class Task:
    """Everything that stays the same during a fit; `deployed` is the graph without estimators."""

    training: TrainingGraph
    deployed: TrainingGraph
    objective: Objective
    fit: Sequence[Sample]
    held_out: Sequence[Sample]
    options: FitOptions
    identity: checkpoint.Identity
    path: Path | None
    progress: Callable[[FitProgress], None] | None

    @property
    def total(self) -> int:
        return self.options.total_steps(len(self.fit))

    @property
    def every(self) -> int:
        return self.options.evaluate_every or self.options.steps_an_epoch(len(self.fit))


@dataclass
class Position:
    """Where a fit stands, but for its tensors."""

    step: int = 0
    best_step: int = 0
    without_gain: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0
    history: list[Evaluation] = field(default_factory=list)
    reached: set[str] = field(default_factory=set)  # weights that had a gradient


class Loop:
    """One fit. What it holds is whole between steps; `whole` is False while a step or an evaluation is written in."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.weights = task.training.weights
        self.masters = [weight.master() for weight in self.weights]
        self.best = [master.detach().clone() for master in self.masters]
        self.optimizer = _optimizer(self.masters, task.options)
        self.at = Position()
        self.whole = True
        self.began = time.monotonic()
        self.began_at = 0

    def run(self) -> Literal["steps", "patience"]:
        """Go on until the last step or until patience ends; an interrupt leaves the checkpoint of a whole step."""
        self.began, self.began_at = time.monotonic() - self.at.seconds, self.at.step
        begin = time.monotonic()
        try:
            while True:
                if self._due():
                    self._evaluate()
                    self.save()
                if self._out_of_patience():
                    return "patience"
                if self.at.step >= self.task.total:
                    return "steps"
                loss = self._step()
                self._report(loss, time.monotonic() - begin)
        except KeyboardInterrupt:
            if self.whole:
                self.save()
            raise

    def _due(self) -> bool:
        done = self.at.history[-1].step if self.at.history else -1
        return done < self.at.step and (self.at.step % self.task.every == 0 or self.at.step >= self.task.total)

    def _out_of_patience(self) -> bool:
        patience = self.task.options.patience
        return patience is not None and self.at.without_gain >= patience

    def _step(self) -> float:
        options, number = self.task.options, self.at.step + 1
        torch.manual_seed(seed_of(options.seed, "noise", self.at.step))
        total, gradients = 0.0, [None] * len(self.masters)  # type: tuple[float, list[Tensor | None]]
        samples = step_samples(self.task.fit, options, self.at.step)
        for sample in samples:
            loss, found = self._gradients(sample, 1 / len(samples), number)
            total += loss
            gradients = [_add(old, new) for old, new in zip(gradients, found, strict=True)]
        self._check(total, gradients, number)
        with self._writing():
            for master, gradient in zip(self.masters, gradients, strict=True):
                master.grad = gradient  # None, where no branch taken reads it: such a weight stays as it is
            if options.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.masters, options.clip_norm)
            self.optimizer.param_groups[0]["lr"] = options.rate(self.at.step, self.task.total)
            self.optimizer.step()
            self.at.step = number
            self.at.loss_sum += total
            self.at.loss_count += 1
        return total

    def _gradients(self, sample: Sample, share: float, number: int) -> tuple[float, Sequence[Tensor | None]]:
        """The sample's share of the loss and of the gradients."""
        try:
            loss = self._loss(self.task.training, sample) * share
            if not loss.requires_grad:
                raise UsageError(f"the loss of step {number} depends on none of {self._names(self.weights)}")
            return float(loss.detach()), torch.autograd.grad(loss, self.masters, allow_unused=True)
        except RuntimeError as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise FitError(f"step {number} cannot be computed in PyTorch: {first}") from error

    def _loss(self, graph: TrainingGraph, sample: Sample) -> Tensor:
        outputs = graph.run(self.masters, sample.inputs)
        return _scalar(self.task.objective(sample.inputs, outputs, sample.label))

    def _check(self, loss: float, gradients: Sequence[Tensor | None], number: int) -> None:
        """A step is taken only with finite numbers, and no weight is named in vain."""
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
        if not (math.isfinite(loss) and finite):
            what = (
                f"loss of step {number} is {loss}" if not math.isfinite(loss) else f"gradient of step {number} is not"
            )
            raise FitError(f"the {what}{self._advice()}")
        pairs = zip(self.weights, gradients, strict=True)
        self.at.reached.update(weight.name for weight, gradient in pairs if gradient is not None)
        epoch = self.task.options.steps_an_epoch(len(self.task.fit))
        if number == (min(epoch, self.task.total) if self.task.training.has_branches else 1):
            missing = [weight for weight in self.weights if weight.name not in self.at.reached]
            if missing:
                raise UsageError(f"the loss gives no gradient to {self._names(missing)}; leave it out of train")

    def _advice(self) -> str:
        kept = "" if self.task.path is None else f"; {self.task.path} holds the last evaluated state"
        return f", not finite; use a lower learning_rate or clip_norm{kept}"

    @staticmethod
    def _names(weights: Sequence[Any]) -> str:
        return ", ".join(weight.name for weight in weights[:3]) + (f" and {len(weights) - 3} more" * (len(weights) > 3))

    def _evaluate(self) -> None:
        held_out = 0.0
        with torch.no_grad():
            for sample in self.task.held_out:
                held_out += float(self._loss(self.task.deployed, sample)) / len(self.task.held_out)
        if not math.isfinite(held_out):
            raise FitError(f"the loss on held-out data after step {self.at.step} is {held_out}{self._advice()}")
        at = self.at
        gain = not at.history or held_out < min(item.held_out for item in at.history)
        with self._writing():
            mean = at.loss_sum / at.loss_count if at.loss_count else None
            at.history.append(Evaluation(at.step, mean, held_out))
            at.loss_sum, at.loss_count = 0.0, 0
            at.without_gain = 0 if gain else at.without_gain + 1
            if gain:
                at.best_step = at.step
                self.best = [master.detach().clone() for master in self.masters]

    def _report(self, loss: float, elapsed: float) -> None:
        at, total = self.at, self.task.total
        left = elapsed / (at.step - self.began_at) * (total - at.step)
        progress = FitProgress(at.step, total, loss, at.history[-1].held_out, left)
        tell(f"fitting, {progress}", at.step - 1, total)
        if self.task.progress is not None:
            self.task.progress(progress)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self.whole = False
        yield
        self.whole = True

    def save(self) -> None:
        """Write the checkpoint, if there is to be one. Raises WriteError."""
        self.at.seconds = time.monotonic() - self.began
        if self.task.path is None:
            return
        position = asdict(self.at) | {"reached": sorted(self.at.reached)}
        tensors = {"masters": [master.detach() for master in self.masters], "best": self.best}
        state = {"identity": self.task.identity, "position": position, "optimizer": self.optimizer.state_dict()}
        checkpoint.save(self.task.path, {**state, **tensors})

    def restore(self, state: dict[str, Any]) -> None:
        """Take up where a checkpoint stands."""
        position = dict(state["position"])
        position["history"] = [Evaluation(**item) for item in position["history"]]
        position["reached"] = set(position["reached"])
        self.at = Position(**position)
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"], strict=True):
                master.copy_(saved)
        self.best = list(state["best"])
        self.optimizer.load_state_dict(state["optimizer"])


def _optimizer(masters: list[Tensor], options: FitOptions) -> torch.optim.Optimizer:
    if options.optimizer == "sgd":
        return torch.optim.SGD(masters, options.learning_rate, MOMENTUM, weight_decay=options.weight_decay)
    return torch.optim.AdamW(masters, options.learning_rate, weight_decay=options.weight_decay)


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        found = f"a {type(loss).__name__}" if not isinstance(loss, Tensor) else f"{loss.dtype} {list(loss.shape)}"
        raise UsageError(f"the loss must be a tensor with one floating-point number, got {found}")
    return loss.reshape(())


def _add(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new
