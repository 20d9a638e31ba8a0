"""Instructions that TVM has no words for, as functions in LLVM's own language that the compiler puts in their place.

TVM's code generator has no bfloat16, so numbers cross as integers: `multiply_pairs` adds the products of two pairs of
bfloat16, which are one 32-bit word, to a float32, and `round_lanes` gives the 16 bits of the nearest bfloat16. Where
the code is for a CPU without these instructions, as in a trial of another machine's kernels, the same functions are
float32 arithmetic in the same order: VDPBF16PS adds the product of the upper halves, then that of the lower ones, each
exact and each sum rounded to nearest even; denormals are zero (Intel SDM volume 2, VDPBF16PS and VCVTNEPS2BF16).
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from graphopt.backends.code_instructions import code_definitions
from graphopt.backends.integer_instructions import integer_definitions
from graphopt.backends.look_up_instructions import look_up_definitions
from graphopt.backends.low_bit_instructions import low_bit_definitions
from graphopt.backends.scalar_instructions import scalar_definitions
from graphopt.backends.table_instructions import table_definitions
from graphopt.backends.target import Target

_LANES = (1, 2, 4, 8, 16, 32)  # of vectors that are rounded
_PAIRS = 16  # lanes of the sums of one multiplication of pairs


def multiply_pairs(total: Any, left: Any, right: Any) -> Any:
    """total + products of the upper halves + products of the lower halves; vectors float32, uint32 and uint32."""
    return tirx.call_pure_extern(f"float32x{_PAIRS}", "graphopt_multiply_pairs", total, left, right)


def round_lanes(values: Any) -> Any:
    """The 16 bits of the nearest bfloat16 of each of `_PAIRS` float32, uint16."""
    return tirx.call_pure_extern(f"uint16x{_PAIRS}", f"graphopt_round_{_PAIRS}", values)


def as_pair(lower: Any, upper: Any) -> Any:
    """Two uint16 as one uint32; where they lie beside each other in memory LLVM reads them at once."""
    return lower.astype("uint32") | (upper.astype("uint32") << tirx.const(16, "uint32"))


@tirx.transform.prim_func_pass(opt_level=0)
def round_natively(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """What is cast to bfloat16 and back becomes a call of `round_lanes`, once loops are vectors."""
    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.Cast, _rounded)))


def _rounded(cast: Any) -> Any:
    inner = cast.value
    if not isinstance(inner, tirx.Cast) or not str(inner.ty.dtype).startswith("bfloat16"):
        return cast
    lanes = tvm.DataType(str(cast.ty.dtype)).lanes
    suffix = "" if lanes == 1 else f"x{lanes}"
    bits = tirx.call_pure_extern(f"uint16{suffix}", f"graphopt_round_{lanes}", inner.value)
    shift: Any = tirx.const(16, "uint32")
    word = bits.astype(f"uint32{suffix}") << (shift if lanes == 1 else tirx.Broadcast(shift, lanes))
    return tirx.reinterpret(f"float32{suffix}", word)


def definitions(target: Target) -> str:
    """The functions for `target` in LLVM's language."""
    if target.lanes == 1:
        return scalar_definitions() + code_definitions(target)
    integer = integer_definitions(target) + low_bit_definitions(target)
    integer += code_definitions(target) + table_definitions(target)
    integer = _declared_once(integer + look_up_definitions(target))
    if not target.pairs:
        return integer
    native = "avx512bf16" in target.extensions
    multiply = _NATIVE_MULTIPLY if native else _EXACT_MULTIPLY
    return integer + multiply + "".join(_round(lanes, native) for lanes in _LANES)


def _declared_once(text: str) -> str:
    """LLVM takes no second declaration of a function."""
    lines = text.splitlines()
    kept = dict.fromkeys(line for line in lines if line.startswith("declare "))
    return "\n".join([*kept, *(line for line in lines if line not in kept)]) + "\n"


_NATIVE_MULTIPLY = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)

define <16 x float> @graphopt_multiply_pairs(<16 x float> %total, <16 x i32> %left, <16 x i32> %right) {
  %a = bitcast <16 x i32> %left to <32 x bfloat>
  %b = bitcast <16 x i32> %right to <32 x bfloat>
  %sum = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %total, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %sum
}
"""
_EXACT_MULTIPLY = """
define <16 x float> @graphopt_multiply_pairs(<16 x float> %total, <16 x i32> %left, <16 x i32> %right) {
  %upper_left = and <16 x i32> %left, splat (i32 -65536)
  %upper_right = and <16 x i32> %right, splat (i32 -65536)
  %a = bitcast <16 x i32> %upper_left to <16 x float>
  %b = bitcast <16 x i32> %upper_right to <16 x float>
  %ab = fmul <16 x float> %a, %b
  %first = fadd <16 x float> %total, %ab
  %lower_left = shl <16 x i32> %left, splat (i32 16)
  %lower_right = shl <16 x i32> %right, splat (i32 16)
  %c = bitcast <16 x i32> %lower_left to <16 x float>
  %d = bitcast <16 x i32> %lower_right to <16 x float>
  %cd = fmul <16 x float> %c, %d
  %second = fadd <16 x float> %first, %cd
  ret <16 x float> %second
}
"""


def _round(lanes: int, native: bool) -> str:
    def of(kind: str) -> str:
        return kind if lanes == 1 else f"<{lanes} x {kind}>"

    def splat(value: int) -> str:
        return str(value) if lanes == 1 else f"splat (i32 {value})"

    begin = f"define {of('i16')} @graphopt_round_{lanes}({of('float')} %exact) {{\n"
    if native:
        return (
            f"{begin}  %near = fptrunc {of('float')} %exact to {of('bfloat')}\n"
            f"  %bits = bitcast {of('bfloat')} %near to {of('i16')}\n"
            f"  ret {of('i16')} %bits\n}}\n"
        )
    word, flag = of("i32"), of("i1")
    return (
        f"{begin}  %bits = bitcast {of('float')} %exact to {word}\n"
        f"  %last = lshr {word} %bits, {splat(16)}\n"
        f"  %odd = and {word} %last, {splat(1)}\n"
        f"  %half = add {word} %bits, {splat(0x7FFF)}\n"
        f"  %near = add {word} %half, %odd\n"
        f"  %quiet = or {word} %bits, {splat(0x00400000)}\n"
        f"  %nan = fcmp uno {of('float')} %exact, %exact\n"
        f"  %kept = select {flag} %nan, {word} %quiet, {word} %near\n"
        f"  %upper = lshr {word} %kept, {splat(16)}\n"
        f"  %result = trunc {word} %upper to {of('i16')}\n"
        f"  ret {of('i16')} %result\n}}\n"
    )
