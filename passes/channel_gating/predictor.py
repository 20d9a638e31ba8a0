"""What decides for each sample which blocks of a site take part: scores of its pooled input, and a rule over them.

linear: scores = W mean(x) + b, as in "Fire Together Wire Together" (Elkerdawy et al. 2022, arXiv 2110.08232), without
the softmax over inputs. topk: g = relu(W mean|x| + b), as in feature boosting and suppression (Gao et al. 2019, arXiv
1810.05331), for the choice alone: kept channels are not scaled. A fixed share of the blocks are those with the highest
scores, of equal ones the first; otherwise blocks with a score of 0 or more take part, and always that with the highest.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Builder
from graphopt.passes.channel_gating.sites import Product, Site
from graphopt.passes.channel_gating.targets import Seen, block_heat, group_channels, share_targets

aten = torch.ops.aten

Kind = Literal["linear", "topk"]
RIDGE = 1e-3  # over the mean square of the features


@dataclass(frozen=True)
class Predictor:
    """`weight` [blocks, inputs] and `bias` [blocks] of one site; `count` blocks are kept, None: as many as score 0.

    `order` [channels] puts channels beside those that they are left out with: block b has those in the places from
    b * site.block on.
    """

    kind: Kind
    weight: Tensor
    bias: Tensor
    count: int | None
    order: Tensor


def pooled(builder: Builder, product: Product, kind: Kind) -> Node:
    """The features [N, inputs] of what a product reads."""
    node = product.input
    if kind == "topk":
        node = builder.call(aten.abs.default, node)
    axes = [2, 3] if product.options is not None else list(range(1, node.meta["val"].dim() - 1))
    return builder.call(aten.mean.dim, node, axes) if axes else node


def scores(builder: Builder, site: Site, predictor: Predictor, inputs: Tensor | Node | None = None) -> Node:
    """[N, blocks], before the rule.

    `inputs` are the channels that the input has by now, in their order, where that is not all of them as they were.
    """
    features = pooled(builder, site.producer, predictor.kind)
    weight: Any = predictor.weight
    if isinstance(inputs, Tensor):
        weight = weight[:, inputs]
    elif inputs is not None:
        weight = builder.call(aten.index_select.default, builder.constant(weight), 1, inputs)
    return builder.call(aten.linear.default, features, weight, predictor.bias)


def active_blocks(builder: Builder, site: Site, predictor: Predictor, inputs: Tensor | Node | None = None) -> Node:
    """bool [N, blocks]: which take part; `inputs` as in `scores`."""
    found = scores(builder, site, predictor, inputs)
    if predictor.count is None:
        return builder.call(aten.ge.Tensor, found, threshold(builder, found, None))
    chosen = chosen_blocks(builder, found, predictor)
    nothing = builder.call(aten.full_like.default, found, False, dtype=torch.bool)
    return builder.call(aten.scatter.value, nothing, 1, chosen, True)


def threshold(builder: Builder, found: Node, count: int | None) -> Node:
    """[N, 1]: the score from which on a block takes part; 0 or the highest, or where `count` is given the last kept."""
    if count is None:
        return builder.call(aten.clamp.default, builder.call(aten.amax.default, found, [1], True), None, 0.0)
    ordered = builder.call(aten.sort.stable, found, stable=True, dim=1, descending=True)
    return builder.call(aten.slice.Tensor, builder.call(operator.getitem, ordered, 0), 1, count - 1, count)


def chosen_blocks(builder: Builder, found: Node, predictor: Predictor) -> Node:
    """int64 [N, count]: the blocks with the highest scores, the highest first."""
    if predictor.kind == "topk":
        found = builder.call(aten.relu.default, found)
    ordered = builder.call(aten.sort.stable, found, stable=True, dim=1, descending=True)
    places = builder.call(operator.getitem, ordered, 1)
    return builder.call(aten.slice.Tensor, places, 1, 0, predictor.count)


def channel_mask(builder: Builder, site: Site, predictor: Predictor, active: Node, like: Node) -> Node:
    """1 where a channel of `like` takes part, else 0, in a shape that broadcasts against it."""
    value = like.meta["val"]
    mask = builder.call(aten._to_copy.default, active, dtype=value.dtype)
    block_of = torch.empty_like(predictor.order)
    block_of[predictor.order] = torch.arange(site.channels) // site.block
    mask = builder.call(aten.index_select.default, mask, 1, builder.constant(block_of))
    shape = [1] * value.dim()
    shape[site.producer.channel_axis] = site.channels
    if value.dim() == 2:
        return mask
    return builder.call(aten.view.default, mask, [sample_count(builder, active), *shape[1:]])


def sample_count(builder: Builder, node: Node) -> Any:
    """The size of the axis of samples, as a number or as a node."""
    size = node.meta["val"].shape[0]
    return size if isinstance(size, int) else builder.call(aten.sym_size.int, node, 0)


def first_predictor(
    site: Site, kind: Kind, count: int | None, seen: Seen | None, mass: float | None, *, in_order: bool
) -> Predictor:
    """One that nothing has trained: least squares from pooled inputs to targets; constant scores without data.

    `in_order` leaves channels where they are.
    """
    dtype, inputs = site.producer.weight.dtype, site.producer.input.meta["val"].shape[site.producer.channel_axis]
    order = torch.arange(site.channels)
    if seen is None:
        weight, bias = torch.zeros(site.blocks, inputs, dtype=dtype), torch.ones(site.blocks, dtype=dtype)
        return Predictor(kind, weight, bias, count, order)
    order = order if in_order else group_channels(seen.heat, site.block)
    targets = share_targets(block_heat(seen.heat, order, site.block), mass, count)
    weight, bias = solve(seen.magnitudes if kind == "topk" else seen.features, targets)
    return Predictor(kind, weight.to(dtype), bias.to(dtype), count, order)


def solve(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [blocks, inputs] and bias [blocks] of the least squares from features [samples, inputs] to +-1.

    `targets` [samples, blocks] is bool. In float64, with a small penalty on the weight.
    """
    x, y = features.double(), targets.double() * 2 - 1
    mean, level = x.mean(0), y.mean(0)
    centred = x - mean
    gram = centred.T @ centred
    ridge = RIDGE * gram.diagonal().mean() + torch.finfo(torch.float64).tiny
    weight = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=torch.float64), centred.T @ (y - level)).T
    return weight, level - weight @ mean
