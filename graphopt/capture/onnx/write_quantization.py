"""How the quantizing operators of graphopt:: are written in ONNX, opset 21.

DequantizeLinear knows no tables, and DynamicQuantizeLinear one range for all; beyond that standard operators spell
them out, which gives the same numbers. Integer operators that `explicit_quantization` writes out do not come here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir
import torch
from onnxscript import opset21 as op

from graphopt.errors import UsageError
from graphopt.operators import dynamic_products, integer_elements  # noqa: F401
from graphopt.operators.quantization import CODES, along

OPSET = 21  # the first with blocks and 16 bits
_FLOATS = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
_BOUNDS = {getattr(onnx_ir.DataType, str(dtype).removeprefix("torch.").upper()): CODES[dtype] for dtype in CODES}


def _quantize(
    x: Any, scale: Any, zero_point: Any = None, axis: int | None = None, block: int = 0, qmin: int = 0, qmax: int = 0,
    dtype: int = 0, reciprocal: bool = False,
) -> Any:  # fmt: skip
    """`dtype` is ONNX's number of the type. Bounds within it are a Clip of the codes."""
    if reciprocal or x.dtype not in _FLOATS:
        raise UsageError("graphopt::quantize by a reciprocal, or of float64, has no ONNX form")
    if x.dtype != scale.dtype:
        x, scale = (op.Cast(side, to=onnx_ir.DataType.FLOAT) for side in (x, scale))
    if zero_point is not None and zero_point.dtype != dtype:
        zero_point = op.Cast(zero_point, to=dtype)
    at = 1 if axis is None else axis
    if zero_point is None:
        codes = op.QuantizeLinear(x, scale, axis=at, block_size=block, output_dtype=dtype)
    else:
        codes = op.QuantizeLinear(x, scale, zero_point, axis=at, block_size=block)
    if (qmin, qmax) == _BOUNDS[onnx_ir.DataType(dtype)]:
        return codes
    return op.Clip(codes, *(op.Cast(op.Constant(value_int=bound), to=dtype) for bound in (qmin, qmax)))


def _dequantize(
    x: Any, scale: Any, zero_point: Any = None, axis: int | None = None, block: int = 0, qmin: int = 0, qmax: int = 0,
    dtype: int = 0,
) -> Any:  # fmt: skip
    if dtype not in _FLOATS or (zero_point is not None and zero_point.dtype != x.dtype):
        return _spelled_out(x, scale, zero_point, axis, block, dtype)
    if scale.dtype != onnx_ir.DataType.FLOAT and scale.dtype != dtype:
        scale = op.Cast(scale, to=onnx_ir.DataType.FLOAT)
    given = (x, scale) if zero_point is None else (x, scale, zero_point)
    number = op.DequantizeLinear(*given, axis=1 if axis is None else axis, block_size=block)
    return number if scale.dtype == dtype else op.Cast(number, to=dtype)


def _spelled_out(x: Any, scale: Any, zero_point: Any, axis: int | None, block: int, dtype: int) -> Any:
    """Where DequantizeLinear does not have the types: to float64, or from a zero point of a type of its own."""
    if block:
        raise UsageError("graphopt::dequantize in blocks with floating zero points has no ONNX form")
    compute = dtype if dtype == onnx_ir.DataType.DOUBLE else onnx_ir.DataType.FLOAT
    shape = None if axis is None else op.Constant(value_ints=along(axis, len(x.shape)))
    floating = zero_point is not None and zero_point.dtype in (*_FLOATS, onnx_ir.DataType.DOUBLE)
    steps, zeros = (
        value if value is None or shape is None else op.Reshape(value, shape) for value in (scale, zero_point)
    )
    wide = op.Cast(x, to=compute if floating else onnx_ir.DataType.INT32)
    if zeros is not None:
        wide = op.Sub(wide, op.Cast(zeros, to=compute if floating else onnx_ir.DataType.INT32))
    number = op.Mul(op.Cast(wide, to=compute), op.Cast(steps, to=compute))
    return number if compute == dtype else op.Cast(number, to=dtype)


def _dequantize_lookup(codes: Any, table: Any, scale: Any, axis: int | None = None, block: int = 0) -> Any:
    numbers = op.Gather(table, op.Cast(codes, to=onnx_ir.DataType.INT32))
    if axis is None:
        return op.Mul(numbers, scale)
    if not block:
        return op.Mul(numbers, op.Reshape(scale, op.Constant(value_ints=along(axis, len(codes.shape)))))
    runs, size = [int(count) for count in scale.shape], int(codes.shape[axis])
    repeated = [*runs[: axis + 1], block, *runs[axis + 1 :]]
    spread = op.Expand(op.Unsqueeze(scale, _ints(axis + 1)), _ints(*repeated))
    spread = op.Reshape(spread, _ints(*runs[:axis], runs[axis] * block, *runs[axis + 1 :]))
    return op.Mul(numbers, op.Slice(spread, _ints(0), _ints(size), _ints(axis)))


def _dynamic_quantize(x: Any, axis: int | None = None) -> Any:
    if x.dtype != onnx_ir.DataType.FLOAT:
        raise UsageError("graphopt::dynamic_quantize of float64 has no ONNX form")
    if axis is None:
        return op.DynamicQuantizeLinear(x)
    nothing, top = op.Constant(value_float=0.0), op.Constant(value_float=255.0)
    low = op.Min(op.ReduceMin(x, _ints(axis), keepdims=1), nothing)
    width = op.Sub(op.Max(op.ReduceMax(x, _ints(axis), keepdims=1), nothing), low)
    scale = op.Where(op.Greater(width, nothing), op.Div(width, top), op.Constant(value_float=1.0))
    zero = op.Round(op.Clip(op.Div(op.Neg(low), scale), nothing, top))
    codes = op.Clip(op.Add(op.Round(op.Div(x, scale)), zero), nothing, top)
    byte = onnx_ir.DataType.UINT8
    return op.Cast(codes, to=byte), scale, op.Cast(zero, to=byte)


def _table256(x: Any, table: Any) -> Any:
    """Negative indices count from the end, so that the entries of negative codes stand there."""
    if x.dtype == onnx_ir.DataType.INT8:
        table = op.Concat(op.Slice(table, _ints(128), _ints(256)), op.Slice(table, _ints(0), _ints(128)), axis=0)
    return op.Gather(table, op.Cast(x, to=onnx_ir.DataType.INT32))


def _dynamic_qlinear(x: Any, x_scale: Any, x_zero_point: Any, weight: Any, weight_scale: Any, bias: Any = None) -> Any:
    """An integer product where x has one scale, which MatMulInteger asks for; else a product of numbers."""
    if len(x_scale.shape):
        by_row = {"axis": len(x.shape) - 1, "block_size": int(x.shape[-1])}
        rows = op.DequantizeLinear(x, x_scale, x_zero_point, **by_row)
        number = op.MatMul(rows, op.Transpose(op.DequantizeLinear(weight, weight_scale, axis=0), perm=[1, 0]))
    else:
        sums = op.MatMulInteger(x, op.Transpose(weight, perm=[1, 0]), x_zero_point)
        number = op.Mul(op.Cast(sums, to=onnx_ir.DataType.FLOAT), op.Mul(x_scale, weight_scale))
    return number if bias is None else op.Add(number, bias)


def _ints(*numbers: int) -> Any:
    return op.Constant(value_ints=list(numbers))


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.graphopt.quantize.default: _quantize,
    torch.ops.graphopt.dequantize.default: _dequantize,
    torch.ops.graphopt.dequantize_lookup.default: _dequantize_lookup,
    torch.ops.graphopt.dynamic_quantize.default: _dynamic_quantize,
    torch.ops.graphopt.dynamic_qlinear.default: _dynamic_qlinear,
    torch.ops.graphopt.table256.default: _table256,
}
