"""Instructions for products of integers, as functions in LLVM's own language: `instructions` says how they get there.

`multiply_quads` adds to each int32 of a vector the four products of unsigned and signed bytes of one 32-bit word each:
VPDPBUSD, which does not saturate (Intel SDM volume 2). `multiply_words` adds the two products of signed 16-bit halves:
VPMADDWD and an addition, exact for operands of 9 bits (VPMADDUBSW, which multiplies bytes, saturates its sums and is
not used). Where the code is for a CPU without an instruction, the same sums are made of shifts and products of lanes.
Sums wrap around at 32 bits everywhere.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from graphopt.backends.target import Target

_WIDE, _HALF = ("x86-64-v4",), ("x86-64-v3", "x86-64-v4")


def multiply_quads(total: Any, left: Any, right: Any, lanes: int) -> Any:
    """total + the products of the bytes of `left`, unsigned, and of `right`, signed; vectors int32, uint32, uint32."""
    return tirx.call_pure_extern(f"int32x{lanes}", "graphopt_multiply_quads", total, left, right)


def multiply_words(total: Any, left: Any, right: Any, lanes: int) -> Any:
    """total + the products of the signed halves of `left` and `right`; vectors int32, uint32, uint32."""
    return tirx.call_pure_extern(f"int32x{lanes}", "graphopt_multiply_words", total, left, right)


def integer_definitions(target: Target) -> str:
    """The functions for `target` in LLVM's language."""
    if target.quads:
        return _native_quads(target.lanes) if "avx512vnni" in target.extensions else _plain(target.lanes, "quads")
    native = target.architecture in {16: _WIDE, 8: _HALF}.get(target.lanes, ())
    return _native_words(target.lanes) if native else _plain(target.lanes, "words")


def _native_quads(lanes: int) -> str:
    vector = f"<{lanes} x i32>"
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    return (
        f"declare {vector} @{name}({vector}, {vector}, {vector})\n"
        f"{_signature('quads', lanes)}"
        f"  %sum = call {vector} @{name}({vector} %total, {vector} %left, {vector} %right)\n"
        f"  ret {vector} %sum\n}}\n"
    )


def _native_words(lanes: int) -> str:
    vector, halves = f"<{lanes} x i32>", f"<{2 * lanes} x i16>"
    name = "llvm.x86.avx512.pmaddw.d.512" if lanes == 16 else "llvm.x86.avx2.pmadd.wd"
    return (
        f"declare {vector} @{name}({halves}, {halves})\n"
        f"{_signature('words', lanes)}"
        f"  %a = bitcast {vector} %left to {halves}\n"
        f"  %b = bitcast {vector} %right to {halves}\n"
        f"  %products = call {vector} @{name}({halves} %a, {halves} %b)\n"
        f"  %sum = add {vector} %total, %products\n"
        f"  ret {vector} %sum\n}}\n"
    )


def _plain(lanes: int, kind: str) -> str:
    """Part after part of a word, shifted to the top of its lane and down again, by its sign where it has one."""
    vector, bits = f"<{lanes} x i32>", 8 if kind == "quads" else 16
    unsigned = "lshr" if kind == "quads" else "ashr"
    lines, total = [], "%total"
    for number in range(32 // bits):
        up, down = f"splat (i32 {32 - bits * (number + 1)})", f"splat (i32 {32 - bits})"
        lines += [
            f"%au{number} = shl {vector} %left, {up}",
            f"%a{number} = {unsigned} {vector} %au{number}, {down}",
            f"%bu{number} = shl {vector} %right, {up}",
            f"%b{number} = ashr {vector} %bu{number}, {down}",
            f"%ab{number} = mul {vector} %a{number}, %b{number}",
            f"%sum{number} = add {vector} {total}, %ab{number}",
        ]
        total = f"%sum{number}"
    return _signature(kind, lanes) + "".join(f"  {line}\n" for line in lines) + f"  ret {vector} {total}\n}}\n"


def _signature(kind: str, lanes: int) -> str:
    vector = f"<{lanes} x i32>"
    return f"define {vector} @graphopt_multiply_{kind}({vector} %total, {vector} %left, {vector} %right) {{\n"
