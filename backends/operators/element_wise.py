"""The common part of all element-wise operators: one expression over operands that broadcast to the result's index.

An operand is a value in memory, a lazy value, the result of a kernel being written, a number or a symbolic size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy
import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.approximations import is_nan
from graphopt.backends.dtypes import DTYPES
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Index, Lazy, Product, Value, View

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

Expression = Callable[..., Any]
_NARROW_FLOATS = ("float16", "bfloat16")
_NARROW_INTEGERS = {"int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32, "uint32": 32}


def element_wise(
    lowering: Lowering,
    node: Node,
    arguments: Sequence[Any],
    expression: Expression,
    compute: str | Sequence[str | None] | None = None,
) -> Lazy:
    """`expression` over `arguments` (nodes, numbers, sizes), converted to dtype `compute`, by default the node's own.

    `compute` may give one dtype for each argument, None meaning the default.
    """
    meta = node.meta["val"]
    shape, dtype = shape_of(meta), DTYPES[meta.dtype]
    each = [compute] * len(arguments) if compute is None or isinstance(compute, str) else list(compute)
    wanted = [computed_in(kind or dtype) for kind in each]
    operands = [operand(lowering, argument) for argument in arguments]
    tensors = tuple(o for o in operands if isinstance(o, (View, Lazy, Product)))

    def element(kernel: Kernel, index: Index) -> Any:
        loaded = [read(kernel, o, index, kind) for o, kind in zip(operands, wanted, strict=True)]
        return convert(expression(*loaded), dtype)

    flat = all(tensor.shape == shape or tensor.shape == () for tensor in tensors)
    sizes = tuple(o for o in operands if isinstance(o, sympy.Expr))
    return Lazy(shape, dtype, tensors, element, flat, sizes=sizes)


def operand(lowering: Lowering, argument: Any) -> Any:
    """What the argument is here; a constant of rank 0 is its number."""
    value = lowering.value(argument)
    if isinstance(value, torch.Tensor):
        return value.item() if value.dim() == 0 else lowering.weight(value)
    return value


def read(kernel: Kernel, value: Any, index: Index, dtype: str) -> Any:
    """One element of an operand in `dtype`."""
    if isinstance(value, sympy.Expr):
        return convert(kernel.size(value), dtype)
    if isinstance(value, (bool, int, float)):
        return constant(value, dtype)
    return convert(kernel.load(value, index), dtype)


def computed_in(dtype: str) -> str:
    """float16 and bfloat16 are computed in float32 and rounded after every operator, as PyTorch does."""
    return "float32" if dtype in _NARROW_FLOATS else dtype


def convert(value: Any, dtype: str) -> Any:
    """Cast as PyTorch does: any number that is not zero becomes True, floats wrap around in narrow integers."""
    have = str(value.ty.dtype)
    if have == dtype:
        return value
    if dtype == "bool":
        return not_equal(value, tirx.const(0, have))
    if have in _NARROW_FLOATS or dtype in _NARROW_FLOATS:
        return value.astype("float32").astype(dtype)
    if is_float(have) and dtype in _NARROW_INTEGERS and dtype != "int32":
        return value.astype("int64" if dtype == "uint32" else "int32").astype(dtype)
    return value.astype(dtype)


def cast(value: Any, dtype: str) -> Any:
    """The value in another dtype, computed where it is read."""
    if value.dtype == dtype:
        return value
    return Lazy(
        value.shape,
        dtype,
        (value,),
        lambda kernel, i: convert(kernel.load(value, i), dtype),
        flat=True,
        casts=True,
    )


def widened(lowering: Lowering, argument: Any) -> Value:
    """The operand, which is a node or a value, in the dtype it is computed in."""
    value = argument if isinstance(argument, (View, Lazy)) else lowering.tensor(argument)
    return cast(value, computed_in(value.dtype))


def constant(value: float, dtype: str) -> Any:
    """The number in `dtype`: floats are rounded to it, integers wrap around, as PyTorch's scalars do."""
    if dtype == "bool":
        return tirx.const(bool(value), "bool")
    if is_float(dtype):
        with np.errstate(over="ignore"):
            return tirx.const(float(np.dtype(dtype).type(value)), dtype)
    bits = _NARROW_INTEGERS.get(dtype, 64)
    whole = int(value) % 2**bits
    signed = not dtype.startswith("u")
    return tirx.const(whole - 2**bits if signed and whole >= 2 ** (bits - 1) else whole, dtype)


def not_equal(a: Any, b: Any) -> Any:
    """a != b, also where either is NaN: LLVM's comparison as TVM emits it is false there."""
    dtype = dtype_of(a)
    if dtype == "bool":  # LLVM cannot compare flags as such
        return tirx.NE(a.astype("uint8"), b.astype("uint8"))
    if dtype in _NARROW_FLOATS:
        a, b = a.astype("float32"), b.astype("float32")
    if not is_float(dtype):
        return tirx.NE(a, b)
    operands = [x for x in (a, b) if not isinstance(x, tirx.FloatImm)]
    return tirx.any(tirx.NE(a, b), *(is_nan(x) for x in operands))


def dtype_of(value: Any) -> str:
    return str(value.ty.dtype)


def like(value: Any, number: float) -> Any:
    """The number as a constant of the value's dtype."""
    return constant(number, dtype_of(value))


def is_float(dtype: str) -> bool:
    return "float" in dtype


def library(name: str) -> Expression:
    """A function of the C library, which LLVM has no intrinsic for."""

    def expression(*values: Any) -> Any:
        dtype = dtype_of(values[0])
        return tirx.call_pure_extern(dtype, name if dtype == "float64" else f"{name}f", *values)

    return expression
