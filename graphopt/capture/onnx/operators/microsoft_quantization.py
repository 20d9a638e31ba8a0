"""Quantized operators of the domain com.microsoft, in the form dequantize -> operator on numbers -> quantize.

Source: ONNX Runtime's contributed operators (docs/ContribOperators.md).
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.operators.indexing import gather
from graphopt.capture.onnx.operators.linear import matmul
from graphopt.capture.onnx.operators.microsoft import embedding_layer_norm
from graphopt.capture.onnx.operators.microsoft_images import channels_first, channels_last
from graphopt.capture.onnx.operators.pooling import average_pool
from graphopt.capture.onnx.operators.quantization import (
    dequantized,
    dynamically_quantized,
    held_tensor,
    product_of,
    quantized,
    quantized_convolution,
)
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor, Value, known

aten = torch.ops.aten
_BINARY = {"com.microsoft.QLinearAdd": aten.add.Tensor, "com.microsoft.QLinearMul": aten.mul.Tensor}


@operator(*_BINARY)
def binary(
    op: Operation, a: Present, a_scale: Present, a_zero: Value, b: Present, b_scale: Present, b_zero: Value,
    scale: Present, zero: Present | None = None,
) -> Tensor:  # fmt: skip
    left, right = dequantized(op, a, a_scale, a_zero), dequantized(op, b, b_scale, b_zero)
    return quantized(op, op.call(_BINARY[op.name], left, right), scale, zero, dtype=a.dtype)


@operator("com.microsoft.QLinearConcat")
def concat(op: Operation, scale: Present, zero: Present, *given: Present) -> Tensor:
    if not given or len(given) % 3:
        raise op.refuse("QLinearConcat takes three inputs for each tensor: codes, scale and zero point")
    parts = [dequantized(op, *part) for part in zip(given[::3], given[1::3], given[2::3], strict=True)]
    joined = op.call(aten.cat.default, parts, op.axis(op.attributes.integer("axis"), parts[0].ndim))
    return quantized(op, joined, scale, zero)


@operator(
    "com.microsoft.QLinearSigmoid",
    "com.microsoft.QLinearLeakyRelu",
    "com.microsoft.QLinearSoftmax",
    "com.microsoft.QLinearAveragePool",
    "com.microsoft.QLinearGlobalAveragePool",
)
def unary(
    op: Operation, x: Present, x_scale: Present, x_zero: Value, scale: Present, zero: Present | None = None
) -> Tensor:
    last, value = op.attributes.integer("channels_last"), dequantized(op, x, x_scale, x_zero)
    value = channels_first(op, value) if last else value
    value = _UNARY[op.name.removeprefix("com.microsoft.QLinear")](op, value)
    return quantized(op, channels_last(op, value) if last else value, scale, zero, dtype=x.dtype)


@operator("com.microsoft.QLinearConv")
def convolution(
    op: Operation, x: Present, x_scale: Present, x_zero: Present, w: Present, w_scale: Present, w_zero: Present,
    scale: Present, zero: Present, bias: Present | None = None,
) -> Tensor:  # fmt: skip
    """The operator of the standard domain, whose channels may be the last axis."""
    last = op.attributes.integer("channels_last")
    value = channels_first(op, x) if last else x
    result = quantized_convolution(op, value, x_scale, x_zero, w, w_scale, w_zero, scale, zero, bias)
    return channels_last(op, result) if last else result


@operator("com.microsoft.QLinearReduceMean")
def mean(
    op: Operation, x: Present, x_scale: Present, x_zero: Value, scale: Present, zero: Present | None = None
) -> Tensor:
    axes = op.attributes.integers("axes") or list(range(x.ndim))
    keep = bool(op.attributes.integer("keepdims", 1))
    value = op.call(aten.mean.dim, dequantized(op, x, x_scale, x_zero), axes, keep)
    return quantized(op, value, scale, zero, dtype=x.dtype)


@operator("com.microsoft.QLinearWhere")
def where(
    op: Operation, condition: Present, x: Present, x_scale: Present, x_zero: Present, y: Present, y_scale: Present,
    y_zero: Present, scale: Present, zero: Present,
) -> Tensor:  # fmt: skip
    sides = dequantized(op, x, x_scale, x_zero), dequantized(op, y, y_scale, y_zero)
    return quantized(op, op.call(aten.where.self, condition, *sides), scale, zero, dtype=x.dtype)


def _softmax(op: Operation, value: Tensor) -> Tensor:
    """Before opset 13, which the attribute names, the axes from `axis` on are one."""
    opset = op.attributes.integer("opset")
    axis = op.axis(op.attributes.integer("axis", -1), value.ndim)
    if opset >= 13 or axis == value.ndim - 1:
        return op.call(aten.softmax.int, value, axis - value.ndim)
    flat = op.reshape(value, [*value.shape[:axis], -1])
    return op.reshape(op.call(aten.softmax.int, flat, -1), list(value.shape))


_UNARY: dict[str, Any] = {
    "Sigmoid": lambda op, value: op.call(aten.sigmoid.default, value),
    "LeakyRelu": lambda op, value: op.call(aten.leaky_relu.default, value, op.attributes.number("alpha", 0.01)),
    "Softmax": _softmax,
    "AveragePool": average_pool,
    "GlobalAveragePool": lambda op, value: op.call(aten.mean.dim, value, list(range(2, value.ndim)), True),
}


@operator("com.microsoft.QEmbedLayerNormalization")
def embedding(
    op: Operation, ids: Present, segments: Value, words: Present, positions: Present, segment_rows: Value,
    weight: Present, bias: Present, mask: Value, words_scale: Present, positions_scale: Present, segment_scale: Value,
    weight_scale: Present, bias_scale: Present, words_zero: Present, positions_zero: Present, segment_zero: Value,
    weight_zero: Present, bias_zero: Present,
) -> Any:  # fmt: skip
    """The operator on numbers with all tables and both weights as codes."""
    rows = [
        dequantized(op, words, words_scale, words_zero),
        dequantized(op, positions, positions_scale, positions_zero),
    ]
    third = None
    if segment_rows is not None and segment_scale is not None:
        third = dequantized(op, segment_rows, segment_scale, segment_zero)
    norm = [dequantized(op, weight, weight_scale, weight_zero), dequantized(op, bias, bias_scale, bias_zero)]
    return embedding_layer_norm(op, ids, segments, rows[0], rows[1], third, norm[0], norm[1], mask)


@operator("com.microsoft.GatherBlockQuantized")
def gather_rows(op: Operation, data: Present, index: Present, scales: Present, zeros: Present | None = None) -> Tensor:
    """Rows of a table [M, K] of codes with one scale for `block_size` columns, two or more codes a byte."""
    bits, block = op.attributes.integer("bits", 4), op.attributes.integer("block_size", 128)
    axes = op.attributes.integer("gather_axis"), op.attributes.integer("quantize_axis", 1)
    held = held_tensor(op, data)
    if held is None or held.ndim != 2 or axes[0] != 0 or axes[1] not in (1, -1) or data.dtype != torch.uint8:
        raise op.refuse(
            "it is only imported for an initializer of uint8 with two axes, gather_axis 0 and quantize_axis 1; "
            "quantize the embedding that way"
        )
    if bits not in (2, 4, 8) or block < 1:
        raise op.refuse(f"blocks of {block} of {bits} bits are not imported; use 2, 4 or 8 bits")
    rows, name = held.shape[0], f"{data.node.target}_codes" if isinstance(data, Tensor) else "codes"
    table = _held(op, name, unpacked(held, bits))
    blocks = scales.shape[1]
    packed = torch.full((rows, blocks), 1 << (bits - 1), dtype=torch.uint8) if zeros is None else held_tensor(op, zeros)
    if packed is None:
        raise op.refuse("zero points that are computed are not imported; make them an initializer")
    if zeros is not None:
        packed = unpacked(packed, bits)[:, :blocks].contiguous()
    numbers = dequantized(op, table, scales, _held(op, f"{name}_zero", packed), 1, block, None, (0, 2**bits - 1))
    return gather(op, numbers, index)


@operator("com.microsoft.QGemm")
def gemm(
    op: Operation, a: Present, a_scale: Present, a_zero: Present, b: Present, b_scale: Present, b_zero: Present,
    c: Value = None, scale: Value = None, zero: Value = None,
) -> Tensor:  # fmt: skip
    """alpha * A B + C, where C counts in steps of alpha * a_scale * b_scale; numbers where no scale is given."""
    alpha = op.attributes.number("alpha", 1.0)
    turned = bool(op.attributes.integer("transB"))
    left = dequantized(op, a, a_scale, a_zero)
    left = op.call(aten.permute.default, left, [1, 0]) if op.attributes.integer("transA") else left
    right = dequantized(op, b, b_scale, b_zero, axis=0 if turned else 1)
    result = op.call(aten.linear.default, left, right) if turned else matmul(op, left, right)
    if alpha != 1:
        result = op.call(aten.mul.Tensor, result, alpha)
    if c is not None:
        steps = product_of(op, a_scale, b_scale)
        steps = steps if alpha == 1 else product_of(op, steps, known(alpha, torch.float32))
        result = op.call(aten.add.Tensor, result, dequantized(op, c, steps, None, axis=-1))
    return result if scale is None else quantized(op, result, scale, zero, dtype=a.dtype)


@operator("com.microsoft.MatMulIntegerToFloat")
def matmul_to_float(
    op: Operation, a: Present, b: Present, a_scale: Present, b_scale: Present, a_zero: Value = None,
    b_zero: Value = None, bias: Value = None,
) -> Tensor:  # fmt: skip
    left, right = dequantized(op, a, a_scale, a_zero), dequantized(op, b, b_scale, b_zero, axis=-1)
    return _plus(op, matmul(op, left, right), bias)


@operator("com.microsoft.DynamicQuantizeMatMul")
def dynamic_matmul(
    op: Operation, a: Present, b: Present, b_scale: Present, b_zero: Value = None, bias: Value = None
) -> Tensor:
    codes, scale, zero = dynamically_quantized(op, op.tensor(a))
    left, right = dequantized(op, codes, scale, zero), dequantized(op, b, b_scale, b_zero, axis=-1)
    return _plus(op, matmul(op, left, right), bias)


def _plus(op: Operation, value: Tensor, bias: Value) -> Tensor:
    return value if bias is None else op.call(aten.add.Tensor, value, op.tensor(bias))


@operator("com.microsoft.MatMulNBits")
def matmul_of_few_bits(
    op: Operation, a: Present, codes: Present, scales: Present, zeros: Value = None, groups: Value = None,
    bias: Value = None,
) -> Tensor:  # fmt: skip
    """A linear layer whose weight [N, K] has one scale for `block_size` columns of a row.

    Codes lie in bytes [N, blocks, bytes], the first in the lowest bits; so do zero points [N, bytes], which are half
    of the codes' range where left out and may also be floating. The product is computed in the type of A, whatever
    precision `accuracy_level` would allow.
    """
    op.attributes.ignore("accuracy_level")
    bits, block = op.attributes.integer("bits", 4), op.attributes.integer("block_size")
    rows, columns = op.attributes.integer("N"), op.attributes.integer("K")
    if bits not in (2, 4, 8) or block < 1 or rows < 1 or columns < 1:
        raise op.refuse(f"MatMulNBits of {rows}x{columns} in blocks of {block} of {bits} bits is not imported")
    held = held_tensor(op, codes)
    if held is None:
        raise op.refuse("MatMulNBits with a weight that is computed is not imported; make it an initializer")
    blocks = -(-columns // block)
    name = f"{codes.node.target}_codes" if isinstance(codes, Tensor) else "codes"
    unpacked_codes = unpacked(held.reshape(rows, -1), bits)[:, :columns]
    if groups is not None:
        order = _order(op, groups, columns, block, plain=bits == 4 and zeros is None)
        a = op.call(aten.index_select.default, op.tensor(a), -1, _held(op, f"{name}_order", order))
        unpacked_codes = unpacked_codes[:, order]
    weight = _held(op, name, unpacked_codes.contiguous())
    scales = _shaped(op, scales, rows, blocks)
    if zeros is None:
        zeros = _held(op, f"{name}_zero", torch.full((rows, blocks), 1 << (bits - 1), dtype=torch.uint8))
    elif zeros.dtype == torch.uint8:
        packed = held_tensor(op, zeros)
        if packed is None:
            raise op.refuse("MatMulNBits with zero points that are computed is not imported")
        zeros = _held(op, f"{name}_zero", unpacked(packed.reshape(rows, -1), bits)[:, :blocks].contiguous())
    else:
        zeros = _shaped(op, zeros, rows, blocks)
    right = dequantized(op, weight, scales, zeros, 1, block, a.dtype, (0, 2**bits - 1))
    added = () if bias is None else (op.tensor(bias),)
    return op.call(aten.linear.default, a, right, *added)


def _order(op: Operation, groups: Present, columns: int, block: int, *, plain: bool) -> torch.Tensor:
    """The columns sorted by `groups`, g_idx [K], so that the block of a column is the group that it had."""
    held = held_tensor(op, groups)
    order = torch.zeros(0) if held is None else torch.argsort(held, stable=True)
    if held is None or not plain or not torch.equal(held[order].long(), torch.arange(columns) // block):
        raise op.refuse(
            "g_idx is only imported with 4 bits, without zero points and with block_size columns in every group; "
            "quantize the model without an order of activations"
        )
    return order


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes in the bytes of each row, the first in the lowest bits."""
    each = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(each, -1).reshape(packed.shape[0], -1)


def _held(op: Operation, name: str, value: torch.Tensor) -> Tensor:
    return op.emitter.attribute(op.emitter.weights.add(name, value, trainable=False))


def _shaped(op: Operation, value: Present, rows: int, blocks: int) -> Tensor:
    held = held_tensor(op, value)
    if tuple(value.shape) == (rows, blocks):
        return op.tensor(value)
    if held is None:
        return op.reshape(value, [rows, blocks])
    name = str(value.node.target) if isinstance(value, Tensor) else "scales"
    target = op.emitter.weights.add(f"{name}_rows", held.reshape(rows, blocks), trainable=True)
    return op.emitter.attribute(target)
