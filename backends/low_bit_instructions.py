"""Instructions for weights of few bits, as functions in LLVM's own language: `instructions` says how they get there.

`multiply_low` adds to each int32 of a vector the four products of the bytes of one 32-bit word each, the left ones from
0 to 127, the right ones from -127 to 127. Where no instruction does that for all 8-bit numbers (`multiply_quads`),
VPMADDUBSW is exact for these: pairs of products are at most 2 * 127 * 127 < 32768. `multiply_signed` takes left bytes
from -128 to 127: their sign goes to the right one. NEON multiplies to 16 bits and adds neighbours twice.

`look_up_16` replaces each byte, below 16, by an entry of a table: VPSHUFB or TBL. `look_up_64` has tables of 64
entries: VPERMB of AVX512-VBMI.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from graphopt.backends.integer_instructions import multiply_quads, sums_of_parts
from graphopt.backends.target import Target

_AVX2, _WIDE = ("x86-64-v3", "x86-64-v4"), ("x86-64-v4",)


def multiply_low(target: Target, total: Any, left: Any, right: Any) -> Any:
    """total + the products of bytes; vectors of int32, uint32 and uint32."""
    if target.quads:
        return multiply_quads(total, left, right, target.lanes)
    return tirx.call_pure_extern(f"int32x{target.lanes}", "graphopt_multiply_low", total, left, right)


def multiply_signed(target: Target, total: Any, left: Any, right: Any) -> Any:
    """The same with signed left bytes, for targets whose `multiply_quads` takes no unsigned ones."""
    if target.quads:
        return multiply_quads(total, left, right, target.lanes)
    return tirx.call_pure_extern(f"int32x{target.lanes}", "graphopt_multiply_signed", total, left, right)


def look_up_16(codes: Any, table: Any, lanes: int) -> Any:
    """Entries for the bytes of a vector of uint32; `table` is the address of 16 bytes."""
    return tirx.call_pure_extern(f"uint32x{lanes}", "graphopt_look_up_16", codes, table)


def look_up_64(codes: Any, table: Any) -> Any:
    """Entries for the bytes, below 64, of 16 uint32; the table is 16 uint32 too."""
    return tirx.call_pure_extern("uint32x16", "graphopt_look_up_64", codes, table)


def low_bit_definitions(target: Target) -> str:
    """The functions for `target` in LLVM's language."""
    found = _look_up(target) + (_look_up_64(target) if target.lanes == 16 else "")
    if not target.quads:
        declaration, low, signed = _products(target)
        found += declaration + _function("low", target.lanes, low) + _function("signed", target.lanes, signed)
    return found


def _function(kind: str, lanes: int, body: str) -> str:
    vector = f"<{lanes} x i32>"
    begin = f"define {vector} @graphopt_multiply_{kind}({vector} %total, {vector} %left, {vector} %right) {{\n"
    return f"{begin}{body}  ret {vector} %sum\n}}\n"


def _products(target: Target) -> tuple[str, str, str]:
    """What is declared, and the lines that make `%sum` for left bytes without and with a sign."""
    lanes = target.lanes
    if target.architecture in {16: _WIDE, 8: _AVX2}.get(lanes, ()):
        return _pairs(lanes)
    if target.machine == "aarch64" and lanes == 4:
        return _neon()
    body = sums_of_parts(lanes, 8, "int8")
    return "", body, body


def _pairs(lanes: int) -> tuple[str, str, str]:
    bytes_, halves, words = f"<{4 * lanes} x i8>", f"<{2 * lanes} x i16>", f"<{lanes} x i32>"
    multiply, add = "llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"
    if lanes == 16:
        multiply, add = "llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"
    declaration = (  # `add` is declared for `multiply_words`, which the same targets have
        f"declare {halves} @{multiply}({bytes_}, {bytes_})\n"
        f"declare {bytes_} @llvm.abs.v{4 * lanes}i8({bytes_}, i1 immarg)\n"
    )
    cast = f"  %a = bitcast {words} %left to {bytes_}\n  %b = bitcast {words} %right to {bytes_}\n"

    def summed(left: str, right: str) -> str:
        return (
            f"  %pairs = call {halves} @{multiply}({bytes_} {left}, {bytes_} {right})\n"
            f"  %quads = call {words} @{add}({halves} %pairs, {halves} splat (i16 1))\n"
            f"  %sum = add {words} %total, %quads\n"
        )

    signed = (
        f"{cast}  %size = call {bytes_} @llvm.abs.v{4 * lanes}i8({bytes_} %a, i1 false)\n"
        f"  %below = icmp slt {bytes_} %a, zeroinitializer\n"
        f"  %other = sub {bytes_} zeroinitializer, %b\n"
        f"  %signed = select <{4 * lanes} x i1> %below, {bytes_} %other, {bytes_} %b\n"
    )
    return declaration, cast + summed("%a", "%b"), signed + summed("%size", "%signed")


def _neon() -> tuple[str, str, str]:
    half, products = "<8 x i8>", "<8 x i16>"
    lines = ["%a = bitcast <4 x i32> %left to <16 x i8>", "%b = bitcast <4 x i32> %right to <16 x i8>"]
    for number in range(2):
        order = ", ".join(f"i32 {8 * number + lane}" for lane in range(8))
        for name in "ab":
            lines.append(f"%{name}{number} = shufflevector <16 x i8> %{name}, <16 x i8> poison, <8 x i32> <{order}>")
        lines.append(
            f"%ab{number} = call {products} @llvm.aarch64.neon.smull.v8i16({half} %a{number}, {half} %b{number})"
        )
    lines += [
        f"%pairs = call {products} @llvm.aarch64.neon.addp.v8i16({products} %ab0, {products} %ab1)",
        f"%quads = call <4 x i32> @llvm.aarch64.neon.saddlp.v4i32.v8i16({products} %pairs)",
        "%sum = add <4 x i32> %total, %quads",
    ]
    declaration = (
        f"declare {products} @llvm.aarch64.neon.smull.v8i16({half}, {half})\n"
        f"declare {products} @llvm.aarch64.neon.addp.v8i16({products}, {products})\n"
        f"declare <4 x i32> @llvm.aarch64.neon.saddlp.v4i32.v8i16({products})\n"
    )
    body = "".join(f"  {line}\n" for line in lines)
    return declaration, body, body


def _look_up_64(target: Target) -> str:
    begin = (
        "define <16 x i32> @graphopt_look_up_64(<16 x i32> %codes, <16 x i32> %table) {\n"
        "  %c = bitcast <16 x i32> %codes to <64 x i8>\n"
        "  %t = bitcast <16 x i32> %table to <64 x i8>\n"
    )
    end = "  %result = bitcast <64 x i8> %found to <16 x i32>\n  ret <16 x i32> %result\n}\n"
    if "avx512vbmi" in target.extensions:
        name = "llvm.x86.avx512.permvar.qi.512"
        return (
            f"declare <64 x i8> @{name}(<64 x i8>, <64 x i8>)\n{begin}"
            f"  %found = call <64 x i8> @{name}(<64 x i8> %t, <64 x i8> %c)\n{end}"
        )
    return begin + _one_by_one(64, 64) + end


def _one_by_one(lanes: int, entries: int) -> str:
    """`%found`: entries of %t by number %c."""
    lines, before = "", "poison"
    for lane in range(lanes):
        lines += (
            f"  %c{lane} = extractelement <{lanes} x i8> %c, i32 {lane}\n"
            f"  %e{lane} = extractelement <{entries} x i8> %t, i8 %c{lane}\n"
            f"  %r{lane} = insertelement <{lanes} x i8> {before}, i8 %e{lane}, i32 {lane}\n"
        )
        before = f"%r{lane}"
    return lines.replace(f"%r{lanes - 1} =", "%found =")


def _look_up(target: Target) -> str:
    lanes = target.lanes
    bytes_, words = f"<{4 * lanes} x i8>", f"<{lanes} x i32>"
    begin = (
        f"define {words} @graphopt_look_up_16({words} %codes, ptr %table) {{\n"
        f"  %c = bitcast {words} %codes to {bytes_}\n"
        "  %t = load <16 x i8>, ptr %table, align 1\n"
    )
    end = f"  %result = bitcast {bytes_} %found to {words}\n  ret {words} %result\n}}\n"
    name = {(16, "x86_64"): "llvm.x86.avx512.pshuf.b.512", (8, "x86_64"): "llvm.x86.avx2.pshuf.b"}.get(
        (lanes, target.machine)
    )
    if name and target.architecture in {16: _WIDE, 8: _AVX2}[lanes]:
        order = ", ".join(f"i32 {lane % 16}" for lane in range(4 * lanes))
        return (
            f"declare {bytes_} @{name}({bytes_}, {bytes_})\n{begin}"
            f"  %all = shufflevector <16 x i8> %t, <16 x i8> poison, <{4 * lanes} x i32> <{order}>\n"
            f"  %found = call {bytes_} @{name}({bytes_} %all, {bytes_} %c)\n{end}"
        )
    if target.machine == "aarch64":
        return (
            f"declare <16 x i8> @llvm.aarch64.neon.tbl1.v16i8(<16 x i8>, <16 x i8>)\n{begin}"
            f"  %found = call <16 x i8> @llvm.aarch64.neon.tbl1.v16i8(<16 x i8> %t, <16 x i8> %c)\n{end}"
        )
    return begin + _one_by_one(4 * lanes, 16) + end
