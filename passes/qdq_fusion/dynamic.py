"""Products of codes whose scale is computed as one integer product each, in the two forms that quantizers write.

- On numbers: linear(dequantize(x, scale, zero_point), dequantize(w), b), one range for all of x or for each row; for
  convolutions one.
- On integers, ONNX's MatMulInteger and ConvInteger: (x - zero_point) (w - w_zero_point) as int32, then float32, times
  scale * w_scale, plus a bias.

Sums are exact in both; what follows is rounded in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Builder, GraphEditor
from graphopt.matcher import argument
from graphopt.operators import dynamic_products  # noqa: F401
from graphopt.passes.qdq_fusion.codes import BYTES, DEQUANTIZE, constant_number, only_user
from graphopt.passes.qdq_fusion.products import (
    LINEARS,
    Refused,
    Weight,
    bias_of,
    narrowed,
    operand_of,
    options_of,
    weight_of,
    widened,
)

aten = torch.ops.aten
_CASTS = frozenset({aten._to_copy.default})
_ROWS, _IMAGES = torch.ops.graphopt.dynamic_qlinear.default, torch.ops.graphopt.dynamic_qconv.default


def fuse_dynamic_product(editor: GraphEditor, node: Node, rule: str, seen: dict[Any, Weight]) -> bool:
    """Rewrite a product of codes with a computed scale; False for any other node. Raises Refused with a reason."""
    source = operand_of(node)
    if not isinstance(source, Node) or source.target is not DEQUANTIZE or not _fits(source, node.target in LINEARS):
        return False
    given = {name: argument(source, name) for name in ("x", "scale", "zero_point")}
    scale = editor.constant_value(given["scale"])
    if scale is not None and scale.numel() == 1 and float(scale) == 1 and given["zero_point"] is not None:
        return _fuse_integers(editor, node, rule, given["x"], given["zero_point"], seen)
    if scale is not None or given["zero_point"] is None or argument(source, "dtype") != torch.float32:
        return False
    weight = weight_of(editor, node, seen)
    bias = bias_of(editor, node, weight)
    scales = given["scale"], given["zero_point"]
    build = _product(node, given["x"], scales, weight.codes, weight.scale, bias)
    return editor.replace(f"{rule}/dynamic", [node], build)


def _product(
    node: Node, codes: Node, scales: tuple[Node, Node], weight: Tensor, steps: Tensor, bias: Tensor | None
) -> Callable[[Builder], list[Node]]:
    """Builds the integer product in the place of `node` and what belongs to it."""
    options = options_of(node)

    def build(builder: Builder) -> list[Node]:
        parameters = [*scales, builder.constant(weight), builder.constant(steps)]
        added = None if bias is None else builder.constant(bias)
        operator = _IMAGES if options else _ROWS
        made = builder.call(operator, widened(builder, node, codes), *parameters, added, **options)
        return [narrowed(builder, node, made)]

    return build


def _fits(source: Node, in_rows: bool) -> bool:
    """8-bit codes, all of one range or each row of one."""
    codes = source.args[0].meta["val"]  # type: ignore[union-attr]
    if codes.dtype not in BYTES:
        return False
    axis, block = argument(source, "axis"), argument(source, "block")
    zero = argument(source, "zero_point")
    if zero is None or zero.meta["val"].dtype != codes.dtype:
        return False
    return axis is None or (in_rows and axis == codes.ndim - 1 and block == codes.shape[-1])


def _fuse_integers(
    editor: GraphEditor, node: Node, rule: str, codes: Node, zero: Node, seen: dict[Any, Weight]
) -> bool:
    """The whole of an integer product -> Cast -> Mul -> Add, as ONNX Runtime's dynamic quantization writes it."""
    weight = weight_of(editor, node, seen, numbers=(torch.float32, torch.float64))
    if not bool((weight.scale == 1).all()):
        return False
    inner, last = [node], only_user(node, _is_cast)
    while last is not None and last.meta["val"].dtype != torch.float32:
        inner.append(last)
        last = only_user(last, _is_cast)
    scaled = None if last is None else only_user(last, lambda user: user.target is aten.mul.Tensor)
    if last is None or scaled is None or torch.int32 not in [each.meta["val"].dtype for each in inner]:
        raise Refused("its int32 sums are read by more than a product with scales")
    factors = _factors(editor, scaled, last, weight.codes.shape[0] if node.target in LINEARS else 0)
    if factors is None:
        raise Refused("its sums are not multiplied by one computed scale and one for each output")
    inner += [last]
    bias, end = _added(editor, scaled, weight.codes.shape[0], node.meta["val"].dim() - 2 if options_of(node) else 0)
    inner += [] if end is scaled else [scaled]
    scale, steps = factors
    build = _product(node, codes, (scale, zero), weight.codes, steps, bias)
    return editor.replace(f"{rule}/dynamic", [end], build, inner=inner)


def _is_cast(node: Node) -> bool:
    return node.target in _CASTS


def _other(node: Node, one: Node) -> Any:
    left, right = node.args[:2]
    return right if left is one else left


def _factors(editor: GraphEditor, scaled: Node, sums: Node, outputs: int) -> tuple[Node, Tensor] | None:
    """The computed scale and the weight's, of () or [outputs], whose product the sums are multiplied by."""
    product = _other(scaled, sums)
    if not isinstance(product, Node) or product.target is not aten.mul.Tensor:
        return None
    for one, other in (product.args[:2], product.args[1::-1]):
        steps = _steps(editor, other)
        computed = isinstance(one, Node) and editor.constant_value(one) is None
        if steps is None or not computed or one.meta["val"].numel() != 1:  # type: ignore[union-attr]
            continue
        if one.meta["val"].ndim == 0 and (steps.ndim == 0 or steps.shape == (outputs,)):  # type: ignore[union-attr]
            return one, steps  # type: ignore[return-value]
    return None


def _steps(editor: GraphEditor, value: Any) -> Tensor | None:
    """A number or a constant vector as float32; one element has no axes."""
    if isinstance(value, (int, float)):
        return torch.tensor(value, dtype=torch.float32)
    held = editor.constant_value(value)
    if held is None or held.dtype != torch.float32:
        return None
    return held.detach().reshape(()) if held.numel() == 1 else held.detach()


def _added(editor: GraphEditor, scaled: Node, outputs: int, spatial: int) -> tuple[Tensor | None, Node]:
    """The bias behind the scales, and the last node of the product, which has `spatial` axes behind the outputs."""
    user = only_user(scaled, lambda node: node.target is aten.add.Tensor and argument(node, "alpha") == 1)
    if user is None:
        return None, scaled
    number = constant_number(editor, _other(user, scaled))
    if number is None or number.dtype != torch.float32:
        return None, scaled
    shape = (outputs, *(1 for _ in range(spatial)))
    if number.shape != shape and not (spatial and number.shape == (1, *shape)):
        return None, scaled
    return number.detach().flatten(), user
