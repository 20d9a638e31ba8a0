"""Predictors that follow their targets inside the gated network, where what they look at has channels left out.

What a predictor is shown depends on the gates before it: least squares on the network without gates see other inputs
than those that they are used on. Solved again and again on the gated network, the predictor of the n-th site of a
chain is settled after n rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from torch import Tensor
from torch.fx import Node

from graphopt.contract import PassContext
from graphopt.data.dataset import Sample
from graphopt.data.statistics import observe
from graphopt.edit import Builder, Edit, GraphEditor
from graphopt.passes.channel_gating.forms import MaskWriter, current
from graphopt.passes.channel_gating.predictor import Predictor, solve
from graphopt.passes.channel_gating.sites import Site, find_sites
from graphopt.passes.channel_gating.targets import Rows, pooled_magnitude, pooled_mean
from graphopt.program import Program

ROUNDS = 2  # bring most of it however deep the network is
RULE = "channel-gating"

W = TypeVar("W", bound=MaskWriter)


class _LookingWriter(MaskWriter):
    """`looked_at` has what each predictor looks at, by site: the axis of its channels and its node."""

    def __init__(self, editor: GraphEditor, rule: str) -> None:
        super().__init__(editor, rule)
        self.looked_at: dict[str, tuple[int, str]] = {}

    def decide(self, builder: Builder, site: Site, predictor: Predictor) -> Node:
        product = current(self, site).producer
        self.looked_at[site.name] = product.channel_axis, product.input.name
        return super().decide(builder, site, predictor)


def follow(
    program: Program, predictors: Mapping[str, Predictor], targets: Mapping[str, Tensor], samples: Sequence[Sample]
) -> dict[str, Predictor]:
    """Predictors that are settled on the gated network; `targets`, bool [samples, blocks], by site."""
    found = dict(predictors)
    for _ in range(min(ROUNDS, len(found) - 1)):  # nothing is left out before the first one
        found = solve_again(program, found, targets, samples)
    return found


def solve_again(
    program: Program, predictors: Mapping[str, Predictor], targets: Mapping[str, Tensor], samples: Sequence[Sample]
) -> dict[str, Predictor]:
    """The least squares from what the predictors look at, gated by themselves as they are, to their targets."""
    gated, writer = masked(program, predictors, _LookingWriter)
    shown: dict[str, list[Rows]] = {}
    features: dict[str, Rows] = {}
    for name, (channel_axis, node) in writer.looked_at.items():
        reduce = pooled_magnitude if predictors[name].kind == "topk" else pooled_mean
        features[name] = Rows(partial(reduce, channel_axis))
        shown.setdefault(node, []).append(features[name])
    observe(gated, shown, samples)
    found = dict(predictors)
    for name, rows in features.items():
        weight, bias = (item.to(found[name].weight.dtype) for item in solve(rows.result(), targets[name]))
        found[name] = replace(found[name], weight=weight, bias=bias)
    return found


def masked(
    program: Program, predictors: Mapping[str, Predictor], kind: Callable[[GraphEditor, str], W]
) -> tuple[Program, W]:
    """The program with the sites of `predictors` masked, and what wrote it."""
    edit = Edit(program, PassContext(), RULE)
    (editor,) = [item for item in edit.graphs() if not item.path]
    writer = kind(editor, RULE)
    for site in list(find_sites(editor, through_norms=True)):
        if isinstance(site, Site) and site.name in predictors:
            writer.write(site, predictors[site.name])
    return edit.finish().program, writer
