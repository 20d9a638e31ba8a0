"""bfloat16 in kernels: 16 bits in memory, float32 numbers everywhere else.

Rules write kernels with bfloat16 as any other dtype. TVM's own legalisation of it fails on bound variables and loses
NaN, so every kernel is rewritten right after it is written: what is read is widened, which is exact; a cast to
bfloat16 rounds the float32 number to the nearest of 8 bits, ties to even, as PyTorch does, and so does arithmetic; what
is stored is the upper half of a rounded number. Buffers inside a kernel hold float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

BFLOAT16 = "bfloat16"
_ARITHMETIC = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div)
_CHOICES = (tirx.Max, tirx.Min, tirx.Select, tirx.Broadcast, tirx.Shuffle)
_MAGNITUDE, _INFINITY, _QUIET, _UPPER, _BELOW_HALF = 0x7FFFFFFF, 0x7F800000, 0x00400000, 0xFFFF0000, 0x7FFF


def in_float32(function: tirx.PrimFunc, native: bool = False) -> tirx.PrimFunc:
    """The function with float32 numbers in place of its bfloat16 ones; its arguments keep their dtype.

    `native`: rounding stays a cast to bfloat16 and back, for `instructions.round_natively`.
    """
    if not _occurs(function):
        return function
    numbers = _Numbers(function, _cast_back if native else rounded)
    callbacks = [
        (tirx.FloatImm, numbers.constant),
        (tirx.Var, numbers.variable),
        (tirx.Cast, numbers.cast),
        (_ARITHMETIC, numbers.arithmetic),
        (_CHOICES, numbers.choice),
        (tvm.ir.Call, numbers.call),
        (tvm.ir.TensorLoad, numbers.load),
        (tirx.BufferStore, numbers.store),
    ]
    return function.with_body(tvm_ffi.structural_map(function.body, callbacks))


def _occurs(function: tirx.PrimFunc) -> bool:
    """Whether anything is bfloat16: an argument, or what a number is cast to."""
    if any(map(_is_buffer, function.params)):
        return True
    found: list[bool] = []
    tvm_ffi.structural_walk(function.body, (tirx.Cast, lambda cast: found.append(_is_narrow(cast))))
    return any(found)


def rounded(x: Any) -> Any:
    """The float32 number rounded to one that bfloat16 has; NaN stays NaN. Numbers or whole vectors."""
    kind = str(x.ty.dtype)
    word, constant = _like("uint32", kind), _constants(kind, "uint32")
    variable = tirx.Var("exact", kind)
    bits = tirx.reinterpret(word, variable)
    nearest = bits + constant(_BELOW_HALF) + ((bits >> constant(16)) & constant(1))
    kept = tirx.Select((bits & constant(_MAGNITUDE)) > constant(_INFINITY), bits | constant(_QUIET), nearest)
    return tirx.Let(variable, x, tirx.reinterpret(kind, kept & constant(_UPPER)))


def _cast_back(x: Any) -> Any:
    kind = str(x.ty.dtype)
    return tirx.Cast(kind, tirx.Cast(_like(BFLOAT16, kind), x))


def _like(element: str, dtype: str) -> str:
    """`element` in as many lanes as `dtype` has."""
    lanes = tvm.DataType(dtype).lanes
    return element if lanes == 1 else f"{element}x{lanes}"


def _constants(dtype: str, element: str) -> Any:
    lanes = tvm.DataType(dtype).lanes

    def constant(value: int) -> Any:
        number = tirx.const(value, element)
        return number if lanes == 1 else tirx.Broadcast(number, lanes)

    return constant


def _loads(value: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(value, (tvm.ir.TensorLoad, found.append))
    return found


def _is_narrow(value: Any) -> bool:
    return isinstance(value.ty, tvm.ir.PrimType) and str(value.ty.dtype).startswith(BFLOAT16)


def _is_buffer(variable: Any) -> bool:
    return isinstance(variable.ty, tirx.BufferType) and str(variable.dtype) == BFLOAT16


class _Numbers:
    """The expressions and statements of one function, bottom up: what has a narrow type has wide operands by then."""

    def __init__(self, function: tirx.PrimFunc, rounded: Callable[[Any], Any]) -> None:
        self._rounded = rounded
        self._made: dict[Any, Any] = {parameter: parameter for parameter in function.params}
        self._inside: set[Any] = set()  # buffers that the body allocates
        tvm_ffi.structural_walk(function.body, (tirx.AllocBuffer, lambda each: self._inside.add(each.buffer)))

    def constant(self, value: Any) -> Any:
        return tirx.const(value.value, "float32") if _is_narrow(value) else value

    def variable(self, variable: Any) -> Any:
        """Buffers are variables too."""
        if variable not in self._made:
            self._made[variable] = self._wide(variable)
        return self._made[variable]

    def _wide(self, variable: Any) -> Any:
        if _is_narrow(variable):
            return tirx.Var(variable.name, _like("float32", str(variable.ty.dtype)))
        if not _is_buffer(variable):
            return variable
        dtype = "float32" if variable in self._inside else "uint16"
        return tirx.decl_buffer(variable.shape, dtype, variable.name, scope=variable.scope(), layout=None)

    def cast(self, cast: Any) -> Any:
        if _is_narrow(cast):
            return self._rounded(cast.value.astype(_like("float32", str(cast.ty.dtype))))
        return cast.value.astype(str(cast.ty.dtype))

    def arithmetic(self, node: Any) -> Any:
        return self._rounded(type(node)(node.a, node.b)) if _is_narrow(node) else node

    def choice(self, node: Any) -> Any:
        if not _is_narrow(node):
            return node
        if isinstance(node, tirx.Select):
            return tirx.Select(node.condition, node.true_value, node.false_value)
        if isinstance(node, tirx.Broadcast):
            return tirx.Broadcast(node.value, node.lanes)
        if isinstance(node, tirx.Shuffle):
            return tirx.Shuffle(node.vectors, node.indices)
        return type(node)(node.a, node.b)

    def call(self, call: Any) -> Any:
        if getattr(call.op, "name", "") == "tirx.address_of":
            return tirx.address_of(_loads(call.args[0])[0])
        if not _is_narrow(call):
            return call
        return tirx.call_intrin(_like("float32", str(call.ty.dtype)), call.op, *call.args)

    # Memory -----------------------------------------------------------------------------------------------------------
    def load(self, load: Any) -> Any:
        if not _is_narrow(load):
            return load
        value = tirx.BufferLoad(load.source, list(load.indices))
        if str(load.source.dtype) != "uint16":
            return value
        kind = str(value.ty.dtype)
        bits = value.astype(_like("uint32", kind)) << _constants(kind, "uint32")(16)
        return tirx.reinterpret(_like("float32", kind), bits)

    def store(self, store: Any) -> Any:
        value, kind = store.value, str(store.value.ty.dtype)
        if str(store.buffer.dtype) != "uint16" or not kind.startswith("float32"):
            return store
        bits = tirx.reinterpret(_like("uint32", kind), value) >> _constants(kind, "uint32")(16)
        return tirx.BufferStore(store.buffer, bits.astype(_like("uint16", kind)), list(store.indices))
