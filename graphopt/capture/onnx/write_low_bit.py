"""How products with weights in few bits are written in ONNX: activations as codes and back, then MatMulNBits.

    x -> (rounded to int8 in groups) -> DequantizeLinear -> com.microsoft MatMulNBits, or MatMul by spelled-out weights

MatMulNBits takes codes of 2, 4 or 8 bits in blocks of a power of two, with whole or floating zero points; narrower ones
go into the next of them. At accuracy level 4 ONNX Runtime rounds what it multiplies to int8 in the same blocks, which
gives the same codes again. Other groups, and codebooks, are written out with standard operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnx import defs, numpy_helper
from onnxscript import opset21 as op
from onnxscript import values

from graphopt.errors import UsageError
from graphopt.low_bit.bits import packed

DOMAIN, NAME = "com.microsoft", "MatMulNBits"
_LARGEST = 127.0
_LEAST_BLOCK = 16
_INT8_LEVEL = 4  # of accuracy: A is rounded to int8
_WIDTHS = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


def _schema() -> Any:
    """The operator as ONNX Runtime declares it, for floats."""
    input_, attribute = defs.OpSchema.FormalParameter, defs.OpSchema.Attribute
    optional, whole = defs.OpSchema.FormalParameterOption.Optional, defs.OpSchema.AttrType.INT
    return defs.OpSchema(
        NAME,
        DOMAIN,
        1,
        inputs=[
            input_("A", "T"),
            input_("B", "C"),
            input_("scales", "T"),
            *(input_(name, kind, param_option=optional) for name, kind in (("zero_points", "T"), ("g_idx", "I"))),
            input_("bias", "T", param_option=optional),
        ],
        outputs=[input_("Y", "T")],
        type_constraints=[
            *(("T", ["tensor(float)"], ""), ("C", ["tensor(uint8)"], ""), ("I", ["tensor(int32)"], "")),
        ],
        attributes=[attribute(name, whole, required=True) for name in ("K", "N", "bits", "block_size")]
        + [attribute("accuracy_level", whole, required=False)],
    )


_MATMUL = values.Op(values.Opset(DOMAIN, 1), NAME, _schema())


def _lut_build(x: Any, group: int, table: str = "exact") -> Any:
    if table != "exact":
        raise UsageError("graphopt::lut_build of tables has no ONNX form; write what lut-matmul{table=exact} makes")
    columns, last = int(x.shape[-1]), len(x.shape) - 1
    group = min(group, columns)
    count = -(-columns // group)
    if x.dtype != onnx_ir.DataType.FLOAT:
        x = op.Cast(x, to=onnx_ir.DataType.FLOAT)
    if columns % group:
        x = op.Pad(x, _ints(*[0] * (2 * last + 1), -columns % group))
    rows = op.Reshape(x, _ints(*[0] * last, count, group))
    scale = op.Div(op.ReduceMax(op.Abs(rows), _ints(last + 1), keepdims=0), op.Constant(value_float=_LARGEST))
    steps = op.Where(op.Greater(scale, op.Constant(value_float=0.0)), scale, op.Constant(value_float=1.0))
    whole = op.Round(op.Div(rows, op.Unsqueeze(steps, _ints(last + 1))))
    whole = op.Clip(whole, op.Constant(value_float=-_LARGEST), op.Constant(value_float=_LARGEST))
    sums = op.Cast(op.ReduceSum(whole, _ints(last + 1), keepdims=0), to=onnx_ir.DataType.INT32)
    flat = op.Reshape(whole, _ints(*[0] * last, count * group))
    if columns % group:
        flat = op.Slice(flat, _ints(0), _ints(columns), _ints(last))
    return op.Cast(flat, to=onnx_ir.DataType.INT8), scale, sums


def _product(
    codes: Any, scale: Any, sums: Any, weight: Any, weight_scale: Any, weight_zero: Any = None, codebook: Any = None,
    bias: Any = None, bits: int = 4, group: int = 128, table: str = "exact", kernel: str = "auto", tag: Any = None,
) -> Any:  # fmt: skip
    if table != "exact":
        raise UsageError("products of tables have no ONNX form; write what lut-matmul{table=exact} makes")
    rows, columns = (int(size) for size in weight.shape)
    x = op.DequantizeLinear(codes, scale, axis=len(codes.shape) - 1, block_size=group)
    block = group if columns > group else max(_LEAST_BLOCK, 1 << (columns - 1).bit_length())
    if codebook is None and weight_zero is not None and block >= _LEAST_BLOCK and not block & (block - 1):
        sizes = {"K": columns, "N": rows, "bits": _WIDTHS[bits], "block_size": block}
        return _MATMUL(x, weight, weight_scale, weight_zero, None, bias, accuracy_level=_INT8_LEVEL, **sizes)
    numbers = _numbers(weight, codebook, tag, bits, group)
    if weight_zero is not None:
        numbers = op.Sub(numbers, _spread(weight_zero, group, columns))
    numbers = op.Mul(numbers, _spread(weight_scale, group, columns))
    found = op.MatMul(x, op.Transpose(numbers, perm=[1, 0]))
    return found if bias is None else op.Add(found, bias)


def _numbers(weight: Any, codebook: Any, tag: Any, bits: int, group: int) -> Any:
    """What codes [N, K] stand for, as floats."""
    if codebook is None:
        return op.Cast(weight, to=onnx_ir.DataType.FLOAT)
    index = op.Cast(weight, to=onnx_ir.DataType.INT64)
    if tag is not None:
        chosen = _spread(op.Cast(tag, to=onnx_ir.DataType.INT64), group, int(weight.shape[1]), tag.shape)
        index = op.Add(index, op.Mul(chosen, op.Constant(value_int=1 << bits)))
        codebook = op.Reshape(codebook, _ints(-1))
    return op.Gather(op.Cast(codebook, to=onnx_ir.DataType.FLOAT), index)


def _spread(parameter: Any, group: int, columns: int, shape: Any = None) -> Any:
    """A parameter of groups [N, G] for each column."""
    rows, count = (int(size) for size in (parameter.shape if shape is None else shape))
    each = op.Expand(op.Unsqueeze(parameter, _ints(2)), _ints(rows, count, group))
    return op.Slice(op.Reshape(each, _ints(rows, count * group)), _ints(0), _ints(columns), _ints(1))


def _ints(*numbers: int) -> Any:
    return op.Constant(value_ints=list(numbers))


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.graphopt.lut_build.default: _lut_build,
    torch.ops.graphopt.lut_gemv.default: _product,
    torch.ops.graphopt.wq_gemm.default: _product,
}


def pack_weights(graph: Any) -> None:
    """Codes and whole zero points of every MatMulNBits of a graph, packed as the operator wants them."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    done: set[str] = set()
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                pack_weights(attribute.g)
        if node.domain != DOMAIN or node.op_type != NAME or node.input[1] not in tensors:
            continue
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        for name, pack in ((node.input[1], _packed_codes), (node.input[3], _packed_zeros)):
            if name in tensors and name not in done:
                done.add(name)
                value = pack(numpy_helper.to_array(tensors[name]), sizes["bits"], sizes["block_size"])
                tensors[name].CopyFrom(numpy_helper.from_array(value, name))
    kept = [value for value in graph.value_info if value.name not in done]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _packed_codes(codes: np.ndarray, bits: int, block: int) -> np.ndarray:
    """uint8 [N, blocks, bytes] of [N, K]."""
    rows, columns = codes.shape
    count = -(-columns // block)
    padded = np.pad(codes, ((0, 0), (0, count * block - columns)))
    return packed(torch.from_numpy(padded), bits).reshape(rows, count, block * bits // 8)


def _packed_zeros(zeros: np.ndarray, bits: int, block: int) -> np.ndarray:
    """uint8 [N, bytes] where all are whole numbers of so many bits; else as they are."""
    whole = zeros.clip(0, (1 << bits) - 1).astype(np.uint8)
    if not np.array_equal(whole, zeros):
        return zeros
    padded = np.pad(whole, ((0, 0), (0, -zeros.shape[1] % (8 // bits))))
    return packed(torch.from_numpy(padded), bits).reshape(len(zeros), -1)
