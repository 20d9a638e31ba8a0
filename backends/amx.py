"""AMX: matrix instructions over eight tile registers of 16 rows of 64 bytes, as functions in LLVM's own language.

TDPBF16PS adds to a tile of 16 x 16 float32 the products of 16 rows of 32 bfloat16 and 32 rows of 16, two of which are
interleaved in each row of their tile. TDPBUSD adds to one of int32 those of 16 rows of 64 uint8 and 64 rows of 16 int8,
four of which are interleaved, without saturation; TDPBSUD takes int8 on the left and uint8 on the right (Intel SDM
volume 2).

Linux gives tiles to a process that has asked for them: the library itself asks, once, in the first of its kernels or in
`check_machine`, which whoever opens it may call for an answer at once.

Where the code is for a CPU without tiles, as in a trial of another machine's kernels, `amx_stand_in` has the functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from graphopt.backends.amx_stand_in import stand_in
from graphopt.backends.bfloat16 import BFLOAT16
from graphopt.backends.target import Target

ROWS = 16  # of a tile
COLUMNS = 16  # numbers in a row of the sums
ROW_BYTES = 64
CONFIGURATION_BYTES = 64
USES_TILES = "graphopt.tiles"  # attribute of functions that need `check_machine` beside them
CHECK_MACHINE = "graphopt_check_machine"
_TILES = 8
PRODUCTS = ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7))  # (sums, left, right) of the multiplications that there are
_PERMISSION = (158, 0x1023, 18)  # arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
REFUSED = (
    "this process may not use AMX tiles: Linux refused arch_prctl(ARCH_REQ_XCOMP_PERM); allow it (Linux 5.16 or newer, "
    "no seccomp filter against it), or compile for cpu:x86-64-v4-bf16"
)


@dataclass(frozen=True)
class Numbers:
    """What an instruction multiplies, stored as these bits, and the type of its sums."""

    name: str
    instruction: str
    bits: str
    bytes: int
    sums: str

    @property
    def depth(self) -> int:
        """How many there are in a row of the left tile."""
        return ROW_BYTES // self.bytes

    @property
    def together(self) -> int:
        """How many neighbours in depth there are for each column in a row of the right tile."""
        return 4 // self.bytes


BRAIN = Numbers("bfloat16", "tdpbf16ps", "uint16", 2, "float32")
CODES = Numbers("uint8", "tdpbusd", "uint8", 1, "int32")
SIGNED_CODES = Numbers("int8", "tdpbsud", "uint8", 1, "int32")  # by those without a sign
NUMBERS = {BFLOAT16: BRAIN, "uint8": CODES}  # of `amx_gemm`, by the type of the left side
_INSTRUCTIONS = tuple(each.instruction for each in (BRAIN, CODES, SIGNED_CODES))


# Statements -----------------------------------------------------------------------------------------------------------
def configure(address: Any) -> None:
    """Give tiles the sizes that 64 bytes say (`write_configuration`), and zeros; each thread for itself."""
    _call("configure", address)


def release() -> None:
    """Tiles are empty again, so that switching to another thread saves none."""
    _call("release")


def zero(tile: int) -> None:
    _call(f"zero_{tile}")


def load(tile: int, address: Any, stride: Any) -> None:
    """Rows `stride` bytes apart."""
    _call(f"load_{tile}", address, stride)


def store(tile: int, address: Any, stride: Any) -> None:
    _call(f"store_{tile}", address, stride)


def multiply(numbers: Numbers, total: int, left: int, right: int) -> None:
    """total + left x right, of three tiles that are not the same."""
    _call(f"{numbers.instruction}_{total}{left}{right}")


def write_configuration(memory: Any, rows: dict[int, Any], widths: Mapping[int, int] = MappingProxyType({})) -> None:
    """The bytes that `configure` reads, of tiles of so many rows of 64 bytes or the `widths` that are given: palette 1,
    widths from byte 16 on, row counts from byte 48 on (Intel SDM volume 1, section 18.2)."""
    with T.vectorized(tirx.const(0, "int64"), tirx.const(CONFIGURATION_BYTES, "int64")) as byte:
        T.buffer_store(memory, tirx.const(0, "uint8"), [byte])
    T.buffer_store(memory, tirx.const(1, "uint8"), [0])
    for tile, count in rows.items():
        T.buffer_store(memory, tirx.const(widths.get(tile, ROW_BYTES), "uint8"), [16 + 2 * tile])
        count = tirx.const(count, "uint8") if isinstance(count, int) else count.astype("uint8")
        T.buffer_store(memory, count, [48 + tile])


def _call(name: str, *arguments: Any) -> None:
    T.evaluate(tirx.call_extern("void", f"graphopt_tile_{name}", *arguments))


# The module's own part ------------------------------------------------------------------------------------------------
def uses_tiles(function: Any) -> bool:
    return isinstance(function, tirx.PrimFunc) and USES_TILES in (function.attrs or {})


def check_machine(target: Target) -> tirx.PrimFunc:
    """graphopt_check_machine(): an error where the process was not given tiles. Carries their functions."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(CHECK_MACHINE)
            T.func_attr({"tirx.noalias": True, "global_symbol": CHECK_MACHINE})
            with T.attr(tirx.const(0, "int32"), "pragma_import_llvm", tvm.ir.StringImm(definitions(target))):
                require()
        return builder.get()


def require() -> None:
    """An error where the process was not given tiles, and not the signal that using them would end it with."""
    refused = tirx.call_extern("int32", "graphopt_tile_refused")
    with T.Assert(tirx.EQ(refused, tirx.const(0, "int32")), REFUSED):
        T.evaluate(tirx.const(0, "int32"))


def definitions(target: Target) -> str:
    """The functions for `target` in LLVM's language."""
    native = "amx-bf16" in target.extensions
    return _native() if native else stand_in(PRODUCTS)


def _native() -> str:
    call, number, request, feature = "call void @llvm.x86.", *_PERMISSION
    lines = [
        "declare void @llvm.x86.ldtilecfg(ptr)",
        "declare void @llvm.x86.tilerelease()",
        "declare void @llvm.x86.tilezero(i8 immarg)",
        "declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)",
        "declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)",
        *(f"declare void @llvm.x86.{each}(i8 immarg, i8 immarg, i8 immarg)" for each in _INSTRUCTIONS),
        "declare i64 @syscall(i64, ...)",
        "@graphopt_tile_answer = internal global i64 1",  # not asked yet; then 0, or -1 where it was refused
        "define i32 @graphopt_tile_refused() {",
        "  %known = load atomic i64, ptr @graphopt_tile_answer monotonic, align 8",
        "  %unasked = icmp eq i64 %known, 1",
        "  br i1 %unasked, label %ask, label %end",
        "ask:",
        f"  %answer = call i64 (i64, ...) @syscall(i64 {number}, i64 {request}, i64 {feature})",
        "  store atomic i64 %answer, ptr @graphopt_tile_answer monotonic, align 8",
        "  br label %end",
        "end:",
        "  %last = phi i64 [ %known, %0 ], [ %answer, %ask ]",
        "  %refused = icmp ne i64 %last, 0",
        "  %number = zext i1 %refused to i32",
        "  ret i32 %number\n}",
        _function("configure", "ptr %from", [f"{call}ldtilecfg(ptr %from)"]),
        _function("release", "", [f"{call}tilerelease()"]),
    ]
    for tile in range(_TILES):
        memory = f"i8 {tile}, ptr %at, i64 %stride"
        lines.append(_function(f"zero_{tile}", "", [f"{call}tilezero(i8 {tile})"]))
        lines.append(_function(f"load_{tile}", "ptr %at, i64 %stride", [f"{call}tileloadd64({memory})"]))
        lines.append(_function(f"store_{tile}", "ptr %at, i64 %stride", [f"{call}tilestored64({memory})"]))
    for each, (total, left, right) in itertools.product(_INSTRUCTIONS, PRODUCTS):
        name = f"{each}_{total}{left}{right}"
        lines.append(_function(name, "", [f"{call}{each}(i8 {total}, i8 {left}, i8 {right})"]))
    return "\n".join(lines) + "\n"


def _function(name: str, parameters: str, body: list[str]) -> str:
    inner = "".join(f"  {line}\n" for line in body)
    return f"define void @graphopt_tile_{name}({parameters}) {{\n{inner}  ret void\n}}"
