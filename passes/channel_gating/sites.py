"""Where channels may be left out: a tensor that one product makes and only products read.

On the way from the product that makes them to those that read them, channels may pass activations with f(0) = 0,
pooling and depthwise convolutions: each keeps channels apart, and what is left out stays zero. So that zeros mean the
same for every reader there are no sites at residual sums, concatenations, grouped convolutions and outputs of the
graph: all that meet there would have to leave out the same channels.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphopt.edit import GraphEditor
from graphopt.matcher import argument, operator_name
from graphopt.near_miss import describe
from graphopt.passes.batch_norm_folding import NORMS
from graphopt.passes.merge_linears import count_readers

aten = torch.ops.aten

BLOCK = 16  # channels that are left out together, where their number is a multiple of it
LEAST_BLOCKS = 2
CONVOLUTIONS = frozenset({aten.conv2d.default, aten.conv2d.padding})
PRODUCTS = CONVOLUTIONS | {aten.linear.default}
_ELEMENTWISE = frozenset(
    {
        *(aten.relu.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.relu6.default),
        *(aten.leaky_relu.default, aten.elu.default, aten.celu.default, aten.selu.default, aten.gelu.default),
        *(aten.silu.default, aten.mish.default, aten.hardswish.default, aten.tanh.default, aten.sigmoid.default),
        *(aten.hardsigmoid.default, aten.softplus.default, aten.exp.default, aten.clone.default),
    }
)
_POOLING = frozenset(
    {
        *(aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim),
        *(aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.squeeze.dims, aten.squeeze.dim),
    }
)
_JOINS: Mapping[Any, str] = {
    aten.add.Tensor: "joins a residual stream at {name}: what it is added to would need the same channels",
    aten.sub.Tensor: "joins another value at {name}: that would need the same channels",
    aten.cat.default: "is joined to other channels at {name}",
    aten.mul.Tensor: "is multiplied by another value at {name}: that would need the same channels",
}


@dataclass(frozen=True)
class Product:
    """A convolution of [N, C, H, W] or a linear layer of [N, ..., K] by a constant weight.

    `options` are those of the convolution, None for a linear layer.
    """

    node: Node
    input: Node
    weight: torch.Tensor
    bias: torch.Tensor | None
    options: Mapping[str, Any] | None

    @property
    def channel_axis(self) -> int:
        """Of the input and of the result."""
        return -1 if self.options is None else 1

    @property
    def is_depthwise(self) -> bool:
        return self.options is not None and self.options["groups"] > 1


@dataclass(frozen=True)
class Site:
    """Channels of `gated` that may be left out: made by `producer`, filtered by `depthwise`, read by `consumers`.

    `name` is that of the producer's node before anything is rewritten.
    """

    name: str
    producer: Product
    depthwise: tuple[Product, ...]
    way: tuple[Node, ...]
    consumers: tuple[Product, ...]

    @property
    def gated(self) -> Node:
        """What the consumers read."""
        return self.way[-1] if self.way else self.producer.node

    @property
    def channels(self) -> int:
        return int(self.producer.weight.shape[0])

    @property
    def block(self) -> int:
        """Channels that are left out together: `BLOCK`, or 1 where that does not divide them."""
        return BLOCK if self.channels % BLOCK == 0 and self.channels >= LEAST_BLOCKS * BLOCK else 1

    @property
    def blocks(self) -> int:
        return self.channels // self.block

    @property
    def products(self) -> tuple[Product, ...]:
        """Everything that computes less, in order of execution."""
        return (self.producer, *self.depthwise, *self.consumers)


@dataclass(frozen=True)
class NoSite:
    """A product whose channels cannot be left out; `reason` is a clause.

    `nearly` is set where parts are missing rather than a condition failing.
    """

    producer: Node
    reason: str
    nearly: bool = False


def find_sites(editor: GraphEditor, *, through_norms: bool = False) -> Iterator[Site | NoSite]:
    """Every product of the graph in order, as a site or with the reason why it is none.

    `through_norms`: channels may pass batch norms, which make something else of zeros than zeros.
    """
    search = _Search(editor, through_norms)
    for node in list(editor.graph.nodes):
        if node.target in PRODUCTS:
            found = search.product(node)
            if isinstance(found, str):
                yield NoSite(node, found)
            elif not found.is_depthwise:
                yield search.site(found)


class _Search:
    def __init__(self, editor: GraphEditor, through_norms: bool) -> None:
        self.editor, self.through_norms = editor, through_norms
        self.readers = count_readers(editor.edit.program)

    def product(self, node: Node) -> Product | str:
        """The node as a product, or a clause on why it is none that channels may be taken from."""
        weight = self.editor.constant_value(argument(node, "weight"))
        bias_node = argument(node, "bias")
        bias = None if bias_node is None else self.editor.constant_value(bias_node)
        if weight is None or (bias is None and bias_node is not None):
            return f"a weight of {node.name} is no constant"
        if (count := self.readers.get(weight.untyped_storage().data_ptr(), 1)) > 1:
            return f"the weight of {node.name} is read {count} times"
        source = argument(node, "input")
        if node.target is aten.linear.default:
            if source.meta["val"].dim() < 2:
                return f"{node.name} has no axis of samples"
            return Product(node, source, weight, bias, None)
        if source.meta["val"].dim() != 4:
            return f"{node.name} has no axis of samples"
        options = _options(node, weight)
        if isinstance(options, str):
            return options
        groups = options["groups"]
        if groups > 1 and not groups == weight.shape[0] == source.meta["val"].shape[1]:
            return f"{node.name} has {groups} groups of channels"
        return Product(node, source, weight, bias, options)

    def site(self, producer: Product) -> Site | NoSite:
        way: list[Node] = []
        depthwise: list[Product] = []
        node = producer.node
        while True:
            readers = list(node.users)
            consumers = [self.product(user) if _reads_as_input(user, node) else None for user in readers]
            if readers and all(isinstance(item, Product) and not item.is_depthwise for item in consumers):
                found = tuple(item for item in consumers if isinstance(item, Product))
                return self.checked(Site(producer.node.name, producer, tuple(depthwise), tuple(way), found))
            if len(readers) != 1:
                names = ", ".join(reader.name for reader in readers) or "nothing"
                return NoSite(producer.node, f"{node.name} is read by {names}, not by products alone")
            (user,), (consumer,) = readers, consumers
            if isinstance(consumer, str):
                return NoSite(producer.node, consumer)
            if isinstance(consumer, Product):
                depthwise.append(consumer)
            elif self.through_norms and _normalizes(user, node):
                pass
            elif (reason := _stops(user, node, producer)) is not None:
                return NoSite(producer.node, reason, nearly=not is_known(user))
            way.append(user)
            node = user

    def checked(self, site: Site) -> Site | NoSite:
        dtypes = {item.weight.dtype for item in site.products}
        if len(dtypes) > 1 or not site.producer.weight.dtype.is_floating_point:
            return NoSite(site.producer.node, f"its products have weights of {', '.join(map(str, dtypes))}")
        rank, last = site.gated.meta["val"].dim(), site.producer.options is None
        for item in site.consumers:
            if (item.options is None) != (last or rank == 2):
                return NoSite(site.producer.node, f"{item.node.name} has its channels on another axis")
            if item.weight.shape[1] != site.channels:
                return NoSite(site.producer.node, f"a channel is {item.weight.shape[1]} inputs of {item.node.name}")
        return NoSite(site.producer.node, "it has one channel") if site.channels < 2 else site


def _options(node: Node, weight: torch.Tensor) -> Mapping[str, Any] | str:
    def both(value: Any) -> list[int]:
        return [int(item) for item in value] * (2 if len(value) == 1 else 1)

    stride, dilation = both(argument(node, "stride")), both(argument(node, "dilation"))
    padding = argument(node, "padding")
    if isinstance(padding, str):
        totals = [step * (taps - 1) for step, taps in zip(dilation, weight.shape[2:], strict=True)]
        totals = [0, 0] if padding == "valid" else totals
        if any(total % 2 for total in totals):
            return f"{node.name} has more zeros behind than in front"
        padding = [total // 2 for total in totals]
    groups = int(argument(node, "groups"))
    return {"stride": stride, "padding": both(padding), "dilation": dilation, "groups": groups}


def _reads_as_input(user: Node, node: Node) -> bool:
    return user.target in PRODUCTS and argument(user, "input") is node and user.all_input_nodes.count(node) == 1


def _stops(user: Node, node: Node, producer: Product) -> str | None:
    """Why channels of `node` cannot be left out beyond its one reader, or None."""
    if user.op == "output":
        return f"{node.name} is an output of the graph"
    if user.target in _JOINS:
        return f"{node.name} {_JOINS[user.target].format(name=user.name)}"
    if user.target in NORMS:
        return f"{node.name} is normalized at {user.name}; run batch-norm-folding before"
    if is_activation(user):
        return _moves_zero(user)
    if user.target in _POOLING:
        return _mixes(user, node, producer)
    return f"{node.name} is read by {describe(user)}, which takes no part of its channels"


def is_known(user: Node) -> bool:
    """Whether it is of a kind for which a condition decides."""
    return user.op == "output" or user.target in _ELEMENTWISE | _POOLING | NORMS | _JOINS.keys()


def is_activation(node: Node) -> bool:
    """Whether it computes each element of its one tensor by itself."""
    return node.target in _ELEMENTWISE and len(node.all_input_nodes) == 1


def _normalizes(user: Node, node: Node) -> bool:
    """Whether it is a batch norm of the node, or the result of one among what it gives."""
    is_result = user.target is operator.getitem and node.target in NORMS and user.args[1:] == (0,)
    return is_result or (user.target in NORMS and user.args[0] is node)


def _moves_zero(node: Node) -> str | None:
    """An activation of zero has to be zero."""
    assert callable(node.target)
    made = float(node.target(torch.zeros(1), *node.args[1:], **node.kwargs))
    return None if made == 0 else f"{operator_name(node.target)} makes {made:g} of 0: what is left out would not be 0"


def _mixes(user: Node, node: Node, producer: Product) -> str | None:
    """Pooling and reshapes have to keep channels on axis 1."""
    before, after = node.meta["val"].shape, user.meta["val"].shape
    kept = producer.channel_axis == 1 and len(before) == 4 and len(after) in (2, 4) and before[1] == after[1]
    if user.target is aten.mean.dim:
        axes = {int(axis) % 4 for axis in argument(user, "dim")} if kept else set()
        kept = axes == {2, 3}
    elif kept and len(after) == 2:
        kept = before[2] == before[3] == 1
    return None if kept else f"{user.name} mixes channels with other axes"
