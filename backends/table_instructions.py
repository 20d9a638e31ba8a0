"""Functions of one byte by a table of 256, a vector at a time, as functions in LLVM's own language.

AVX512-VBMI permutes bytes: two VPERMI2B look up 128 entries each for 64 codes, whose top bits choose. AVX512-BW
permutes words of 16 bits: it looks up pairs of entries by half the code, and the last bit chooses. NEON has TBL for 64
entries and TBX for another 64, which leaves what is beyond them. Other targets load entries one by one.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from graphopt.backends.target import Target

ENTRIES = 256
_BYTES = ("uint8", "int8")
_LANES = (4, 8, 16, 32, 64)  # of the vectors of codes that have a function


@tirx.transform.prim_func_pass(opt_level=0)
def look_up_natively(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """A vector of elements of 256 bytes that are only read becomes a call, once loops are vectors."""
    written: list[Any] = []
    tvm_ffi.structural_walk(function.body, (tirx.BufferStore, lambda store: written.append(store.buffer.data)))

    def called(load: Any) -> Any:
        found = _called(load)
        return load if found is None or any(load.source.data.same_as(data) for data in written) else found

    return function.with_body(tvm_ffi.structural_map(function.body, (tvm.ir.TensorLoad, called)))


def _called(load: Any) -> Any:
    """What stands for a vector of entries of a table; None for any other load."""
    buffer, index = load.source, load.indices[0]
    lanes = tvm.DataType(str(index.ty.dtype)).lanes
    whole = len(buffer.shape) == 1 and isinstance(buffer.shape[0], tirx.IntImm) and int(buffer.shape[0]) == ENTRIES
    apart = not isinstance(index, (tirx.Ramp, tirx.Broadcast))
    if not whole or str(buffer.dtype) not in _BYTES or lanes not in _LANES or not apart:
        return None
    cast = isinstance(index, tirx.Cast) and str(index.value.ty.dtype) == f"uint8x{lanes}"
    codes = index.value if cast else index.astype(f"uint8x{lanes}")
    start = tirx.address_of(tirx.BufferLoad(buffer, [tirx.const(0, "int32")]))
    return tirx.call_pure_extern(f"{buffer.dtype}x{lanes}", f"graphopt_table_{lanes}", codes, start)


def table_definitions(target: Target) -> str:
    """The functions for `target` in LLVM's language."""
    if target.machine == "aarch64":
        return _NEON + "".join(_widened(each, 16) if each < 16 else _halved(each) for each in _LANES if each != 16)
    if looks_up_one_by_one(target):
        return _plain(4) + "".join(map(_halved, _LANES[1:]))
    if "avx512vbmi" in target.extensions:
        return _BYTEWISE + "".join(_widened(each, 64) for each in _LANES[:-1])
    return _WORDWISE + "".join(map(_in_words, _LANES[:-1]))


def looks_up_one_by_one(target: Target) -> bool:
    """Whether no instruction looks up 256 entries."""
    return target.machine != "aarch64" and target.architecture != "x86-64-v4"


def _signature(lanes: int) -> str:
    return f"define <{lanes} x i8> @graphopt_table_{lanes}(<{lanes} x i8> %codes, ptr %table) {{\n"


def _order(count: int, whole: int, first: int = 0) -> str:
    """A shuffle's mask: `count` lanes from the first one on, then anything, up to `whole`."""
    numbers = [f"i32 {first + number}" if number < count else "i32 poison" for number in range(whole)]
    return f"<{whole} x i32> <{', '.join(numbers)}>"


def _widened(lanes: int, whole: int) -> str:
    """As the first lanes of the vector that is looked up at once."""
    return (
        f"{_signature(lanes)}"
        f"  %wide = shufflevector <{lanes} x i8> %codes, <{lanes} x i8> poison, {_order(lanes, whole)}\n"
        f"  %found = call <{whole} x i8> @graphopt_table_{whole}(<{whole} x i8> %wide, ptr %table)\n"
        f"  %result = shufflevector <{whole} x i8> %found, <{whole} x i8> poison, {_order(lanes, lanes)}\n"
        f"  ret <{lanes} x i8> %result\n}}\n"
    )


def _halved(lanes: int) -> str:
    half = lanes // 2
    lines = ""
    for number in range(2):
        order = _order(half, half, number * half)
        lines += (
            f"  %c{number} = shufflevector <{lanes} x i8> %codes, <{lanes} x i8> poison, {order}\n"
            f"  %r{number} = call <{half} x i8> @graphopt_table_{half}(<{half} x i8> %c{number}, ptr %table)\n"
        )
    joined = f"  %result = shufflevector <{half} x i8> %r0, <{half} x i8> %r1, {_order(lanes, lanes)}\n"
    return f"{_signature(lanes)}{lines}{joined}  ret <{lanes} x i8> %result\n}}\n"


def _plain(lanes: int) -> str:
    """Entry after entry."""
    lines = ""
    for n in range(lanes):
        before = "poison" if n == 0 else f"%r{n - 1}"
        lines += (
            f"  %c{n} = extractelement <{lanes} x i8> %codes, i32 {n}\n"
            f"  %i{n} = zext i8 %c{n} to i64\n"
            f"  %p{n} = getelementptr i8, ptr %table, i64 %i{n}\n"
            f"  %e{n} = load i8, ptr %p{n}\n"
            f"  %r{n} = insertelement <{lanes} x i8> {before}, i8 %e{n}, i32 {n}\n"
        )
    return f"{_signature(lanes)}{lines}  ret <{lanes} x i8> %r{lanes - 1}\n}}\n"


def _in_words(lanes: int) -> str:
    return (
        f"{_signature(lanes)}"
        f"  %words = zext <{lanes} x i8> %codes to <{lanes} x i16>\n"
        f"  %wide = shufflevector <{lanes} x i16> %words, <{lanes} x i16> poison, {_order(lanes, 32)}\n"
        f"  %found = call <32 x i16> @graphopt_table_words(<32 x i16> %wide, ptr %table)\n"
        f"  %few = shufflevector <32 x i16> %found, <32 x i16> poison, {_order(lanes, lanes)}\n"
        f"  %result = trunc <{lanes} x i16> %few to <{lanes} x i8>\n"
        f"  ret <{lanes} x i8> %result\n}}\n"
    )


def _parts(kind: str, bytes_each: int) -> str:
    """Loads of the table's parts %t0, %t1, ..."""
    return "".join(
        f"  %p{number} = getelementptr i8, ptr %table, i64 {number * bytes_each}\n"
        f"  %t{number} = load {kind}, ptr %p{number}, align 1\n"
        for number in range(ENTRIES // bytes_each)
    )


_BYTEWISE = f"""
declare <64 x i8> @llvm.x86.avx512.vpermi2var.qi.512(<64 x i8>, <64 x i8>, <64 x i8>)

{_signature(64)}{_parts("<64 x i8>", 64)}
  %low = call <64 x i8> @llvm.x86.avx512.vpermi2var.qi.512(<64 x i8> %t0, <64 x i8> %codes, <64 x i8> %t1)
  %high = call <64 x i8> @llvm.x86.avx512.vpermi2var.qi.512(<64 x i8> %t2, <64 x i8> %codes, <64 x i8> %t3)
  %upper = icmp slt <64 x i8> %codes, zeroinitializer
  %result = select <64 x i1> %upper, <64 x i8> %high, <64 x i8> %low
  ret <64 x i8> %result
}}
"""
_WORDWISE = f"""
declare <32 x i16> @llvm.x86.avx512.vpermi2var.hi.512(<32 x i16>, <32 x i16>, <32 x i16>)

define <32 x i16> @graphopt_table_words(<32 x i16> %codes, ptr %table) {{
{_parts("<32 x i16>", 64)}
  %pair = lshr <32 x i16> %codes, splat (i16 1)
  %low = call <32 x i16> @llvm.x86.avx512.vpermi2var.hi.512(<32 x i16> %t0, <32 x i16> %pair, <32 x i16> %t1)
  %high = call <32 x i16> @llvm.x86.avx512.vpermi2var.hi.512(<32 x i16> %t2, <32 x i16> %pair, <32 x i16> %t3)
  %upper = icmp ugt <32 x i16> %codes, splat (i16 127)
  %both = select <32 x i1> %upper, <32 x i16> %high, <32 x i16> %low
  %second = and <32 x i16> %codes, splat (i16 1)
  %odd = icmp ne <32 x i16> %second, zeroinitializer
  %shifted = lshr <32 x i16> %both, splat (i16 8)
  %entry = select <32 x i1> %odd, <32 x i16> %shifted, <32 x i16> %both
  %result = and <32 x i16> %entry, splat (i16 255)
  ret <32 x i16> %result
}}

{_signature(64)}
  %words = bitcast <64 x i8> %codes to <32 x i16>
  %even = and <32 x i16> %words, splat (i16 255)
  %odd = lshr <32 x i16> %words, splat (i16 8)
  %first = call <32 x i16> @graphopt_table_words(<32 x i16> %even, ptr %table)
  %second = call <32 x i16> @graphopt_table_words(<32 x i16> %odd, ptr %table)
  %upper = shl <32 x i16> %second, splat (i16 8)
  %both = or <32 x i16> %first, %upper
  %result = bitcast <32 x i16> %both to <64 x i8>
  ret <64 x i8> %result
}}
"""
_VECTORS = ", ".join(["<16 x i8>"] * 4)


def _lookup(name: str, first: int, codes: str) -> str:
    parts = ", ".join(f"<16 x i8> %t{number}" for number in range(first, first + 4))
    return f"@llvm.aarch64.neon.{name}.v16i8({parts}, <16 x i8> {codes})"


_NEON = (
    f"declare <16 x i8> @llvm.aarch64.neon.tbl4.v16i8({_VECTORS}, <16 x i8>)\n"
    f"declare <16 x i8> @llvm.aarch64.neon.tbx4.v16i8(<16 x i8>, {_VECTORS}, <16 x i8>)\n"
    f"{_signature(16)}{_parts('<16 x i8>', 16)}"
    f"  %r0 = call <16 x i8> {_lookup('tbl4', 0, '%codes')}\n"
    + "".join(
        f"  %c{n} = sub <16 x i8> %codes, splat (i8 {64 * n - (256 if n > 1 else 0)})\n"
        f"  %r{n} = call <16 x i8> "
        + _lookup("tbx4", 4 * n, f"%c{n}").replace("v16i8(", f"v16i8(<16 x i8> %r{n - 1}, ")
        + "\n"
        for n in range(1, 4)
    )
    + "  ret <16 x i8> %r3\n}\n"
)
