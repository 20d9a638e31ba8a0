"""Instructions that turn numbers into codes and put codes in order, as functions in LLVM's own language.

`round_whole` puts one instruction that rounds float32 to the nearest int32, ties to even, in the place of a rounding
and a conversion; numbers beyond int32 become anything. `pack_codes` narrows vectors of int32 to bytes: VPACKSSDW and
VPACKUSWB or VPACKSSWB saturate, which takes the place of a clip, and one VPERMD puts the bytes in order. `turned` and
`joined` interleave bytes of several vectors in words.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from graphopt.backends.target import Target

_WIDE = ("x86-64-v4",)
_ROUNDED = (1, 2, 4, 8, 16)  # lanes of vectors that are rounded
PACKED = (4, 2)  # vectors whose int32 become bytes at once
PACKED_LANES = 16  # of each of them


def pack_codes(vectors: list[Any], dtype: str) -> Any:
    """int32 of 2 or 4 vectors of 16 lanes as one vector of `dtype`, int8 or uint8, saturated."""
    name = f"graphopt_pack_{dtype}_{len(vectors)}"
    return tirx.call_pure_extern(f"{dtype}x{PACKED_LANES * len(vectors)}", name, *vectors)


def turned(codes: Any) -> Any:
    """64 bytes with words 0, 4, 8, 12, 1, 5 and so on beside each other: what `joined` takes from parts of 128 bits."""
    return tirx.call_pure_extern("uint8x64", "graphopt_turn", codes)


def beside(parts: list[Any]) -> Any:
    """2 or 4 vectors of bytes as one of 64."""
    return tirx.call_pure_extern("uint8x64", f"graphopt_beside_{len(parts)}", *parts)


def joined(a: Any, b: Any, unit: int, upper: int) -> Any:
    """Units of 1 or 2 bytes of two vectors in turn, of the lower or upper half of each 128 bits: VPUNPCK."""
    return tirx.call_pure_extern("uint8x64", f"graphopt_join_{unit}_{upper}", a, b)


@tirx.transform.prim_func_pass(opt_level=0)
def round_whole(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """What is rounded in float32 and cast to int32 becomes a call, once loops are vectors."""
    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.Cast, _whole)))


def _whole(cast: Any) -> Any:
    inner, kind = cast.value, tvm.DataType(str(cast.ty.dtype))
    if getattr(getattr(inner, "op", None), "name", "") != "tirx.round" or kind.lanes not in _ROUNDED:
        return cast
    if not str(cast.ty.dtype).startswith("int32") or not str(inner.ty.dtype).startswith("float32"):
        return cast
    return tirx.call_pure_extern(str(cast.ty.dtype), f"graphopt_whole_{kind.lanes}", inner.args[0])


def code_definitions(target: Target) -> str:
    """The functions for `target` in LLVM's language."""
    rounding = "".join(map(_rounding, _ROUNDED))
    interleaving = _interleaving(target.architecture in _WIDE) if target.lanes == PACKED_LANES and target.quads else ""
    return rounding + _packing(target) + interleaving


def _rounding(lanes: int) -> str:
    number, whole, suffix = "float", "i32", "i32.f32"
    if lanes > 1:
        number, whole, suffix = f"<{lanes} x float>", f"<{lanes} x i32>", f"v{lanes}i32.v{lanes}f32"
    return (
        f"declare {whole} @llvm.lrint.{suffix}({number})\n"
        f"define {whole} @graphopt_whole_{lanes}({number} %x) {{\n"
        f"  %whole = call {whole} @llvm.lrint.{suffix}({number} %x)\n"
        f"  ret {whole} %whole\n}}\n"
    )


def _packing(target: Target) -> str:
    if target.lanes != PACKED_LANES:
        return ""
    native = target.architecture in _WIDE
    parts = [_NARROWING if native else _CLIPPING]
    for dtype, count in ((dtype, count) for dtype in ("uint8", "int8") for count in PACKED):
        lines, result = (_packed if native else _clipped)(dtype, count)
        arguments = ", ".join(f"<16 x i32> %x{number}" for number in range(count))
        parts.append(f"define <{PACKED_LANES * count} x i8> @graphopt_pack_{dtype}_{count}({arguments}) {{\n")
        parts.append("".join(f"  {line}\n" for line in lines) + f"  ret <{PACKED_LANES * count} x i8> {result}\n}}\n")
    return "".join(parts)


_NARROWING = """
declare <32 x i16> @llvm.x86.avx512.packssdw.512(<16 x i32>, <16 x i32>)
declare <64 x i8> @llvm.x86.avx512.packuswb.512(<32 x i16>, <32 x i16>)
declare <64 x i8> @llvm.x86.avx512.packsswb.512(<32 x i16>, <32 x i16>)
"""
_CLIPPING = """
declare <16 x i32> @llvm.smax.v16i32(<16 x i32>, <16 x i32>)
declare <16 x i32> @llvm.smin.v16i32(<16 x i32>, <16 x i32>)
"""


def _packed(dtype: str, count: int) -> tuple[list[str], str]:
    """Each pack takes 128 bits of both operands in turn, so that words of four bytes come in columns of `count`."""
    lines = [
        f"%h{n} = call <32 x i16> @llvm.x86.avx512.packssdw.512(<16 x i32> %x{2 * n}, <16 x i32> %x{2 * n + 1})"
        for n in range(count // 2)
    ]
    pack = "packuswb" if dtype == "uint8" else "packsswb"
    second = "%h1" if count == 4 else "%h0"
    order = ", ".join(f"i32 {4 * (place % 4) + place // 4}" for place in range(4 * count))
    lines += [
        f"%bytes = call <64 x i8> @llvm.x86.avx512.{pack}.512(<32 x i16> %h0, <32 x i16> {second})",
        "%words = bitcast <64 x i8> %bytes to <16 x i32>",
        f"%ordered = shufflevector <16 x i32> %words, <16 x i32> poison, <{4 * count} x i32> <{order}>",
        f"%result = bitcast <{4 * count} x i32> %ordered to <{16 * count} x i8>",
    ]
    return lines, "%result"


def _clipped(dtype: str, count: int) -> tuple[list[str], str]:
    low, high = (0, 255) if dtype == "uint8" else (-128, 127)
    lines = []
    for n in range(count):
        lines += [
            f"%l{n} = call <16 x i32> @llvm.smax.v16i32(<16 x i32> %x{n}, <16 x i32> splat (i32 {low}))",
            f"%c{n} = call <16 x i32> @llvm.smin.v16i32(<16 x i32> %l{n}, <16 x i32> splat (i32 {high}))",
            f"%t{n} = trunc <16 x i32> %c{n} to <16 x i8>",
        ]
    joined, width = [f"%t{n}" for n in range(count)], 16
    while len(joined) > 1:
        order = ", ".join(f"i32 {place}" for place in range(2 * width))
        kind, pairs = f"<{width} x i8>", list(zip(joined[::2], joined[1::2], strict=True))
        joined = [f"%j{2 * width}_{n}" for n in range(len(pairs))]
        lines += [
            f"{name} = shufflevector {kind} {a}, {kind} {b}, <{2 * width} x i32> <{order}>"
            for name, (a, b) in zip(joined, pairs, strict=True)
        ]
        width *= 2
    return lines, joined[0]


def _places(order: Iterable[int]) -> str:
    return ", ".join(f"i32 {place}" for place in order)


def _interleaving(native: bool) -> str:
    """LLVM would merge these shuffles into twice as many, so that each is an instruction of its own."""
    kind, turned = "<64 x i8>", [4 * (word % 4) + word // 4 for word in range(16)]
    if native:
        order = f"<16 x i32> <{_places(turned)}>"
        turn = f'call {kind} asm "vpermd $1, $2, $0", "=v,v,v"({kind} %a, {order})'
    else:
        order = _places([4 * word + byte for word in turned for byte in range(4)])
        turn = f"shufflevector {kind} %a, {kind} poison, <64 x i32> <{order}>"
    parts = [f"define {kind} @graphopt_turn({kind} %a) {{\n  %turned = {turn}\n  ret {kind} %turned\n}}\n"]
    for unit, upper in ((unit, upper) for unit in (1, 2) for upper in (0, 1)):
        if native:
            name = f"vpunpck{'lh'[upper]}{'bw' if unit == 1 else 'wd'}"
            joined = f'call {kind} asm "{name} $2, $1, $0", "=v,v,v"({kind} %a, {kind} %b)'
        else:
            starts = [16 * part + 8 * upper + unit * place for part in range(4) for place in range(8 // unit)]
            order = _places([start + 64 * other + n for start in starts for other in range(2) for n in range(unit)])
            joined = f"shufflevector {kind} %a, {kind} %b, <64 x i32> <{order}>"
        parts.append(
            f"define {kind} @graphopt_join_{unit}_{upper}({kind} %a, {kind} %b) {{\n"
            f"  %joined = {joined}\n  ret {kind} %joined\n}}\n"
        )
    return "".join(parts) + _BESIDE


_BESIDE = f"""
define <64 x i8> @graphopt_beside_2(<32 x i8> %a, <32 x i8> %b) {{
  %all = shufflevector <32 x i8> %a, <32 x i8> %b, <64 x i32> <{_places(range(64))}>
  ret <64 x i8> %all
}}
define <64 x i8> @graphopt_beside_4(<16 x i8> %a, <16 x i8> %b, <16 x i8> %c, <16 x i8> %d) {{
  %ab = shufflevector <16 x i8> %a, <16 x i8> %b, <32 x i32> <{_places(range(32))}>
  %cd = shufflevector <16 x i8> %c, <16 x i8> %d, <32 x i32> <{_places(range(32))}>
  %all = shufflevector <32 x i8> %ab, <32 x i8> %cd, <64 x i32> <{_places(range(64))}>
  ret <64 x i8> %all
}}
"""
