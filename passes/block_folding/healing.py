"""Healing: what is left learns to give what the whole network gave, at its end and after each block.

Every block that is left is to give what its successor got in the whole network, so that the one before those that are
gone learns to do their part: layer-wise distillation of the tail, as the last stage of Jing et al. 2024, "FoldGPT"
(arXiv 2407.00928), beside the distance of the outputs: layers say more about each sample than outputs do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphopt.contract import PassContext
from graphopt.data.dataset import Dataset
from graphopt.fit import fit
from graphopt.fitting.losses import Distillation
from graphopt.fitting.options import FitOptions
from graphopt.fitting.trainable import choose_weights, with_weights
from graphopt.program import Program, get_attribute
from graphopt.watched import with_outputs

LEARNING_RATE = 3e-4  # for networks of some hundred channels; narrower ones stand several times as much


def heal(
    program: Program,
    teacher: Program,
    trained: Sequence[str],
    layers: Mapping[str, str],
    context: PassContext,
    steps: int,
    learning_rate: float = LEARNING_RATE,
) -> tuple[Program, str]:
    """The program with these weights distilled from `teacher` for at most so many steps, and what came of it.

    `layers` maps nodes of the program to those of the teacher whose values they are to have. Where labels are whole
    numbers the first output is logits, which are matched by the divergence of their softmax; anything else is matched
    by its mean square, relative to the teacher's. A fifth of the data for fitting decides which step was the best.
    Raises UsageError where there is too little data.
    """
    data = context.data
    assert data is not None
    features = {name: f"layer_{number}" for number, name in enumerate(layers)}
    inner = tuple(features.values())
    student = with_outputs(program, {features[name]: name for name in layers})
    whole = with_outputs(teacher, {features[name]: other for name, other in layers.items()})
    loss = Distillation("relative", features=inner)
    if predicts_classes(data):
        loss = Distillation("kl", outputs=(program.outputs[0].name,), features=inner)
    options = FitOptions(steps=steps, learning_rate=learning_rate, schedule="cosine", clip_norm=1.0, seed=context.seed)
    found = fit(student, data.for_fitting(), train=trained, loss=loss, teacher=whole, options=options)
    weights = choose_weights(program, trained)
    values = [get_attribute(found.program.graph_module, weight.name) for weight in weights]
    before, after = found.history[0].held_out, min(item.held_out for item in found.history)
    note = f"healing took the distance from the whole network from {before:.4g} to {after:.4g} on held-out data"
    return with_weights(program, weights, values), note


def predicts_classes(data: Dataset) -> bool:
    """Whether labels are whole numbers, so that the first output is logits."""
    sample = next(iter(data.fit))
    return sample.label is not None and not sample.label.is_floating_point()
