"""Where channels may be scaled without a change of the function: what one operator divides its readers multiply.

    norm(x; gamma, beta) -> linear(w)         gamma / t, beta / t               w * t
    product(w1, b1) [-> relu] -> product(w2)  w1 / t, b1 / t along its outputs   w2 * t along its inputs
    gate * linear(w1, b1) -> linear(w2)       the same: a product of elements is linear in either factor

Nobody else may read the value between, and no constant may have a second reader. t > 0 passes through relu. Where t are
powers of two, every number in float32 is exactly what it was, times a power of two, unless it leaves the normal range.

What a norm makes and others read as well, such as the residual path of BERT, may be divided by a multiplication of its
own instead, in front of the products: a step of the loop that takes the codes.

Source: Lin et al. 2023, "AWQ" (arXiv 2306.00978); Nagel et al. 2019 (arXiv 1906.04721), section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Builder, GraphEditor
from graphopt.matcher import argument
from graphopt.passes.mixed_precision import following
from graphopt.passes.quantize.placement import unclamped
from graphopt.passes.scale_folding import PRODUCTS, scaled_weight

aten = torch.ops.aten

NORMS: Mapping[object, tuple[str, ...]] = {
    aten.layer_norm.default: ("weight", "bias"),
    aten.rms_norm.default: ("weight",),
}
_MULTIPLY = aten.mul.Tensor


@dataclass(frozen=True)
class Fold:
    """`readers` are products that read `value`, whose `channels` along `axis` (from the end) `maker` can scale.

    Without a maker a multiplication is inserted before the readers.
    """

    value: Node
    maker: Node | None
    readers: tuple[Node, ...]
    channels: int
    axis: int

    @property
    def is_normed(self) -> bool:
        return self.maker is not None and self.maker.target in NORMS


def find_folds(editor: GraphEditor, shared: Mapping[int, int], insert: bool = False) -> Iterator[Fold]:
    """Every fold of one graph; `shared` counts readers of weights, as `count_readers` gives them.

    `insert` is whether a multiplication may be inserted.
    """
    for node in editor.nodes():
        fold = fold_at(editor, node, shared, insert)
        if fold is not None:
            yield fold


def fold_at(editor: GraphEditor, value: Node, shared: Mapping[int, int], insert: bool = False) -> Fold | None:
    """The fold between `value` and its readers, all of them or, where `insert`, the products; or None."""
    readers = tuple(value.users)
    scaled = tuple(user for user in readers if _reads(editor, user, value, shared))
    if not scaled:
        return None
    if len(scaled) < len(readers):
        return _inserted(value, scaled) if insert else None
    axes = {PRODUCTS[user.target].channels for user in readers}
    maker = _maker(editor, value)
    if maker is None or len(axes) != 1:
        return None
    (axis,) = axes
    if maker.target in NORMS:
        if axis != -1 or not _is_scalable_norm(editor, maker, shared):
            return None
    elif PRODUCTS[maker.target].channels != axis or not _is_scalable_product(editor, maker, shared):
        return None
    channels = value.meta["val"].shape[axis]
    return Fold(value, maker, readers, channels, axis) if isinstance(channels, int) else None


def _inserted(value: Node, readers: tuple[Node, ...]) -> Fold | None:
    channels = value.meta["val"].shape[-1]
    if value.target not in NORMS or len(argument(value, "normalized_shape")) != 1 or not isinstance(channels, int):
        return None
    last = all(PRODUCTS[user.target].channels == -1 for user in readers)
    return Fold(value, None, readers, channels, -1) if last else None


def _maker(editor: GraphEditor, value: Node) -> Node | None:
    """The norm or product whose channels `value` has, read by nothing else on the way."""
    if value.target in NORMS or value.target in PRODUCTS:
        return value
    if value.target is aten.relu.default:
        inner = unclamped(value)
        return inner if inner.target in PRODUCTS and len(inner.users) == 1 else None
    if value.target is _MULTIPLY:
        for factor in reversed(value.all_input_nodes):
            if factor.target in PRODUCTS and len(factor.users) == 1 and value.all_input_nodes.count(factor) == 1:
                same = factor.meta["val"].dim() == value.meta["val"].dim()
                return factor if same and factor.meta["val"].shape[-1] == value.meta["val"].shape[-1] else None
    return None


def _reads(editor: GraphEditor, user: Node, value: Node, shared: Mapping[int, int]) -> bool:
    if user.target not in PRODUCTS or value.meta["val"].dtype is not torch.float32:
        return False
    operands = PRODUCTS[user.target]
    if argument(user, operands.input) is not value or user.all_input_nodes.count(value) != 1:
        return False
    return _is_own(editor, argument(user, operands.weight), shared)


def _is_own(editor: GraphEditor, node: object, shared: Mapping[int, int]) -> bool:
    """Whether it is a constant that one call reads."""
    value = editor.constant_value(node)
    if value is None or not isinstance(node, Node) or node.op != "get_attr" or value.dtype is not torch.float32:
        return False
    return shared.get(value.untyped_storage().data_ptr(), 1) == 1


def _is_scalable_norm(editor: GraphEditor, norm: Node, shared: Mapping[int, int]) -> bool:
    constants = [argument(norm, name) for name in NORMS[norm.target]]
    one_axis = len(argument(norm, "normalized_shape")) == 1
    return (
        one_axis
        and _is_own(editor, constants[0], shared)
        and all(item is None or _is_own(editor, item, shared) for item in constants[1:])
    )


def _is_scalable_product(editor: GraphEditor, product: Node, shared: Mapping[int, int]) -> bool:
    operands = PRODUCTS[product.target]
    if not _is_own(editor, argument(product, operands.weight), shared):
        return False
    bias = argument(product, operands.bias) if operands.bias else None
    return bias is None or (_is_own(editor, bias, shared) and bias.meta["val"].dim() == 1)


def power_of_two(factors: Tensor) -> Tensor:
    """The nearest powers of two, by ratio."""
    return torch.exp2(factors.log2().round())


def apply(editor: GraphEditor, rule: str, fold: Fold, factors: Tensor) -> bool:
    """Scale the weights of the readers by `factors` (float64, positive, [channels]) and the maker by 1 / factors."""
    rank = fold.value.meta["val"].dim()
    sizes = [1] * rank
    sizes[fold.axis] = -1
    own = factors.double().reshape(sizes)
    new: dict[Node, Tensor] = {}
    for reader in fold.readers:
        found = scaled_weight(editor, reader, own, "inputs", {})
        if isinstance(found, str):
            editor.decline(rule, fold.value, found)
            return False
        new[argument(reader, PRODUCTS[reader.target].weight)] = found
    if fold.maker is None:
        return _insert(editor, rule, fold, factors, new)
    made = _scaled_maker(editor, fold, fold.maker, factors, own)
    if isinstance(made, str):
        editor.decline(rule, fold.value, made)
        return False
    if new.keys() & made.keys():
        editor.decline(rule, fold.value, "its maker reads its own result's weight")
        return False
    new |= made
    outputs = sorted(new)

    def build(builder: Builder) -> list[Node]:
        return [builder.constant(new[node]) for node in outputs]

    return editor.replace(rule, outputs, build, anchor=fold.value)


def _scaled_maker(
    editor: GraphEditor, fold: Fold, maker: Node, factors: Tensor, own: Tensor
) -> dict[Node, Tensor] | str:
    """New constants of the maker, or why there are none; `own` are the factors in the shape of the value."""
    if fold.is_normed:
        constants = [argument(maker, name) for name in NORMS[maker.target]]
        return {node: _divided(editor, node, factors) for node in constants if isinstance(node, Node)}
    operands = PRODUCTS[maker.target]
    found = scaled_weight(editor, maker, 1 / own, "outputs", {})
    if isinstance(found, str):
        return found
    new = {argument(maker, operands.weight): found}
    bias = argument(maker, operands.bias) if operands.bias else None
    if isinstance(bias, Node):
        new[bias] = _divided(editor, bias, factors)
    return new


def _insert(editor: GraphEditor, rule: str, fold: Fold, factors: Tensor, weights: Mapping[Node, Tensor]) -> bool:
    """The readers again, each where it stands, with their new weights and with what is divided once for all of them."""

    def build(builder: Builder) -> list[Node]:
        with builder.graph.inserting_before(following(fold.value)):
            divided = builder.call(_MULTIPLY, fold.value, builder.constant((1 / factors).float()))
        made = []
        for reader in fold.readers:
            weight = argument(reader, PRODUCTS[reader.target].weight)
            with builder.graph.inserting_before(reader):
                operands = {fold.value: divided, weight: builder.constant(weights[weight])}
                made.append(builder.repeat(reader, operands))
        return made

    return editor.replace(rule, fold.readers, build, anchor=fold.value)


def _divided(editor: GraphEditor, node: Node, factors: Tensor) -> Tensor:
    value = editor.constant_value(node)
    assert value is not None
    return (value.detach().double() / factors).to(value.dtype)


def input_columns(editor: GraphEditor, fold: Fold) -> Tensor:
    """The largest magnitude of all readers' weights for each channel, float64."""
    return torch.stack([_columns(editor, reader, fold.channels).amax(0) for reader in fold.readers]).amax(0)


def _columns(editor: GraphEditor, reader: Node, channels: int) -> Tensor:
    """|weight| with the channels read as the last axis: [rest, channels]."""
    operands = PRODUCTS[reader.target]
    weight = editor.constant_value(argument(reader, operands.weight))
    assert weight is not None
    size = weight.detach().double().abs()
    groups = channels // size.shape[operands.inputs]
    moved = (
        size.movedim((operands.outputs, operands.inputs), (0, 1)).flatten(2)
        if size.dim() > 2
        else (size if operands.outputs == 0 else size.t())
    )
    largest = moved.amax(2) if moved.dim() == 3 else moved
    return largest.reshape(groups, -1, size.shape[operands.inputs]).movedim(1, 0).reshape(-1, channels)


def output_rows(editor: GraphEditor, maker: Node) -> Tensor:
    """The largest magnitude of a product's weight for each channel that it makes, float64."""
    operands = PRODUCTS[maker.target]
    weight = editor.constant_value(argument(maker, operands.weight))
    assert weight is not None
    return weight.detach().double().abs().movedim(operands.outputs, 0).flatten(1).amax(1)
