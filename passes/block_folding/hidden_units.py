"""Hidden units: parts of a block that may change places among each other without a change of its output.

Hidden units of a feed-forward part are single channels, those of an attention heads, which are runs of channels; heads
that share keys and values are one unit. No layout is assumed: a unit owns those rows of the products before it for
which its channels have a gradient, and units of which that is not all, so that channels do not follow when rows change
places, are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from graphopt.analysis.blocks import Block
from graphopt.analysis.view import tensors
from graphopt.data.dataset import Sample
from graphopt.passes.block_folding.products import Product, as_product
from graphopt.passes.block_folding.ranking import boundary_values
from graphopt.program import Program

Weights = Mapping[int, Tensor]  # by the position in `Block.weights`
Axis = tuple[Any, int]  # a node or the position of a weight, and one of its axes


@dataclass(frozen=True)
class HiddenUnits:
    """`places`[position of a weight, axis] is [units, size]: the indices along this axis that are each unit's."""

    count: int
    places: Mapping[tuple[int, int], Tensor]

    @property
    def positions(self) -> set[int]:
        """Of the weights in which they own something."""
        return {position for position, _ in self.places}

    def similarity(self, left: Weights, right: Weights) -> Tensor:
        """The inner products [units, units] of what the units of both own, in float64."""
        total = torch.zeros(self.count, self.count, dtype=torch.float64)
        for (position, axis), places in self.places.items():
            ours, theirs = (
                item[position].detach().double().movedim(axis, 0)[places.flatten()].reshape(self.count, -1)
                for item in (left, right)
            )
            total += ours @ theirs.T
        return total

    def moved(self, weights: Weights, order: Tensor) -> dict[int, Tensor]:
        """Weights in which the place of unit u holds the unit `order[u]` [units]."""
        result = dict(weights)
        for (position, axis), places in self.places.items():
            result[position] = result[position].detach().index_select(axis, index_of(places, order))
        return result


def index_of(places: Tensor, order: Tensor) -> Tensor:
    """For each index that units own, the one that comes there."""
    index = torch.empty(places.numel(), dtype=torch.long)
    index[places.flatten()] = places[order].flatten()
    return index


def find_hidden_units(program: Program, block: Block) -> tuple[HiddenUnits, ...]:
    """The hidden units in front of each product of a block of the main graph, in order of execution.

    None are found where the product reads the stream that runs through the block, where something in between is also
    read elsewhere, and where units are not alike: heads with distances of their own, as in ALiBi.
    """
    products = [found for node in block.nodes if (found := as_product(node)) and found.weight in block.weights]
    readers: dict[Node, list[Product]] = {}
    for product in products:
        readers.setdefault(product.input, []).append(product)
    regions = [_region(block, {item.node: item for item in products}, found) for found in readers.values()]
    return tuple(units for region in regions if region and (units := _units(program, block, region)))


@dataclass(frozen=True)
class _Region:
    """Calls between the `made` products, whose rows are hidden, and the products that read `hidden`, their result."""

    hidden: Node
    calls: tuple[Node, ...]
    made: tuple[Product, ...]
    readers: tuple[Product, ...]


def _region(block: Block, products: Mapping[Node, Product], readers: Sequence[Product]) -> _Region | None:
    hidden = readers[0].input
    inside, pending = {hidden}, [hidden]
    while pending:
        node = pending.pop()
        if node is block.input:
            return None
        if node in products:
            continue
        new = [item for item in node.all_input_nodes if item not in inside and _is_computed(block, item)]
        inside.update(new)
        pending.extend(new)
    made = tuple(products[node] for node in block.nodes if node in inside and node in products)
    readers_of_hidden = {item.node for item in readers}
    for node in inside:
        readers_of = {user for user in node.users if user.op == "output" or tensors(user)}
        if not readers_of <= (readers_of_hidden if node is hidden else inside):
            return None
    calls = tuple(node for node in block.nodes if node in inside and node not in products)
    return _Region(hidden, calls, made, tuple(readers)) if made else None


def _is_computed(block: Block, node: Node) -> bool:
    return node is block.input or (node in block.nodes and bool(tensors(node)))


def _units(program: Program, block: Block, region: _Region) -> HiddenUnits | None:
    """The smallest units that own equal parts of all rows, and whose order is that of `hidden`."""
    run = _Run(program, block, region)
    channel = region.readers[0].form.channel_axis
    size = run.hidden.shape[channel]
    for width in (width for width in range(1, size // 2 + 1) if size % width == 0):
        count = size // width
        rows = run.owned(channel, width)
        if any((item.node, item.form.channel_axis) not in rows for item in region.made):
            continue
        rows[region.hidden, channel] = torch.arange(size).view(count, width)
        if run.follows(rows, count, channel):
            return HiddenUnits(count, _places(block, region, rows))
    return None


def _places(block: Block, region: _Region, rows: Mapping[Axis, Tensor]) -> dict[tuple[int, int], Tensor]:
    """What units own of weights, from what they own of activations."""
    number = {node: position for position, node in enumerate(block.weights)}
    places = {(number[node], axis): own for (node, axis), own in rows.items() if node in number}
    for item in region.made:
        own = rows[item.node, item.form.channel_axis]
        places[number[item.weight], item.form.row_axis] = own
        if item.bias is not None:
            places[number[item.bias], 0] = own
    for item in region.readers:
        places[number[item.weight], item.form.column_axis] = rows[region.hidden, item.form.channel_axis]
    return places


class _Run:
    """The calls of a region on drawn results of its products; all else it reads has its values for the examples."""

    def __init__(self, program: Program, block: Block, region: _Region) -> None:
        self.region = region
        made = [item.node for item in region.made]
        others = {node for call in region.calls for node in call.all_input_nodes} - {*made, *region.calls}
        nodes = [*made, *sorted(others)]
        (found,) = boundary_values(program, [node.name for node in nodes], [Sample(program.examples)])
        self.values: dict[Node, Any] = dict(zip(nodes, found, strict=True))
        self.generator = torch.Generator().manual_seed(0)
        self.leaves: dict[Node, Tensor] = {}
        for node in nodes:
            if node in made:
                self.leaves[node] = self._drawn(self.values[node]).requires_grad_()
            elif node in block.weights and self.values[node].is_floating_point():
                self.leaves[node] = self.values[node].detach().clone().requires_grad_()
        with torch.enable_grad():
            self.hidden = self._hidden(self.leaves)

    def _drawn(self, like: Tensor) -> Tensor:
        """Positive numbers, so that no unit is dead behind a rectifier."""
        return torch.rand(like.shape, generator=self.generator).add(0.5).to(like.dtype)

    def _hidden(self, leaves: Mapping[Node, Tensor]) -> Tensor:
        values = {**self.values, **leaves}
        for node in self.region.calls:
            assert callable(node.target)
            values[node] = node.target(*map_arg(node.args, values.get), **map_arg(node.kwargs, values.get))
        found: Tensor = values[self.region.hidden]
        return found

    def owned(self, channel: int, width: int) -> dict[Axis, Tensor]:
        """The indices [units, size] of each unit along every axis that the units, runs of `width`, share out evenly.

        The units are numbered in binary; an index that is of one unit alone answers, for each digit, to the units
        with 0 there or to those with 1, and so spells the number.
        """
        size = self.hidden.shape[channel]
        unit = torch.arange(size) // width
        count = size // width
        weighted = self.hidden * self._drawn(self.hidden)
        owner: dict[Axis, Tensor] = {}
        single: dict[Axis, Tensor] = {}
        for digit in range((count - 1).bit_length()):
            ones = self._answers(weighted, channel, unit >> digit & 1 == 1)
            zeros = self._answers(weighted, channel, unit >> digit & 1 == 0)
            for axis in ones:
                owner[axis] = owner.get(axis, 0) + (ones[axis].long() << digit)
                single[axis] = single.get(axis, True) & (ones[axis] ^ zeros[axis])
            if not all(single[item.node, item.form.channel_axis].all() for item in self.region.made):
                return {}
        result = {}
        for axis, numbers in owner.items():
            if single[axis].all() and len(set(torch.bincount(numbers, minlength=count).tolist())) == 1:
                result[axis] = numbers.argsort(stable=True).view(count, -1)
        return result

    def _answers(self, weighted: Tensor, channel: int, chosen: Tensor) -> dict[Axis, Tensor]:
        """By axis of a leaf: for which indices the sum over the chosen channels has a gradient."""
        total = (weighted.movedim(channel, -1) * chosen).sum()
        leaves = [(node, leaf) for node, leaf in self.leaves.items()]
        gradients = torch.autograd.grad(
            total, [leaf for _, leaf in leaves], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        made = {item.node: item.form.channel_axis for item in self.region.made}
        answers = {}
        for (node, _), gradient in zip(leaves, gradients, strict=True):
            for axis in [made[node]] if node in made else range(gradient.dim()):
                flat = gradient.movedim(axis, 0).flatten(1) if gradient.dim() > 1 else gradient[:, None]
                answers[node, axis] = (flat != 0).any(dim=1)
        return answers

    def follows(self, rows: Mapping[Axis, Tensor], count: int, channel: int) -> bool:
        """Whether units that change places in all that they own do so in the result, and change nothing else."""
        order = torch.randperm(count, generator=self.generator)
        leaves = dict(self.leaves)
        for (node, axis), own in rows.items():
            if node in leaves:
                leaves[node] = leaves[node].index_select(axis, index_of(own, order))
        expected = self.hidden.index_select(channel, index_of(rows[self.region.hidden, channel], order))
        with torch.no_grad():
            found = self._hidden(leaves)
        tolerance = 100 * torch.finfo(found.dtype).eps * float(expected.detach().abs().max())
        return bool((found - expected).abs().max() <= tolerance)
