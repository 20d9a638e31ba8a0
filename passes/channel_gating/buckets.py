"""A site as nested conditions over a few widths, for targets and files that know no operator of ours.

Blocks stand in one order, those that hold most of the heat in front. The smallest width is taken that has all blocks
that any sample needs, and the mask is inside: the result is that of the mask form. Each width has weights of its own
and computes everything from the producer to the activations behind the consumer, so that kernels are fused as they are
without conditions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from graphopt.edit import Builder
from graphopt.passes.channel_gating.forms import State, Writer, call_product, current, take
from graphopt.passes.channel_gating.predictor import Predictor, active_blocks, channel_mask
from graphopt.passes.channel_gating.sites import Product, Site, is_activation
from graphopt.propagate import evaluate

aten = torch.ops.aten

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the blocks, the widths that there are


def widths_of(blocks: int) -> list[int]:
    """The numbers of blocks that have a branch, upwards; the last is all of them."""
    return sorted({max(1, round(share * blocks)) for share in SHARES})


class BucketWriter(Writer):
    def declines(self, site: Site, predictor: Predictor) -> str | None:
        for product in site.products:
            if product.node.name in self.states:
                return f"{product.node.name} is in the branches of another site"
        for step in site.way:
            if len([item for item in step.all_input_nodes if item.op != "get_attr"]) > 1:
                return f"{step.name} reads a size, which branches do not have"
        return None

    def replaced(self, site: Site) -> tuple[list[Node], list[Node]]:
        outputs, inner = super().replaced(site)
        while len(outputs) == 1 and len(outputs[0].users) == 1:
            (follower,) = outputs[0].users
            if not is_activation(follower):
                break
            inner, outputs = [*inner, outputs[0]], [follower]
        return outputs, inner

    def build(self, builder: Builder, site: Site, predictor: Predictor) -> tuple[list[State], Node | None]:
        active = active_blocks(builder, current(self, site), predictor)
        plain = replace(predictor, order=torch.arange(site.channels))  # channels of the branches' weights
        mask = channel_mask(builder, site, plain, active, site.gated)
        places = builder.constant(torch.arange(1, site.blocks + 1))
        needed = builder.call(aten.amax.default, builder.call(aten.mul.Tensor, active, places), [0, 1])
        outputs, _ = self.replaced(site)
        results = _Branches(builder, site, predictor.order, mask, outputs).write(needed)
        states = [State(item, node, item.weight, item.bias) for item, node in zip(site.consumers, results, strict=True)]
        return states, active


class _Branches:
    """What every branch is given: the producer's input, the mask, and the weights of all widths."""

    def __init__(self, builder: Builder, site: Site, order: Tensor, mask: Node, outputs: Sequence[Node]) -> None:
        self.builder, self.site, self.outputs, self.mask = builder, site, outputs, mask
        self.source = site.producer.input
        self.widths = widths_of(site.blocks)
        self.weights: dict[tuple[Node, int], tuple[Node, Node | None]] = {}
        for product in site.products:
            for width in self.widths:
                self.weights[product.node, width] = self._sliced(product, order[: width * site.block])

    def _sliced(self, product: Product, index: Tensor) -> tuple[Node, Node | None]:
        axis = 1 if product in self.site.consumers else 0
        weight = take(self.builder, product.weight, axis, index)
        bias = product.bias
        if bias is not None and axis == 0:
            bias = take(self.builder, bias, 0, index)  # type: ignore[assignment]
        assert isinstance(weight, Tensor)
        return self.builder.constant(weight), None if bias is None else self.builder.constant(bias)

    def operands(self) -> list[Node]:
        weights = [item for pair in self.weights.values() for item in pair if item is not None]
        return list(dict.fromkeys((self.source, self.mask, *weights)))

    def write(self, needed: Node) -> list[Node]:
        """The results of the conditions, for each output."""
        operands = [needed, *self.operands()]
        smaller = self.builder.call(aten.le.Scalar, needed, self.widths[0])
        branches = self._branch(0, operands), self._rest(1, operands)
        call = condition(self.builder, self.builder.editor.module, smaller, branches, operands)
        self.builder.nodes.extend((*call.all_input_nodes[1:3], call))
        return [self.builder.call(operator.getitem, call, number) for number in range(len(self.outputs))]

    def _rest(self, number: int, outside: Sequence[Node]) -> GraphModule:
        """The widths from `number` on."""
        if number == len(self.widths) - 1:
            return self._branch(number, outside)
        branch = _BranchBuilder(self.builder.editor.edit.mode, outside)
        operands = [branch.inside[item] for item in outside]
        smaller = branch.call(aten.le.Scalar, operands[0], self.widths[number])
        sides = self._branch(number, outside), self._rest(number + 1, outside)
        call = condition(branch, branch.module, smaller, sides, operands)
        return branch.finish([branch.call(operator.getitem, call, place) for place in range(len(self.outputs))])

    def _branch(self, number: int, outside: Sequence[Node]) -> GraphModule:
        """One width."""
        site, width = self.site, self.widths[number]
        branch = _BranchBuilder(self.builder.editor.edit.mode, outside)

        def product(item: Product, source: Node) -> Node:
            weight, bias = self.weights[item.node, width]
            inner = None if bias is None else branch.inside[bias]
            return call_product(branch.call, item, source, branch.inside[weight], inner, width * site.block)

        values = {site.producer.node: product(site.producer, branch.inside[self.source])}
        depthwise = {item.node: item for item in site.depthwise}
        for step in site.way:
            source = values[step.args[0]]  # type: ignore[index]
            values[step] = product(depthwise[step], source) if step in depthwise else branch.repeat(step, values)
        mask, axis = branch.inside[self.mask], site.producer.channel_axis % site.gated.meta["val"].dim()
        part = branch.call(aten.slice.Tensor, mask, axis, 0, width * site.block)
        masked = branch.call(aten.mul.Tensor, values[site.gated], part)
        for item in site.consumers:
            values[item.node] = product(item, masked)
        return branch.finish([self._result(branch, output, values) for output in self.outputs])

    def _result(self, branch: _BranchBuilder, output: Node, values: dict[Node, Node]) -> Node:
        """An output, through the activations behind its consumer."""
        if output not in values:
            source = output.args[0]
            assert isinstance(source, Node)
            self._result(branch, source, values)
            values[output] = branch.repeat(output, values)
        return values[output]


class _BranchBuilder:
    """The graph of one branch, with the values of its nodes; `inside` has the placeholders of what it is given."""

    def __init__(self, mode: Any, operands: Sequence[Node]) -> None:
        self.mode, self.graph, self.module = mode, Graph(), torch.nn.Module()
        self.inside: dict[Node, Node] = {}
        for operand in operands:
            node = self.graph.placeholder(operand.name)
            node.meta["val"] = operand.meta["val"]
            self.inside[operand] = node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = evaluate(node, self.mode)
        return node

    def repeat(self, node: Node, values: dict[Node, Node]) -> Node:
        assert callable(node.target)
        args, kwargs = map_arg((node.args, node.kwargs), lambda item: values[item])
        return self.call(node.target, *args, **kwargs)

    def finish(self, results: Sequence[Node]) -> GraphModule:
        output = self.graph.output(tuple(results))
        output.meta["val"] = tuple(node.meta["val"] for node in results)
        return GraphModule(self.module, self.graph)


def condition(
    builder: Builder | _BranchBuilder,
    holder: torch.nn.Module,
    predicate: Node,
    branches: Sequence[GraphModule],
    operands: Sequence[Node],
) -> Node:
    """A `torch.cond`, whose branches become attributes of `holder`."""
    number = next(number for number in range(10**6) if not hasattr(holder, f"true_graph_{number}"))
    graphs = []
    for side, branch in zip(("true", "false"), branches, strict=True):
        setattr(holder, f"{side}_graph_{number}", branch)
        graphs.append(builder.graph.get_attr(f"{side}_graph_{number}"))
    node = builder.graph.call_function(torch.ops.higher_order.cond, (predicate, *graphs, tuple(operands)))
    node.meta["val"] = branches[0].graph.output_node().meta["val"]
    return node
