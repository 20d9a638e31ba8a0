"""Linears, matrix products with a constant and convolutions of dequantized operands as products of codes.

Before: quantize(gelu(linear(dequantize(x), dequantize(w), b) + dequantize(r)))        After: qlinear(x, w, b, r)

Behind the product may stand a residual, an activation, a clip and a quantize, each read by the next alone; without the
quantize the product alone is fused and gives numbers. A bias stored as int32 codes in steps of x_scale * weight_scale
is added to the sums, any other one to the numbers. Convolutions over one axis are those over two, of height 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Builder, GraphEditor
from graphopt.matcher import argument
from graphopt.operators import integer_products  # noqa: F401
from graphopt.passes.qdq_fusion.codes import (
    BYTES,
    DEQUANTIZE,
    Codes,
    Constants,
    Into,
    codes_of,
    constant_number,
    into_of,
    only_user,
)
from graphopt.passes.qdq_fusion.padding import unpadded
from graphopt.propagate import shape_key

aten, graphopt = torch.ops.aten, torch.ops.graphopt
LINEARS: Mapping[Any, tuple[str, str, str | None]] = {
    aten.linear.default: ("input", "weight", "bias"),
    aten.addmm.default: ("mat1", "mat2", "self"),
    aten.mm.default: ("self", "mat2", None),
    aten.matmul.default: ("self", "other", None),
}
SEQUENCES = frozenset({aten.conv1d.default, aten.conv1d.padding})
CONVOLUTIONS = frozenset({aten.conv2d.default, aten.conv2d.padding, *SEQUENCES})
PRODUCTS = frozenset({*LINEARS, *CONVOLUTIONS})
_LARGEST_SUM = 2**31 - 1  # that int32 holds
_BIAS_SCALE = 1e-5  # relative difference between a bias's scale and that of the sums that is rounding
_CLIPS: Mapping[Any, tuple[Any, Any]] = {
    aten.relu.default: (0.0, None),
    aten.relu6.default: (0.0, 6.0),
    aten.clamp.default: ("min", "max"),
    aten.hardtanh.default: ("min_val", "max_val"),
}


@dataclass(frozen=True, eq=False)
class Weight:
    """Codes [N, ...] less their zero points, int8 where it holds them, else int16; `scale` is () or [N]."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False)
class Tail:
    """What stands behind a product: the nodes in order, up to the quantize that makes `into`."""

    nodes: tuple[Node, ...]
    residual: Codes | None = None
    activation: str | None = None
    into: Into | None = None


class Refused(Exception):
    """Why a product stays as it is."""


def fuse_product(editor: GraphEditor, node: Node, rule: str, constants: Constants, seen: dict[Any, Weight]) -> bool:
    """Rewrite the product `node` with what follows it. Raises Refused with the reason where it is to stay."""
    if (x := codes_of(editor, operand_of(node))) is None:
        raise Refused("its input is not dequantized from 8-bit codes with one constant scale")
    weight = weight_of(editor, node, seen)
    options = options_of(node)
    if options:
        x, options["padding"] = _outside(x, node, options)
    bias, integer = bias_and_steps(editor, node, x, weight)
    tail = tail_of(editor, node)
    operator = graphopt.qconv.default if node.target in CONVOLUTIONS else graphopt.qlinear.default

    def build(builder: Builder) -> list[Node]:
        images, *parameters = constants.of(builder, x)
        given: list[Any] = [widened(builder, node, images), *parameters]
        given += map(builder.constant, (weight.codes, weight.scale))
        given.append(None if bias is None else builder.constant(bias if integer is None else integer))
        given += (None, None) if tail.into is None else constants.parameters(builder, tail.into)
        if tail.residual is not None:
            added, *parameters = constants.of(builder, tail.residual)
            given += (widened(builder, node, added), *parameters)
        else:
            given += (None, None, None)
        return [narrowed(builder, node, builder.call(operator, *given, **options, **result_options(tail)))]

    every = (node, *tail.nodes)
    return editor.replace(rule, [every[-1]], build, inner=every[:-1])


def result_options(tail: Tail) -> dict[str, Any]:
    if tail.into is None:
        return {"dtype": torch.float32}
    into = tail.into
    found = {"qmin": into.low, "qmax": into.high, "dtype": into.dtype, "reciprocal": into.reciprocal}
    return found if tail.activation is None else {**found, "activation": tail.activation}


def operand_of(node: Node) -> Any:
    """What a weight is multiplied by."""
    return argument(node, LINEARS[node.target][0] if node.target in LINEARS else "input")


def widened(builder: Builder, node: Node, value: Node) -> Node:
    """An operand [N, C, L] of a convolution over one axis as images of height 1."""
    return builder.call(aten.unsqueeze.default, value, 2) if node.target in SEQUENCES else value


def narrowed(builder: Builder, node: Node, value: Node) -> Node:
    """What images of height 1 became, without the height."""
    return builder.call(aten.squeeze.dim, value, 2) if node.target in SEQUENCES else value


def options_of(node: Node) -> dict[str, Any]:
    """The options of a convolution of images; none of a linear. Raises Refused for those that images do not have."""
    if node.target not in CONVOLUTIONS:
        return {}
    line = node.target in SEQUENCES
    if node.meta["val"].dim() != (3 if line else 4):
        raise Refused("its images have no batch axis")
    taps = _taps(node)
    found = {name: [*([1] if line else []), *_both(argument(node, name), line)] for name in ("stride", "dilation")}
    padding = argument(node, "padding")
    if isinstance(padding, str):
        reach = [d * (t - 1) * (padding == "same") for d, t in zip(found["dilation"], taps, strict=True)]
        if any(total % 2 for total in reach):
            raise Refused('it is padded on one side more than on the other by "same"')
        padding = [total // 2 for total in reach]
    else:
        padding = [*([0] if line else []), *_both(padding, line)]
    return {**found, "padding": padding, "groups": argument(node, "groups")}


def _taps(node: Node) -> list[int]:
    taps = [int(size) for size in argument(node, "weight").meta["val"].shape[2:]]
    return [1, *taps] if node.target in SEQUENCES else taps


def _outside(x: Codes, node: Node, options: Mapping[str, Any]) -> tuple[Codes, list[int]]:
    """Images and their padding together with one that stands before the convolution: the same on both sides of each
    axis, or above, left, below, right."""
    reach = [d * (t - 1) + 1 for d, t in zip(options["dilation"], _taps(node), strict=True)]
    x, before = unpadded(x, reach)
    total = [side + own for side, own in zip(before, [*options["padding"]] * 2, strict=True)]
    return x, total[:2] if total[:2] == total[2:] else total


def _both(numbers: Any, line: bool) -> list[int]:
    """A number for each axis, of which a line has one."""
    each: list[int] = [numbers] if isinstance(numbers, int) else list(numbers)
    return each * 2 if len(each) == 1 and not line else each


def weight_of(
    editor: GraphEditor, node: Node, seen: dict[Any, Weight], numbers: Sequence[torch.dtype] = (torch.float32,)
) -> Weight:
    """The codes of a constant weight less their zero points; `numbers`: types of its scales."""
    name = LINEARS[node.target][1] if node.target in LINEARS else "weight"
    transposed = node.target in LINEARS and node.target is not aten.linear.default
    source = argument(node, name)
    key = (source, transposed)
    if key not in seen:
        if node.target in LINEARS and isinstance(source, Node) and source.meta["val"].dim() != 2:
            raise Refused(f"its weight has {source.meta['val'].dim()} axes")
        whole, scale = whole_codes(editor, source, int(transposed), numbers)
        whole = (whole.t() if transposed else whole).contiguous()
        whole = whole.unsqueeze(2) if node.target in SEQUENCES else whole
        seen[key] = fitting(whole, scale)
    return seen[key]


def fitting(whole: Tensor, scale: Tensor) -> Weight:
    """Codes in the type that holds them. Raises Refused where int32 may not hold sums of products with them."""
    fits = int(whole.min()) >= -128 and int(whole.max()) <= 127
    depth = whole[0].numel()
    if depth * 255 * (128 if fits else 255) > _LARGEST_SUM:
        raise Refused(f"sums of {depth} products of codes may not fit int32")
    return Weight(whole.to(torch.int8 if fits else torch.int16), scale)


def whole_codes(
    editor: GraphEditor, source: Any, outputs: int, numbers: Sequence[torch.dtype] = (torch.float32,)
) -> tuple[Tensor, Tensor]:
    """The codes of a constant weight less their zero points, int32, and their scale, () or along the axis `outputs`."""
    if not isinstance(source, Node) or source.target is not DEQUANTIZE:
        raise Refused("its weight is not dequantized")
    given = [argument(source, each) for each in ("x", "scale", "zero_point")]
    codes, scale, zero = (None if each is None else editor.constant_value(each) for each in given)
    if codes is None or scale is None or (given[2] is not None and zero is None):
        raise Refused("its weight is computed")
    if codes.dtype not in BYTES or argument(source, "block") or scale.dtype not in numbers:
        raise Refused("its weight is no 8-bit codes with float32 scales for outputs")
    axis = argument(source, "axis")
    if axis not in (None, outputs):
        raise Refused(f"its weight has scales along axis {axis}, not along its outputs")
    whole = codes.to(torch.int32)
    if zero is not None:
        whole = whole - (zero if axis is None else zero.reshape([-1 if n == axis else 1 for n in range(codes.dim())]))
    return whole, scale.detach()


def bias_and_steps(editor: GraphEditor, node: Node, x: Codes, weight: Weight) -> tuple[Tensor | None, Tensor | None]:
    """The bias as float32 numbers, and as int32 in steps of the sums where it is stored so."""
    number, source = bias_of(editor, node, weight), _bias_source(node)
    if number is None or not isinstance(source, Node):
        return None, None
    if _counts_in_steps(editor, source):
        codes, scale = (editor.constant_value(argument(source, each)) for each in ("x", "scale"))
        assert codes is not None and scale is not None
        wanted = x.scale.double() * weight.scale.double()
        if codes.dtype == torch.int32 and bool(((scale.double() / wanted - 1).abs() < _BIAS_SCALE).all()):
            return number, codes.detach()
    return number, None


def _bias_source(node: Node) -> Any:
    name = LINEARS[node.target][2] if node.target in LINEARS else "bias"
    return argument(node, name) if name else None


def bias_of(editor: GraphEditor, node: Node, weight: Weight) -> Tensor | None:
    """The bias as float32 numbers. Raises Refused for one that is not a constant for each output."""
    if node.target is aten.addmm.default and (argument(node, "alpha") != 1 or argument(node, "beta") != 1):
        raise Refused("it scales its product or its bias")
    source = _bias_source(node)
    if source is None:
        return None
    number = constant_number(editor, source)
    if number is None or number.dtype != torch.float32 or number.shape != weight.codes.shape[:1]:
        raise Refused("its bias is not one constant for each output")
    return number.detach()


def _counts_in_steps(editor: GraphEditor, source: Node) -> bool:
    """Whether it dequantizes codes whose zero point is 0."""
    if source.target is not DEQUANTIZE:
        return False
    zero = argument(source, "zero_point")
    held = None if zero is None else editor.constant_value(zero)
    return zero is None or (held is not None and not bool(held.any()))


def tail_of(editor: GraphEditor, product: Node, residuals: bool = True) -> Tail:
    """The longest run behind `product` that ends in a quantize, else nothing."""
    found = Tail(())
    node, low, high = product, None, None
    while (user := only_user(node)) is not None:
        if (into := into_of(editor, user)) is not None:
            return replace(found, nodes=(*found.nodes, user), into=into.clipped(low, high))
        if residuals and found.activation is None and low is None and high is None and found.residual is None:
            residual = _residual(editor, node, user)
        else:
            residual = None
        if residual is not None:
            found = replace(found, residual=residual)
        elif (bounds := clip_of(user)) is not None:
            low, high = _narrower(low, high, *bounds)
        elif (
            found.activation is None and low is None and high is None and (activation := _activation(user)) is not None
        ):
            found = replace(found, activation=activation)
        else:
            break
        found = replace(found, nodes=(*found.nodes, user))
        node = user
    return Tail(())


def _residual(editor: GraphEditor, node: Node, user: Node) -> Codes | None:
    if user.target is not aten.add.Tensor or argument(user, "alpha") != 1 or len(user.all_input_nodes) != 2:
        return None
    (other,) = (each for each in user.all_input_nodes if each is not node)
    codes = codes_of(editor, other)
    same = codes is not None and shape_key(codes.node.meta["val"]) == shape_key(node.meta["val"])
    return codes if same else None


def clip_of(node: Node) -> tuple[float | None, float | None] | None:
    """The bounds of a clip, with None for no bound; None for any other node."""
    if node.target not in _CLIPS:
        return None
    low, high = (argument(node, bound) if isinstance(bound, str) else bound for bound in _CLIPS[node.target])
    if isinstance(low, Node) or isinstance(high, Node):
        return None
    return low, high


def _narrower(
    low: float | None, high: float | None, least: float | None, most: float | None
) -> tuple[float | None, float | None]:
    """The bounds of two clips one after the other."""

    def into(bound: float | None) -> float | None:
        if bound is None:
            return None
        bound = bound if least is None else max(bound, least)
        return bound if most is None else min(bound, most)

    return (least if low is None else into(low)), (most if high is None else into(high))


def _activation(node: Node) -> str | None:
    if node.target is aten.gelu.default:
        return "gelu" if argument(node, "approximate") == "none" else "gelu-tanh"
    return _ACTIVATIONS.get(node.target)


_ACTIVATIONS: Mapping[Any, str] = {
    aten.silu.default: "silu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
}
