"""Training a gated network: its weights towards what it was without gates, its predictors towards their targets.

Decoupled, predictors stay the least squares to the targets of the ungated network: targets that move with the network
let it spread its heat until little is left out. Joint, gradients pass the decisions straight through (Bengio et al.
2013, arXiv 1308.3432) into predictors and what they look at, and predictors learn the targets that the network sets by
then. Both after Elkerdawy et al. 2022 (arXiv 2110.08232), with the ungated network as a teacher beside the labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.contract import PassContext
from graphopt.data.dataset import Dataset
from graphopt.edit import Builder, GraphEditor
from graphopt.errors import UsageError
from graphopt.fit import fit
from graphopt.fitting.losses import Distillation, Outputs, TaskLoss, cross_entropy
from graphopt.fitting.options import FitOptions
from graphopt.fitting.trainable import choose_weights, with_weights
from graphopt.gradient_estimators import straight_through_step
from graphopt.matcher import argument
from graphopt.passes.channel_gating.following import RULE, masked
from graphopt.passes.channel_gating.forms import MaskWriter, current
from graphopt.passes.channel_gating.predictor import Predictor, scores, threshold
from graphopt.passes.channel_gating.sites import PRODUCTS, Site
from graphopt.passes.channel_gating.targets import block_heat, heat_of, share_targets
from graphopt.program import Program, get_attribute
from graphopt.watched import with_outputs

aten = torch.ops.aten

LEARNING_RATE = 4e-3  # of networks of some hundred channels, and at the start far too much
TEMPERATURE = 2.0


@dataclass(frozen=True)
class _Trained:
    """The nodes of one site in the graph that is trained, and the names of its predictor's weights."""

    site: Site
    predictor: Predictor
    scores: str
    decision: str
    value: str
    weights: tuple[str, str]


class _JointWriter(MaskWriter):
    """Masks by a threshold, which has a slope to pass through; a tie of scores may keep a block more."""

    def __init__(self, editor: GraphEditor, rule: str) -> None:
        super().__init__(editor, rule)
        self.trained: list[_Trained] = []

    def decide(self, builder: Builder, site: Site, predictor: Predictor) -> Node:
        weight, bias = torch.nn.Parameter(predictor.weight), torch.nn.Parameter(predictor.bias)
        found = scores(builder, current(self, site), replace(predictor, weight=weight, bias=bias))
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
    """The program and its predictors after at most so many steps, and what came of them.

    A fifth of the data for fitting decides which step was the best. Raises UsageError without data.
    """
    if context.data is None:
        raise UsageError(f"fit-steps={steps} trains gates, but there is no data; give data or fit-steps=0")
    data, names = context.data.for_fitting(), network_weights(program)
    gated, trained = _training_program(program, predictors, joint)
    watched = with_outputs(
        gated, {f"{kind}_{item.site.name}": getattr(item, kind) for item in trained for kind in KINDS}
    )
    result = fit(
        watched,
        data,
        train=[*names, *(name for item in trained for name in item.weights)],
        loss=_loss(program, trained, data, mass),
        teacher=program,
        estimators={item.decision: _straight_through for item in trained},
        options=FitOptions(
            steps=steps, learning_rate=LEARNING_RATE, schedule="one-cycle", clip_norm=1.0, seed=context.seed
        ),
        progress=lambda at: context.progress(f"{RULE}: training, {at}", at.step, at.steps),
    )
    module, found = result.program.graph_module, dict(predictors)
    for item in trained:
        weight, bias = (get_attribute(module, name).detach() for name in item.weights)
        found[item.site.name] = replace(item.predictor, weight=weight, bias=bias)
    weights = choose_weights(program, names)
    fitted = with_weights(program, weights, [get_attribute(module, weight.name) for weight in weights])
    before, after = result.history[0].held_out, min(entry.held_out for entry in result.history)
    return fitted, found, f"training took the loss from {before:.4g} to {after:.4g} on held-out data"


def network_weights(program: Program) -> list[str]:
    """Names of what the network learns: parameters, and weights and biases of products that folding made anew."""
    graph = program.graph_module.graph
    names = {name for name, value in program.graph_module.named_parameters() if value.is_floating_point()}
    for node in graph.nodes:
        if node.target in PRODUCTS:
            read = (argument(node, "weight"), argument(node, "bias"))
            names |= {str(item.target) for item in read if isinstance(item, Node) and item.op == "get_attr"}
    read_here = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    return sorted(names & read_here)


KINDS = ("scores", "value")


def _training_program(
    program: Program, predictors: Mapping[str, Predictor], joint: bool
) -> tuple[Program, list[_Trained]]:
    """The gated program, and the sites whose predictors are trained."""
    if not joint:
        return masked(program, predictors, MaskWriter)[0], []
    gated, writer = masked(program, predictors, _JointWriter)
    return gated, writer.trained


def _loss(teacher: Program, trained: Sequence[_Trained], data: Dataset, mass: float | None) -> Distillation:
    """The distance from the teacher, with that from labels where there are classes, and from targets of `trained`."""
    count = len(teacher.outputs)

    def to_targets(outputs: Outputs) -> Tensor:
        total = outputs[count].new_zeros(())
        for number, item in enumerate(trained):
            found, value = outputs[count + 2 * number : count + 2 * number + 2]
            heat = block_heat(heat_of(item.site.producer.channel_axis, value), item.predictor.order, item.site.block)
            targets = share_targets(heat, mass, item.predictor.count).to(found.dtype)
            total = total + torch.nn.functional.binary_cross_entropy_with_logits(found, targets)
        return total / len(trained)

    label = next(iter(data.fit)).label
    classes = label is not None and not label.is_floating_point()

    def task(outputs: Outputs, label: Tensor | None) -> Tensor:
        total = cross_entropy(outputs, label) if classes else outputs[0].new_zeros(())
        return total + to_targets(outputs) if trained else total

    given: TaskLoss | None = task if classes or trained else None
    if classes:
        return Distillation("kl", outputs=(teacher.outputs[0].name,), temperature=TEMPERATURE, task=given)
    names = tuple(spec.name for spec in teacher.outputs if spec.dtype.is_floating_point)
    return Distillation("relative", outputs=names, task=given)


def _straight_through(scores: Tensor, threshold: Tensor) -> Tensor:
    """1[scores >= threshold]: the difference of two floats is zero only where they are equal."""
    return straight_through_step(scores - threshold.detach() + torch.finfo(scores.dtype).tiny)
