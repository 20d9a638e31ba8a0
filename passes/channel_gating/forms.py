"""The forms of a gated site, each written over its products: what is computed less, and how.

mask: the gated tensor times 0 or 1; nothing is computed less, but everything has a gradient and runs anywhere.
block: products that leave out blocks at run time (`graphopt::gated_convolution`, `gated_linear`).
gather: the filters and columns of the chosen channels are taken out of the weights at run time, for one sample.
static: those that no sample needs are gone for good, and nothing is decided at run time.

All forms but the last one compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Builder, GraphEditor
from graphopt.matcher import argument
from graphopt.passes.channel_gating.predictor import Predictor, active_blocks, channel_mask, chosen_blocks, scores
from graphopt.passes.channel_gating.sites import Product, Site

aten = torch.ops.aten
gated_operators = torch.ops.graphopt


@dataclass(frozen=True)
class State:
    """A product as it is by now: `node` in the graph, its weight and bias as tensors or nodes, and its masks.

    `inputs` are the channels that its input has by now, in their order; None stands for all of them as they were.
    """

    product: Product
    node: Node
    weight: Tensor | Node
    bias: Tensor | Node | None
    taking: Node | None = None
    making: Node | None = None
    inputs: Tensor | Node | None = None


class Writer:
    """Writes one site after the other, in order; `active` has the name of the node that decides, by site."""

    def __init__(self, editor: GraphEditor, rule: str) -> None:
        self.editor, self.rule = editor, rule
        self.states: dict[str, State] = {}
        self.active: dict[str, str] = {}

    def state(self, product: Product) -> State:
        """How the product stands."""
        return self.states.get(product.node.name) or State(product, product.node, product.weight, product.bias)

    def write(self, site: Site, predictor: Predictor) -> bool:
        """Put the form in place of the site's consumers; False, with the reason recorded, where it does not fit."""
        if (reason := self.declines(site, predictor)) is not None:
            self.editor.decline(self.rule, self.state(site.consumers[0]).node, reason)
            return False
        made: list[State] = []
        found: list[Node] = []

        def build(builder: Builder) -> list[Node]:
            new, active = self.build(builder, site, predictor)
            made.extend(new)
            found.extend(() if active is None else (active,))
            return [item.node for item in new]

        outputs, inner = self.replaced(site)
        if not self.editor.replace(self.rule, outputs, build, inner=inner):
            return False
        self.states.update((item.product.node.name, item) for item in made)
        if found:
            self.active[site.name] = found[0].name
        return True

    def declines(self, site: Site, predictor: Predictor) -> str | None:
        """Why the form does not fit the site, or None."""
        return None

    def replaced(self, site: Site) -> tuple[list[Node], list[Node]]:
        """The nodes whose values are written anew, one for each consumer, and those between them and the producer."""
        return [self.state(item).node for item in site.consumers], [self.state(site.producer).node, *site.way]

    def build(self, builder: Builder, site: Site, predictor: Predictor) -> tuple[list[State], Node | None]:
        """The new consumers, and what decides."""
        raise NotImplementedError

    def gated_input(self, site: Site) -> Node:
        """What the consumers read by now."""
        return site.way[-1] if site.way else self.state(site.producer).node


class MaskWriter(Writer):
    def build(self, builder: Builder, site: Site, predictor: Predictor) -> tuple[list[State], Node | None]:
        value = self.gated_input(site)
        active = self.decide(builder, site, predictor)
        mask = channel_mask(builder, site, predictor, active, value)
        masked = builder.call(aten.mul.Tensor, value, mask)
        states = [self.state(item) for item in site.consumers]
        return [replace(state, node=builder.repeat(state.node, {value: masked})) for state in states], active

    def decide(self, builder: Builder, site: Site, predictor: Predictor) -> Node:
        return active_blocks(builder, current(self, site), predictor)


class ProductWriter(Writer):
    """Writes the producer, the way and the consumers anew; a form says how each product is changed."""

    def build(self, builder: Builder, site: Site, predictor: Predictor) -> tuple[list[State], Node | None]:
        decision = self.decide(builder, site, predictor)
        old = self.state(site.producer)
        state = self.made(builder, old, decision)
        node = self.emit(builder, state, argument(old.node, "x" if is_gated(old.node) else "input"))
        values = {old.node: node}
        depthwise = {item.node: item for item in site.depthwise}
        for step in site.way:
            if step in depthwise:
                node = self.emit(builder, self.made(builder, self.state(depthwise[step]), decision), node)
            else:
                node = builder.repeat(step, values)
            values[step] = node
        states = [self.taken(builder, self.state(item), decision) for item in site.consumers]
        return [replace(item, node=self.emit(builder, item, node)) for item in states], self.decider(decision)

    def decide(self, builder: Builder, site: Site, predictor: Predictor) -> Any:
        """What says which channels take part."""
        raise NotImplementedError

    def decider(self, decision: Any) -> Node | None:
        """The node of it, if there is one."""
        return None

    def made(self, builder: Builder, state: State, decision: Any) -> State:
        """A product of which only some outputs are wanted."""
        raise NotImplementedError

    def taken(self, builder: Builder, state: State, decision: Any) -> State:
        """A product of whose inputs only some are there."""
        raise NotImplementedError

    def emit(self, builder: Builder, state: State, source: Node) -> Node:
        """The call of a product on `source`."""
        weight, bias = state.weight, state.bias
        made = weight.meta["val"].shape[0] if isinstance(weight, Node) else weight.shape[0]
        return call_product(builder.call, state.product, source, weight, bias, made)


def call_product(
    call: Callable[..., Node], product: Product, source: Node, weight: Any, bias: Any, channels: int
) -> Node:
    """`product` of `source` by another weight, a node or a tensor; depthwise it has so many `channels`."""
    if product.options is None:
        return call(aten.linear.default, source, weight, bias)
    options = product.options
    groups = channels if product.is_depthwise else 1
    given = (options["stride"], options["padding"], options["dilation"], groups)
    return call(aten.conv2d.default, source, weight, bias, *given)


@dataclass(frozen=True)
class _Blocks:
    active: Node
    order: Tensor
    block: int


class BlockWriter(ProductWriter):
    def declines(self, site: Site, predictor: Predictor) -> str | None:
        if site.block == 1:
            return f"its {site.channels} channels are no two blocks of 16 or more"
        if site.producer.weight.dtype != torch.float32:
            return f"its weights are {site.producer.weight.dtype}, not float32"
        return None

    def decide(self, builder: Builder, site: Site, predictor: Predictor) -> _Blocks:
        inputs = self.state(site.producer).inputs
        return _Blocks(active_blocks(builder, current(self, site), predictor, inputs), predictor.order, site.block)

    def decider(self, decision: _Blocks) -> Node:
        return decision.active

    def made(self, builder: Builder, state: State, decision: _Blocks) -> State:
        return replace(selected(builder, state, 0, decision.order), making=decision.active)

    def taken(self, builder: Builder, state: State, decision: _Blocks) -> State:
        return replace(selected(builder, state, 1, decision.order), taking=decision.active, inputs=decision.order)

    def emit(self, builder: Builder, state: State, source: Node) -> Node:
        if state.taking is None and state.making is None:
            return super().emit(builder, state, source)
        given = (source, state.weight, state.bias, state.taking, state.making)
        if state.product.options is None:
            return builder.call(gated_operators.gated_linear.default, *given)
        return builder.call(gated_operators.gated_convolution.default, *given, **state.product.options)


class GatherWriter(ProductWriter):
    def declines(self, site: Site, predictor: Predictor) -> str | None:
        samples = site.gated.meta["val"].shape[0]
        if predictor.count is None:
            return "its number of channels differs from sample to sample; give keep instead of mass"
        return None if samples == 1 else f"{samples} samples at once take different channels; capture it with one"

    def decide(self, builder: Builder, site: Site, predictor: Predictor) -> Node:
        """int64 [count * block]: the channels that take part, those of the block with the highest score first."""
        inputs = self.state(site.producer).inputs
        chosen = chosen_blocks(builder, scores(builder, current(self, site), predictor, inputs), predictor)
        members = builder.constant(predictor.order.reshape(site.blocks, site.block))
        row = builder.call(aten.view.default, chosen, [-1])
        return builder.call(aten.view.default, builder.call(aten.index_select.default, members, 0, row), [-1])

    def made(self, builder: Builder, state: State, decision: Node) -> State:
        return selected(builder, state, 0, decision)

    def taken(self, builder: Builder, state: State, decision: Node) -> State:
        return replace(selected(builder, state, 1, decision), inputs=decision)


class StaticWriter(ProductWriter):
    """`used` [channels] says for each site which channels stay."""

    def __init__(self, editor: GraphEditor, rule: str, used: Mapping[str, Tensor]) -> None:
        super().__init__(editor, rule)
        self.used = used

    def declines(self, site: Site, predictor: Predictor) -> str | None:
        return "every channel is used" if bool(self.used[site.name].all()) else None

    def decide(self, builder: Builder, site: Site, predictor: Predictor) -> Tensor:
        return self.used[site.name].nonzero().flatten()

    def made(self, builder: Builder, state: State, decision: Tensor) -> State:
        return selected(builder, state, 0, decision)

    def taken(self, builder: Builder, state: State, decision: Tensor) -> State:
        return selected(builder, state, 1, decision)


def selected(builder: Builder, state: State, axis: int, index: Tensor | Node) -> State:
    """A product with these of its outputs (axis 0) or inputs (axis 1), in this order."""
    weight = take(builder, state.weight, axis, index)
    bias = take(builder, state.bias, 0, index) if axis == 0 and state.bias is not None else state.bias
    return replace(state, weight=weight, bias=bias)


def take(builder: Builder, value: Tensor | Node, axis: int, index: Tensor | Node) -> Tensor | Node:
    """`value` at these places along an axis: a new weight where both are known, a node otherwise."""
    if isinstance(value, Tensor) and isinstance(index, Tensor):
        if len(index) == value.shape[axis] and torch.equal(index, torch.arange(len(index))):
            return value
        chosen = value.detach().index_select(axis, index)
        return torch.nn.Parameter(chosen, value.requires_grad) if isinstance(value, torch.nn.Parameter) else chosen
    return builder.call(aten.index_select.default, value, axis, index)


def is_gated(node: Node) -> bool:
    """Whether it is a product of the block form."""
    return node.target in (gated_operators.gated_convolution.default, gated_operators.gated_linear.default)


def current(writer: Writer, site: Site) -> Site:
    """The site with its producer as it is by now, for what reads the producer's input."""
    node = writer.state(site.producer).node
    source = argument(node, "x" if is_gated(node) else "input")
    return replace(site, producer=replace(site.producer, node=node, input=source))
