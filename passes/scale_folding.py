"""Fold a constant scale per channel into the weight of the product that reads it, or that made it.

Before: y = linear(x * c, w, b)        After: y = linear(x, w * c, b)
Before: y = linear(x, w, b) * c        After: y = linear(x, w * c[:, None], b * c)

The same for convolutions. Between scale and product axes may be rearranged and further factors may stand, so that a
scale per head folds into the projection that its heads are put together for: a gate that depends on no input,
sigmoid(theta) (Qiu et al. 2025, arXiv 2505.06708, table 4), becomes other weights. So do the scales that layers put
on their results (Touvron et al. 2021, arXiv 2103.17239) and on their queries. Division by a constant is a scale.

New weights are computed in float64 and rounded once; results differ by rounding, and zero is as good a factor as any.
Declines where the scaled value or the weight is read by anything else, where factors differ along other axes than the
product's channels, where the scale changes type or shape, and where a new weight is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Builder, Edit, GraphEditor
from graphopt.matcher import argument
from graphopt.near_miss import describe
from graphopt.passes.merge_linears import count_readers
from graphopt.program import Program
from graphopt.propagate import shape_key

aten = torch.ops.aten

SCALES = frozenset({aten.mul.Tensor, aten.div.Tensor})
MOST_CHANNELS = 1 << 20  # no product has more, so that factors are never spread over whole feature maps


@dataclass(frozen=True)
class Product:
    """The names of a product's operands, and where its channels are.

    Axis `inputs` of the weight is of the channels read, `outputs` of those made; `channels` is their axis in input
    and result, counted from the end.
    """

    input: str
    weight: str
    bias: str | None
    inputs: int
    outputs: int
    channels: int = -1


def _convolution(spatial: int) -> Product:
    return Product("input", "weight", "bias", 1, 0, -1 - spatial)


PRODUCTS: Mapping[Any, Product] = {
    aten.linear.default: Product("input", "weight", "bias", 1, 0),
    aten.addmm.default: Product("mat1", "mat2", "self", 0, 1),
    aten.mm.default: Product("self", "mat2", None, 0, 1),
    aten.matmul.default: Product("self", "other", None, 0, 1),
    aten.conv1d.default: _convolution(1),
    aten.conv1d.padding: _convolution(1),
    aten.conv2d.default: _convolution(2),
    aten.conv2d.padding: _convolution(2),
    aten.conv3d.default: _convolution(3),
    aten.conv3d.padding: _convolution(3),
}
_PERMUTING = frozenset({aten.transpose.int, aten.permute.default})
_COPYING = frozenset({aten.contiguous.default, aten.clone.default})
_RESHAPING = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
        *(aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default),
    }
)


@dataclass(frozen=True)
class ScaleFolding(Pass):
    """Fold a constant scale per channel into the weight of the product that reads it, or that made it."""

    name = "scale-folding"
    measured = False

    def starts_at(self) -> frozenset[Any]:
        return SCALES

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Edit(program, context, self.name)
        readers = count_readers(edit.program)
        for editor in edit.graphs():
            for node in reversed(list(editor.nodes())):  # so that scales between a scale and its product go first
                scale = find_scale(editor, node)
                if isinstance(scale, Scale) and isinstance(found := find_reader(editor, scale, readers), tuple):
                    self._into_reader(editor, scale, *found)
            for node in editor.nodes():
                scale = find_scale(editor, node)
                if isinstance(scale, Scale):
                    self._into_maker(editor, scale, readers)
                elif scale is not None:
                    editor.decline(self.name, node, scale)
        return edit.finish()

    def _into_reader(self, editor: GraphEditor, scale: Scale, way: Sequence[Node], weight: torch.Tensor) -> None:
        product = way[-1]

        def build(builder: Builder) -> list[Node]:
            values = {scale.node: scale.value}
            for node in way[:-1]:
                values[node] = builder.repeat(node, values)
            values[argument(product, PRODUCTS[product.target].weight)] = builder.constant(weight)
            return [builder.repeat(product, values)]

        editor.replace(self.name, [product], build, inner=[scale.node, *way[:-1]])

    def _into_maker(self, editor: GraphEditor, scale: Scale, readers: Mapping[int, int]) -> None:
        """Fold into the product before the scale, or record why it folds into none on either side."""
        behind, before = find_reader(editor, scale, readers), find_maker(editor, scale, readers)
        if isinstance(behind, tuple):  # refused
            return
        if not isinstance(before, dict):
            reasons = [reason for reason in (behind, before) if reason is not None]
            if reasons:
                editor.decline(self.name, scale.node, " and ".join(reasons))
            else:
                found = f"{way_to_product(scale)}, and it scales {describe(scale.value)}"
                editor.near_miss(self.name, scale.node, found, 1, 2)
            return

        def build(builder: Builder) -> list[Node]:
            values = {old: builder.constant(new) for old, new in before.items()}
            return [builder.repeat(scale.value, values)]

        editor.replace(self.name, [scale.node], build, inner=[scale.value])


@dataclass(frozen=True)
class Scale:
    """`node` is `value` times `factors`, float64 with as many axes, of size one where they do not differ."""

    node: Node
    value: Node
    factors: torch.Tensor


def find_scale(editor: GraphEditor, node: Node) -> Scale | str | None:
    """What a product of elements, or a quotient, scales by constants; a clause where that changes type or shape."""
    if node.target not in SCALES:
        return None
    left, right = node.args[:2]
    for value, other in ((left, right), (right, left)):
        if node.target is aten.div.Tensor and other is left:
            return None
        if not isinstance(value, Node) or editor.constant_value(value) is not None:
            continue
        if (factors := _constant(editor, other)) is None:
            continue
        if _type(node) != _type(value) or not value.meta["val"].dtype.is_floating_point:
            return f"it makes {_text(node)} of {_text(value)}"
        return Scale(node, value, _with_axes_of(node, 1 / factors if node.target is aten.div.Tensor else factors))
    return None


def _with_axes_of(node: Node, factors: torch.Tensor) -> torch.Tensor:
    return factors.reshape([1] * (node.meta["val"].dim() - factors.dim()) + list(factors.shape))


def _constant(editor: GraphEditor, operand: Any) -> torch.Tensor | None:
    if isinstance(operand, (int, float)):
        return torch.tensor(operand, dtype=torch.float64)
    value = editor.constant_value(operand)
    return None if value is None or value.is_complex() else value.detach().double()


def find_reader(
    editor: GraphEditor, scale: Scale, readers: Mapping[int, int]
) -> tuple[list[Node], torch.Tensor] | str | None:
    """The way to the product that reads the scaled value and its new weight, or why not; None where there is none."""
    found = way_to_product(scale)
    if isinstance(found, str):
        return None
    way, factors = found
    weight = scaled_weight(editor, way[-1], factors, "inputs", readers)
    return weight if isinstance(weight, str) else (way, weight)


def find_maker(editor: GraphEditor, scale: Scale, readers: Mapping[int, int]) -> dict[Node, torch.Tensor] | str | None:
    """New weight and bias, by the old ones' nodes, of the product that is scaled, or why not; None where it is none."""
    product = scale.value
    if product.target not in PRODUCTS:
        return None
    if len(product.users) > 1:
        return f"{product.name} is used by {', '.join(user.name for user in product.users)}"
    operands = PRODUCTS[product.target]
    weight = scaled_weight(editor, product, scale.factors, "outputs", readers)
    if isinstance(weight, str):
        return weight
    values = {argument(product, operands.weight): weight}
    bias, own = argument(product, operands.bias) if operands.bias else None, _channels(product, scale.factors)
    if bias is not None and own is not None:
        value = editor.constant_value(bias)
        if value is None:
            return f"the bias of {product.name} is no constant"
        values[bias] = _like(value, value.detach().double() * own)
        if not values[bias].isfinite().all():
            return f"the bias of {product.name} times the scale is not finite in {value.dtype}"
    return values


def way_to_product(scale: Scale) -> tuple[list[Node], torch.Tensor] | str:
    """The single readers up to a product, which is the last, and the factors of what it reads; else why there are none.

    They rearrange axes or multiply by further factors, which a scale may trade places with.
    """
    way: list[Node] = []
    node, factors = scale.node, scale.factors
    while True:
        users = list(node.users)
        if len(users) != 1:
            return f"{node.name} is read by {', '.join(user.name for user in users)}"
        (user,) = users
        operands = PRODUCTS.get(user.target)
        if operands is not None and argument(user, operands.input) is node and user.all_input_nodes.count(node) == 1:
            return [*way, user], factors
        carried = _carried(factors, node, user)
        if carried is None:
            return f"{node.name} is read by {describe(user)}, no product by a weight"
        way.append(user)
        node, factors = user, carried


def _carried(factors: torch.Tensor, node: Node, user: Node) -> torch.Tensor | None:
    """The factors of the reader's value, where scaling may as well come after it."""
    if user.op != "call_function" or _dtype(user) != _dtype(node):
        return None
    if user.target in _COPYING:
        return factors
    if user.target in _PERMUTING:
        moved: torch.Tensor = user.target(factors, *user.args[1:], **user.kwargs)
        return moved
    if user.target in _RESHAPING:
        return reshaped(factors, node.meta["val"].shape, user.meta["val"].shape)
    if user.target is aten.mul.Tensor and (user.args[0] is node) != (user.args[1] is node):
        return _with_axes_of(user, factors)
    if user.target is aten.div.Tensor and user.args[0] is node and user.args[1] is not node:
        return _with_axes_of(user, factors)
    return None


def reshaped(factors: torch.Tensor, old: Sequence[Any], new: Sequence[Any]) -> torch.Tensor | None:
    """Factors of a value whose shape changes from `old` to `new` in the order of memory; None where they mix with rows.

    Only the last axes are spread out, from the first along which factors differ: leading sizes may be symbolic.
    """
    first = next((axis for axis, size in enumerate(factors.shape) if size != 1), len(old))
    count = 1
    for size in old[first:]:
        if not isinstance(size, int):
            return None
        count *= size
    last, reached = len(new), 1
    while reached < count and last and isinstance(new[last - 1], int):
        last -= 1
        reached *= new[last]
    if reached != count or count > MOST_CHANNELS:
        return None
    spread = factors.expand([*factors.shape[:first], *old[first:]])
    return spread.reshape([1] * last + list(new[last:]))


def scaled_weight(
    editor: GraphEditor, product: Node, factors: torch.Tensor, side: str, readers: Mapping[int, int]
) -> torch.Tensor | str:
    """The weight with the channels of one side, "inputs" or "outputs", times their factors; or why there is none."""
    operands = PRODUCTS[product.target]
    weight = editor.constant_value(argument(product, operands.weight))
    if weight is None:
        return f"the weight of {product.name} is no constant"
    if weight.dim() < 2 or (operands.channels == -1 and weight.dim() > 2):
        return f"the weight of {product.name} has {weight.dim()} axes"
    if (number := readers.get(weight.untyped_storage().data_ptr(), 1)) > 1:
        return f"the weight of {product.name} is read {number} times"
    own = _channels(product, factors)
    if own is None:
        return f"the factors, {list(factors.shape)}, differ along other axes than the channels of {product.name}"
    groups = argument(product, "groups") if operands.channels != -1 and side == "inputs" else 1
    if groups > 1 and own.numel() > 1:
        rows = own.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).flatten(0, 1)
        own = rows.reshape(*rows.shape, *[1] * (weight.dim() - 2))
    else:
        sizes = [1] * weight.dim()
        sizes[operands.inputs if side == "inputs" else operands.outputs] = -1
        own = own.reshape(sizes)
    result = _like(weight, weight.detach().double() * own)
    if not result.isfinite().all():
        return f"the weight of {product.name} times the scale is not finite in {weight.dtype}"
    return result


def _channels(product: Node, factors: torch.Tensor) -> torch.Tensor | None:
    """The factors along the product's channels, [channels] or [1]; None where they differ along another axis."""
    channels = PRODUCTS[product.target].channels % factors.dim()
    others = [size for axis, size in enumerate(factors.shape) if axis != channels]
    return factors.reshape(-1) if math.prod(others) == 1 else None


def _like(old: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` in the type of `old`, and a parameter if that is one."""
    value = value.to(old.dtype)
    return torch.nn.Parameter(value, old.requires_grad) if isinstance(old, torch.nn.Parameter) else value


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _type(node: Node) -> tuple[Any, ...]:
    return node.meta["val"].dtype, shape_key(node.meta["val"])


def _text(node: Node) -> str:
    value = node.meta["val"]
    return f"{value.dtype}{list(value.shape)}"
