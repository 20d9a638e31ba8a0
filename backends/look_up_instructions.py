"""Look-ups of half bytes whose finds are summed, as functions in LLVM's language; see `instructions`.

A byte of the codes belongs to one output; its lower half is an index into one table of 16 bytes, the upper half one
into a second table, the same two for all outputs. VPSHUFB and TBL look a vector of halves up. `add_found` widens what
both found and adds it to sums of 16 bits: VPUNPCKxBW and VPMADDUBSW with ones, which is exact for a pair of bytes
(twice 127), or SADDL. `add_small` takes two vectors of codes and four tables with entries from -32 to 31: four such sum
up in a byte.

Unpacking mixes outputs within 128 bits: sums lie as `_position` says, and `widened` gives a vector of them in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tvm import tirx

from graphopt.backends.target import Target

MOST_FOUND = 128  # pairs of bytes whose sum fits 16 bits: 128 * 2 * 127 < 32768
_SHUFFLES = {8: ("x86-64-v3", "x86-64-v4"), 16: ("x86-64-v4",)}  # lanes -> architectures with VPSHUFB of such vectors
_NAMES = {  # of VPSHUFB and VPMADDUBSW
    8: ("llvm.x86.avx2.pshuf.b", "llvm.x86.avx2.pmadd.ub.sw"),
    16: ("llvm.x86.avx512.pshuf.b.512", "llvm.x86.avx512.pmaddubs.w.512"),
}


def add_found(total: Any, codes: Any, tables: Any, lanes: int) -> Any:
    """total int16 [4 lanes] + the entries for both halves of each byte of `codes`; `tables`: the address of two."""
    return tirx.call_pure_extern(f"int16x{4 * lanes}", "graphopt_add_found", total, codes, tables)


def add_small(total: Any, codes: Any, more: Any, tables: Any, lanes: int) -> Any:
    """The same of two vectors of codes and four tables of entries from -32 to 31."""
    return tirx.call_pure_extern(f"int16x{4 * lanes}", "graphopt_add_small", total, codes, more, tables)


def widened(total: Any, vector: int, lanes: int) -> Any:
    """int32 sums of the outputs of one vector of `lanes`, of four."""
    return tirx.call_pure_extern(f"int32x{lanes}", f"graphopt_widened_{vector}", total)


def look_up_definitions(target: Target) -> str:
    """The functions for `target` in LLVM's language."""
    declarations, writer = _writer(target)
    codes, total = f"<{target.lanes} x i32>", f"<{4 * target.lanes} x i16>"
    found = [declarations]
    for kind, operands in (("found", (f"{codes} %codes0",)), ("small", (f"{codes} %codes0", f"{codes} %codes1"))):
        taken = [line for number in range(len(operands)) for line in writer.halves(number)]
        first, second = "%found0", "%found1"
        if kind == "small":
            taken += [
                f"%first = add {writer.bytes_} %found0, %found2",
                f"%second = add {writer.bytes_} %found1, %found3",
            ]
            first, second = "%first", "%second"
        lines = [*taken, *writer.widen(first, second), f"%result = add {total} %total, %sums", f"ret {total} %result"]
        head = f"define {total} @graphopt_add_{kind}({total} %total, {', '.join(operands)}, ptr %tables) {{\n"
        found.append(head + "".join(f"  {line}\n" for line in lines) + "}\n")
    return "".join([*found, *(writer.widened(vector) for vector in range(4))])


class _Plain:
    """Entry after entry, in the order of the outputs."""

    def __init__(self, lanes: int) -> None:
        self.lanes, self.bytes_, self.words = lanes, f"<{4 * lanes} x i8>", f"<{lanes} x i32>"
        self.total = f"<{4 * lanes} x i16>"

    def halves(self, number: int) -> Iterable[str]:
        """%found<n>: what tables 2 number and 2 number + 1 have for the halves of %codes<number>."""
        yield f"%bytes{number} = bitcast {self.words} %codes{number} to {self.bytes_}"
        yield f"%half{2 * number} = and {self.bytes_} %bytes{number}, splat (i8 15)"
        yield f"%half{2 * number + 1} = lshr {self.bytes_} %bytes{number}, splat (i8 4)"
        for table in (2 * number, 2 * number + 1):
            yield f"%place{table} = getelementptr i8, ptr %tables, i64 {16 * table}"
            yield f"%table{table} = load <16 x i8>, ptr %place{table}, align 1"
            yield from self.look_up(table)

    def look_up(self, table: int) -> Iterable[str]:
        before = "poison"
        for lane in range(4 * self.lanes):
            name = f"%found{table}" if lane == 4 * self.lanes - 1 else f"%found{table}_{lane}"
            yield f"%index{table}_{lane} = extractelement {self.bytes_} %half{table}, i32 {lane}"
            yield f"%entry{table}_{lane} = extractelement <16 x i8> %table{table}, i8 %index{table}_{lane}"
            yield f"{name} = insertelement {self.bytes_} {before}, i8 %entry{table}_{lane}, i32 {lane}"
            before = name

    def widen(self, first: str, second: str) -> Iterable[str]:
        """%sums: of two vectors of bytes."""
        yield f"%wide0 = sext {self.bytes_} {first} to {self.total}"
        yield f"%wide1 = sext {self.bytes_} {second} to {self.total}"
        yield f"%sums = add {self.total} %wide0, %wide1"

    def position(self, output: int) -> int:
        """Where the sum of an output lies."""
        return output

    def widened(self, vector: int) -> str:
        numbers = (self.position(vector * self.lanes + lane) for lane in range(self.lanes))
        order, part = ", ".join(f"i32 {number}" for number in numbers), f"<{self.lanes} x i16>"
        return (
            f"define {self.words} @graphopt_widened_{vector}({self.total} %total) {{\n"
            f"  %part = shufflevector {self.total} %total, {self.total} poison, {self.words} <{order}>\n"
            f"  %result = sext {part} %part to {self.words}\n"
            f"  ret {self.words} %result\n}}\n"
        )


class _Neon(_Plain):
    def look_up(self, table: int) -> Iterable[str]:
        yield (
            f"%found{table} = call <16 x i8> @llvm.aarch64.neon.tbl1.v16i8(<16 x i8> %table{table}, "
            f"<16 x i8> %half{table})"
        )


class _Shuffled(_Plain):
    def look_up(self, table: int) -> Iterable[str]:
        order = ", ".join(f"i32 {lane % 16}" for lane in range(4 * self.lanes))
        yield (
            f"%all{table} = shufflevector <16 x i8> %table{table}, <16 x i8> poison, <{4 * self.lanes} x i32> <{order}>"
        )
        shuffle = f"{self.bytes_} @{_NAMES[self.lanes][0]}"
        yield f"%found{table} = call {shuffle}({self.bytes_} %all{table}, {self.bytes_} %half{table})"

    def widen(self, first: str, second: str) -> Iterable[str]:
        half, count = f"<{2 * self.lanes} x i16>", 4 * self.lanes
        for part in range(2):
            places = [16 * block + 8 * part + byte for block in range(self.lanes // 4) for byte in range(8)]
            order = ", ".join(f"i32 {place}, i32 {count + place}" for place in places)
            yield (
                f"%pairs{part} = shufflevector {self.bytes_} {first}, {self.bytes_} {second}, <{count} x i32> <{order}>"
            )
            yield (
                f"%sums{part} = call {half} @{_NAMES[self.lanes][1]}({self.bytes_} splat (i8 1), "
                f"{self.bytes_} %pairs{part})"
            )
        order = ", ".join(f"i32 {number}" for number in range(4 * self.lanes))
        yield f"%sums = shufflevector {half} %sums0, {half} %sums1, <{count} x i32> <{order}>"

    def position(self, output: int) -> int:
        block, byte = divmod(output, 16)
        return byte // 8 * 2 * self.lanes + block * 8 + byte % 8


def _writer(target: Target) -> tuple[str, _Plain]:
    """What is declared, and what writes the functions; the code may be for another machine than the target's."""
    lanes = target.lanes
    writer: _Plain = _Plain(lanes)
    if target.machine == "aarch64" and lanes == 4:
        return "declare <16 x i8> @llvm.aarch64.neon.tbl1.v16i8(<16 x i8>, <16 x i8>)\n", _Neon(lanes)
    if target.architecture not in _SHUFFLES.get(lanes, ()):
        return "", writer
    (shuffle, pairs), bytes_ = _NAMES[lanes], writer.bytes_
    return (
        f"declare {bytes_} @{shuffle}({bytes_}, {bytes_})\ndeclare <{2 * lanes} x i16> @{pairs}({bytes_}, {bytes_})\n"
    ), _Shuffled(lanes)
