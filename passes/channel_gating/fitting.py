"""Training a gated network: its weights towards the task, its predictors towards the targets of their sites.

Decoupled, decisions are constants for the network, and what predictors look at is constant for them. Joint, gradients
of the task pass the decisions straight through (Bengio et al. 2013, arXiv 1308.3432) and on into what is looked at.
Both as in Elkerdawy et al. 2022 (arXiv 2110.08232). Blocks are left out little by little: in each stage more of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.contract import PassContext
from graphopt.data.dataset import Dataset
from graphopt.edit import Builder, Edit, GraphEditor
from graphopt.errors import UsageError
from graphopt.fit import fit
from graphopt.fitting.loop import Evaluation
from graphopt.fitting.losses import Distillation, Loss, Outputs, cross_entropy
from graphopt.fitting.options import FitOptions
from graphopt.fitting.trainable import choose_weights, with_weights
from graphopt.gradient_estimators import straight_through_step
from graphopt.matcher import argument
from graphopt.passes.channel_gating.forms import MaskWriter, current
from graphopt.passes.channel_gating.predictor import Predictor, scores, threshold
from graphopt.passes.channel_gating.sites import PRODUCTS, Site, find_sites
from graphopt.passes.channel_gating.targets import block_heat, heat_of, share_targets
from graphopt.program import Program, get_attribute
from graphopt.watched import with_outputs

aten = torch.ops.aten

LEARNING_RATE = 5e-4  # of trained networks of some hundred channels
STAGES = 4
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

    def __init__(self, editor: GraphEditor, joint: bool) -> None:
        super().__init__(editor, RULE)
        self.joint = joint
        self.trained: list[_Trained] = []

    def decide(self, builder: Builder, site: Site, predictor: Predictor) -> Node:
        weight, bias = torch.nn.Parameter(predictor.weight), torch.nn.Parameter(predictor.bias)
        learned = replace(predictor, weight=weight, bias=bias)
        found = scores(builder, current(self, site), learned, apart=not self.joint)
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
    """The program and its predictors after at most so many steps in STAGES, and what came of the last one.

    A fifth of the data for fitting decides which step of a stage was the best. Raises UsageError without data.
    """
    if context.data is None:
        raise UsageError(f"fit-steps={steps} trains gates, but there is no data; give data or fit-steps=0")
    data, found, teacher = context.data.for_fitting(), dict(predictors), program
    stages = min(STAGES, steps)
    history: tuple[Evaluation, ...] = ()
    for stage in range(1, stages + 1):
        context.progress(f"{RULE}: training, part {stage}", stage - 1, stages)
        share = stage / stages
        part = None if mass is None or mass >= 1 else 1 - (1 - mass) * share
        now = {name: _eased(item, share) for name, item in found.items()} if mass is None else found
        options = FitOptions(
            steps=steps * stage // stages - steps * (stage - 1) // stages,
            learning_rate=LEARNING_RATE,
            schedule="cosine",
            clip_norm=1.0,
            seed=context.seed,
        )
        program, trained, history = _fit(program, teacher, now, data, context, options, part or mass, joint)
        found = {name: replace(trained[name], count=item.count) for name, item in found.items()}
    before, after = history[0].held_out, min(entry.held_out for entry in history)
    return program, found, f"training took the loss of the last stage from {before:.4g} to {after:.4g} on held-out data"


def _eased(predictor: Predictor, share: float) -> Predictor:
    """One that leaves out a share of the blocks that it is to leave out."""
    blocks, count = len(predictor.bias), predictor.count
    return predictor if count is None else replace(predictor, count=blocks - round((blocks - count) * share))


def _fit(
    program: Program,
    teacher: Program,
    predictors: Mapping[str, Predictor],
    data: Dataset,
    context: PassContext,
    options: FitOptions,
    mass: float | None,
    joint: bool,
) -> tuple[Program, dict[str, Predictor], tuple[Evaluation, ...]]:
    """One stage."""
    gated, trained = _training_program(program, predictors, context, joint)
    watched = with_outputs(
        gated, {f"{kind}_{item.site.name}": getattr(item, kind) for item in trained for kind in KINDS}
    )
    own = [name for item in trained for name in item.weights]
    others = network_weights(program)
    loss, taught = _loss(teacher, trained, data, mass)
    estimators = {item.decision: _straight_through for item in trained} if joint else None
    result = fit(
        watched, data, train=[*own, *others], loss=loss, teacher=taught, estimators=estimators, options=options
    )
    module = result.program.graph_module
    found = dict(predictors)
    for item in trained:
        weight, bias = (get_attribute(module, name).detach() for name in item.weights)
        found[item.site.name] = replace(item.predictor, weight=weight, bias=bias)
    weights = choose_weights(program, others)
    program = with_weights(program, weights, [get_attribute(module, weight.name) for weight in weights])
    return program, found, result.history


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
    program: Program, predictors: Mapping[str, Predictor], context: PassContext, joint: bool
) -> tuple[Program, list[_Trained]]:
    edit = Edit(program, PassContext(allow=context.allow), RULE)
    (editor,) = [item for item in edit.graphs() if not item.path]
    writer = _TrainingWriter(editor, joint)
    for site in list(find_sites(editor, through_norms=True)):
        if isinstance(site, Site) and site.name in predictors:
            writer.write(site, predictors[site.name])
    return edit.finish().program, writer.trained


def _loss(
    teacher: Program, trained: Sequence[_Trained], data: Dataset, mass: float | None
) -> tuple[Loss, Program | None]:
    count = len(teacher.outputs)

    def to_targets(outputs: Outputs, label: Tensor | None) -> Tensor:
        total = outputs[count].new_zeros(())
        for number, item in enumerate(trained):
            found, value = outputs[count + 2 * number : count + 2 * number + 2]
            heat = block_heat(heat_of(item.site.producer.channel_axis, value), item.predictor.order, item.site.block)
            targets = share_targets(heat, mass, item.predictor.count).to(found.dtype)
            total = total + torch.nn.functional.binary_cross_entropy_with_logits(found, targets)
        return total / len(trained)

    label = next(iter(data.fit)).label
    if label is None or label.is_floating_point():
        names = tuple(spec.name for spec in teacher.outputs if spec.dtype.is_floating_point)
        return Distillation("relative", outputs=names, task=to_targets), teacher
    return lambda outputs, label: cross_entropy(outputs, label) + to_targets(outputs, label), None


def _straight_through(scores: Tensor, threshold: Tensor) -> Tensor:
    """1[scores >= threshold]: the difference of two floats is zero only where they are equal."""
    return straight_through_step(scores - threshold.detach() + torch.finfo(scores.dtype).tiny)
