"""Instructions for products of integers, as functions in LLVM's own language: `instructions` says how they get there.

`multiply_quads` adds to each int32 of a vector the four products of the bytes of one 32-bit word each, which are signed
on the right: VPDPBUSD, which does not saturate (Intel SDM volume 2), in the form of the target's vectors; USDOT and,
where the left bytes are signed too, SDOT (Arm ARM, FEAT_I8MM and FEAT_DotProd). `multiply_words` adds the two products
of signed 16-bit halves: VPMADDWD and an addition, exact for operands of 9 bits (VPMADDUBSW, which multiplies bytes,
saturates its sums and is not used), or SMLAL twice. Where the code is for a CPU without an instruction, the same sums
are made of products of lanes. Sums wrap around at 32 bits everywhere.

Vectors of four have functions for each lane of the left operand besides, since Arm's instructions multiply by one.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from graphopt.backends.target import Target

_WIDE, _HALF = ("x86-64-v4",), ("x86-64-v3", "x86-64-v4")
_NEON = 4  # lanes


def multiply_quads(total: Any, left: Any, right: Any, lanes: int, lane: int | None = None) -> Any:
    """total + the products of the bytes of `left`, of the type `Target.quads`, and of `right`, int8.

    Vectors int32, uint32 and uint32; with a number `lane` that one of `left` stands for all.
    """
    return tirx.call_pure_extern("int32" if lanes == 1 else f"int32x{lanes}", _name("quads", lane), total, left, right)


def multiply_words(total: Any, left: Any, right: Any, lanes: int, lane: int | None = None) -> Any:
    """total + the products of the signed halves of `left` and `right`, as `multiply_quads`."""
    return tirx.call_pure_extern(f"int32x{lanes}", _name("words", lane), total, left, right)


def _name(kind: str, lane: int | None) -> str:
    return f"graphopt_multiply_{kind}" + ("" if lane is None else f"_{lane}")


def integer_definitions(target: Target) -> str:
    """The functions for `target` in LLVM's language."""
    lanes, kind = target.lanes, "quads" if target.quads else "words"
    variants = [None, *range(lanes)] if lanes == _NEON else [None]
    if kind == "words" and lanes == _NEON and target.machine == "aarch64":
        bodies = {lane: _widening(lane) for lane in variants}
        declaration = "declare <4 x i32> @llvm.aarch64.neon.smull.v4i32(<4 x i16>, <4 x i16>)\n"
    else:
        declaration, body = _sums(target)
        bodies = {lane: _word(lanes, lane) + body for lane in variants}
    return declaration + "".join(_function(kind, lanes, *each) for each in bodies.items())


def _function(kind: str, lanes: int, lane: int | None, body: str) -> str:
    vector = f"<{lanes} x i32>"
    begin = f"define {vector} @{_name(kind, lane)}({vector} %total, {vector} %lanes, {vector} %right) {{\n"
    return f"{begin}{body}  ret {vector} %sum\n}}\n"


def _word(lanes: int, lane: int | None) -> str:
    """`%left`: the operand itself, or one lane of it in all."""
    vector = f"<{lanes} x i32>"
    chosen = ", ".join(f"i32 {number if lane is None else lane}" for number in range(lanes))
    return f"  %left = shufflevector {vector} %lanes, {vector} poison, {vector} <{chosen}>\n"


def _sums(target: Target) -> tuple[str, str]:
    """What is declared, and the lines that make `%sum` of `%total`, `%left` and `%right`."""
    lanes = target.lanes
    if target.quads:
        name = _quads_of(target)
        return _native_quads(lanes, name) if name else ("", sums_of_parts(lanes, 8, target.quads))
    if target.architecture in {16: _WIDE, 8: _HALF}.get(lanes, ()):
        return _native_words(lanes)
    return "", sums_of_parts(lanes, 16, "int16")


def _quads_of(target: Target) -> str | None:
    """What LLVM calls the instruction; None where the code is for a CPU without it."""
    name, extensions = f"llvm.x86.avx512.vpdpbusd.{32 * target.lanes}", set(target.extensions)
    found = {
        (16, "uint8"): (name, {"avx512vnni"}),
        (8, "uint8"): (name, {"avxvnni", "avx512vnni"}),
        (_NEON, "uint8"): ("llvm.aarch64.neon.usdot.v4i32.v16i8", {"i8mm"}),
        (_NEON, "int8"): ("llvm.aarch64.neon.sdot.v4i32.v16i8", {"dotprod"}),
    }
    name, having = found[target.lanes, str(target.quads)]
    return name if having & extensions else None


def _native_quads(lanes: int, name: str) -> tuple[str, str]:
    """Operands are words in the x86 instructions, bytes in those of Arm, whose last one may be a single lane."""
    vector = f"<{lanes} x i32>"
    operands = f"<{4 * lanes} x i8>" if lanes == _NEON else vector
    first, last = ("%b", "%a") if ".sdot." in name else ("%a", "%b")  # USDOT by lane is another, which LLVM finds
    return (
        f"declare {vector} @{name}({vector}, {operands}, {operands})\n",
        f"  %a = bitcast {vector} %left to {operands}\n"
        f"  %b = bitcast {vector} %right to {operands}\n"
        f"  %sum = call {vector} @{name}({vector} %total, {operands} {first}, {operands} {last})\n",
    )


def _native_words(lanes: int) -> tuple[str, str]:
    """LLVM would add products of two steps to each other first, and keep one of them for every sum until then."""
    vector, halves = f"<{lanes} x i32>", f"<{2 * lanes} x i16>"
    name = "llvm.x86.avx512.pmaddw.d.512" if lanes == 16 else "llvm.x86.avx2.pmadd.wd"
    return (
        f"declare {vector} @{name}({halves}, {halves})\n",
        f"  %a = bitcast {vector} %left to {halves}\n"
        f"  %b = bitcast {vector} %right to {halves}\n"
        f"  %products = call {vector} @{name}({halves} %a, {halves} %b)\n"
        f'  %sum = call {vector} asm "vpaddd $2, $0, $0", "=v,0,v"({vector} %total, {vector} %products)\n',
    )


def _widening(lane: int | None) -> str:
    """Lower halves times lower halves, then the upper ones; SMLAL multiplies by one lane, a half of one word."""
    lines, total = ["%halves = bitcast <4 x i32> %lanes to <8 x i16>"], "%total"
    for half, result in ((0, "%first"), (1, "%sum")):
        chosen = ", ".join(f"i32 {2 * (number if lane is None else lane) + half}" for number in range(4))
        lines += [
            f"%a{half} = shufflevector <8 x i16> %halves, <8 x i16> poison, <4 x i32> <{chosen}>",
            f"%down{half} = lshr <4 x i32> %right, splat (i32 {16 * half})",
            f"%b{half} = trunc <4 x i32> %down{half} to <4 x i16>",
            f"%ab{half} = call <4 x i32> @llvm.aarch64.neon.smull.v4i32(<4 x i16> %b{half}, <4 x i16> %a{half})",
            f"{result} = add <4 x i32> {total}, %ab{half}",
        ]
        total = result
    return "".join(f"  {line}\n" for line in lines)


def sums_of_parts(lanes: int, bits: int, left: str) -> str:
    """Part after part of a word, narrowed and widened again."""
    vector, narrow = f"<{lanes} x i32>", f"<{lanes} x i{bits}>"
    extend, lines, total = "zext" if left == "uint8" else "sext", [], "%total"
    for number in range(32 // bits):
        down = f"splat (i32 {bits * number})"
        for operand, name, widen in (("%left", "a", extend), ("%right", "b", "sext")):
            lines += [
                f"%{name}down{number} = lshr {vector} {operand}, {down}",
                f"%{name}part{number} = trunc {vector} %{name}down{number} to {narrow}",
                f"%{name}{number} = {widen} {narrow} %{name}part{number} to {vector}",
            ]
        following = "%sum" if number == 32 // bits - 1 else f"%sum{number}"
        lines += [
            f"%ab{number} = mul {vector} %a{number}, %b{number}",
            f"{following} = add {vector} {total}, %ab{number}",
        ]
        total = following
    return "".join(f"  {line}\n" for line in lines)
