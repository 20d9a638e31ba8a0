"""Training predictors: each towards the targets of its site, alone or together with the network that they gate.

Decoupled, only predictors learn, from what the gated network's own values say. Joint, everything does, from the task as
well: gradients pass the decisions straight through (Bengio et al. 2013, arXiv 1308.3432).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.contract import PassContext
from graphopt.data.dataset import Dataset
from graphopt.edit import Builder, Edit
from graphopt.errors import UsageError
from graphopt.fit import fit
from graphopt.fitting.losses import Distillation, Loss, Outputs, cross_entropy
from graphopt.fitting.options import FitOptions
from graphopt.fitting.trainable import choose_weights, with_weights
from graphopt.gradient_estimators import straight_through_step
from graphopt.passes.channel_gating.forms import MaskWriter, current
from graphopt.passes.channel_gating.predictor import Predictor, scores, threshold
from graphopt.passes.channel_gating.sites import Site, find_sites
from graphopt.passes.channel_gating.targets import block_heat, heat_of, share_targets
from graphopt.program import Program, get_attribute
from graphopt.watched import with_outputs

aten = torch.ops.aten

LEARNING_RATE = 1e-2  # of predictors alone
JOINT_RATE = 2e-3  # of whole networks
RULE = "channel-gating"


@dataclass(frozen=True)
class _Trained:
    """The nodes of one site in the graph that is trained, and the names of its predictor's weights."""

    site: Site
    predictor: Predictor
    scores: str
    decision: str
    value: str
    weights: tuple[str, str]


class _TrainingWriter(MaskWriter):
    """Masks by a threshold, which has a slope to pass through; a tie of scores may keep a block more."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.trained: list[_Trained] = []

    def decide(self, builder: Builder, site: Site, predictor: Predictor) -> Node:
        weight, bias = torch.nn.Parameter(predictor.weight), torch.nn.Parameter(predictor.bias)
        learned = replace(predictor, weight=weight, bias=bias)
        found = scores(builder, current(self, site), learned)
        decision = builder.call(aten.ge.Tensor, found, threshold(builder, found, predictor.count))
        names = tuple(self.editor.attribute_for(item)[0] for item in (weight, bias))
        value = self.gated_input(site).name
        self.trained.append(_Trained(site, predictor, found.name, decision.name, value, (names[0], names[1])))
        return decision


def fit_predictors(
    program: Program,
    predictors: Mapping[str, Predictor],
    context: PassContext,
    steps: int,
    *,
    mass: float | None,
    joint: bool,
) -> tuple[Program, dict[str, Predictor], str]:
    """The program, with new weights where `joint`, its predictors after at most so many steps, and what came of it.

    A fifth of the data for fitting decides which step was the best. Raises UsageError without data.
    """
    if context.data is None:
        raise UsageError(f"fit-steps={steps} trains predictors, but there is no data; give data or fit-steps=0")
    data = context.data.for_fitting()
    gated, trained = _training_program(program, predictors, context)
    watched = with_outputs(
        gated, {f"{kind}_{item.site.name}": getattr(item, kind) for item in trained for kind in KINDS}
    )
    own = [name for item in trained for name in item.weights]
    others = [name for name, _ in program.graph_module.named_parameters()] if joint else []
    options = FitOptions(
        steps=steps, learning_rate=JOINT_RATE if joint else LEARNING_RATE, schedule="cosine", seed=context.seed
    )
    loss, teacher = _loss(program, trained, data, mass, joint)
    estimators = {item.decision: _straight_through for item in trained} if joint else None
    result = fit(
        watched, data, train=[*own, *others], loss=loss, teacher=teacher, estimators=estimators, options=options
    )
    module = result.program.graph_module
    found = dict(predictors)
    for item in trained:
        weight, bias = (get_attribute(module, name).detach() for name in item.weights)
        found[item.site.name] = replace(item.predictor, weight=weight, bias=bias)
    if joint:
        weights = choose_weights(program, others)
        program = with_weights(program, weights, [get_attribute(module, weight.name) for weight in weights])
    before, after = result.history[0].held_out, min(entry.held_out for entry in result.history)
    what = "predictors and network" if joint else "predictors"
    return program, found, f"training {what} took the loss from {before:.4g} to {after:.4g} on held-out data"


KINDS = ("scores", "value")


def _training_program(
    program: Program, predictors: Mapping[str, Predictor], context: PassContext
) -> tuple[Program, list[_Trained]]:
    edit = Edit(program, PassContext(allow=context.allow), RULE)
    (editor,) = [item for item in edit.graphs() if not item.path]
    writer = _TrainingWriter(editor, RULE)
    for site in list(find_sites(editor, through_norms=True)):
        if isinstance(site, Site) and site.name in predictors:
            writer.write(site, predictors[site.name])
    return edit.finish().program, writer.trained


def _loss(
    program: Program, trained: Sequence[_Trained], data: Dataset, mass: float | None, joint: bool
) -> tuple[Loss, Program | None]:
    count = len(program.outputs)

    def to_targets(outputs: Outputs, label: Tensor | None) -> Tensor:
        total = outputs[count].new_zeros(())
        for number, item in enumerate(trained):
            found, value = outputs[count + 2 * number : count + 2 * number + 2]
            heat = block_heat(heat_of(item.site.producer.channel_axis, value), item.predictor.order, item.site.block)
            targets = share_targets(heat, mass, item.predictor.count).to(found.dtype)
            total = total + torch.nn.functional.binary_cross_entropy_with_logits(found, targets)
        return total / len(trained)

    if not joint:
        return to_targets, None
    label = next(iter(data.fit)).label
    if label is None or label.is_floating_point():
        names = tuple(spec.name for spec in program.outputs if spec.dtype.is_floating_point)
        return Distillation("relative", outputs=names, task=to_targets), program
    return lambda outputs, label: cross_entropy(outputs, label) + to_targets(outputs, label), None


def _straight_through(scores: Tensor, threshold: Tensor) -> Tensor:
    """1[scores >= threshold]: the difference of two floats is zero only where they are equal."""
    return straight_through_step(scores - threshold.detach() + torch.finfo(scores.dtype).tiny)
