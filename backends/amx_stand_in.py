"""The functions of `amx` in LLVM's own language for a CPU without tiles: the same numbers, out of memory of the thread.

Additions of float32 have the order that the manual gives: the even and the odd products of a row are each summed over
the depth from zero, then both sums are added, and that to the tile (Intel SDM volume 2, TDPBF16PS). Denormals are zero
there whatever the thread has set; here they are because kernels run with denormals flushed. int32 has no such order.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.backends.integer_instructions import sums_of_parts

_TILES = 8
_STATE = "graphopt_tile_state"


def stand_in(products: Sequence[tuple[int, int, int]]) -> str:
    """Tiles in memory of the thread: 16 rows of 16 words each, zero beyond the configured rows."""
    lines = [
        f"@{_STATE} = internal thread_local global [{_TILES} x [16 x <16 x i32>]] zeroinitializer, align 64",
        f"@{_STATE}_rows = internal thread_local global [{_TILES} x i8] zeroinitializer",
        "declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)",
        "declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)",
        "define i32 @graphopt_tile_refused() {\n  ret i32 0\n}",
        _CONFIGURE,
        _ADD_CODES,
        "define void @graphopt_tile_release() {\n  ret void\n}",
    ]
    for tile in range(_TILES):
        lines += [part.replace("TILE", str(tile)) for part in (_ZERO, _LOAD, _STORE)]
    for total, left, right in products:
        for text in (_MULTIPLY, _MULTIPLY_CODES, _MULTIPLY_SIGNED):
            text = text.replace("TOTAL", str(total)).replace("LEFT", str(left))
            lines.append(text.replace("RIGHT", str(right)))
    return "\n".join(lines) + "\n"


_CONFIGURE = f"""
define void @graphopt_tile_configure(ptr %from) {{
  %first = getelementptr i8, ptr %from, i64 48
  %counts = load <8 x i8>, ptr %first, align 1
  store <8 x i8> %counts, ptr @{_STATE}_rows, align 1
  call void @llvm.memset.p0.i64(ptr @{_STATE}, i8 0, i64 {_TILES * 1024}, i1 false)
  ret void
}}
"""
_ZERO = f"""
define void @graphopt_tile_zero_TILE() {{
  %tile = getelementptr [{_TILES} x [16 x <16 x i32>]], ptr @{_STATE}, i64 0, i64 TILE
  store [16 x <16 x i32>] zeroinitializer, ptr %tile, align 64
  ret void
}}
"""


def _each_row(name: str, body: str) -> str:
    """A loop over the configured rows of a tile, with `%row` in the tile and `%place` in memory."""
    return f"""
define void @graphopt_tile_{name}_TILE(ptr %at, i64 %stride) {{
begin:
  %tile = getelementptr [{_TILES} x [16 x <16 x i32>]], ptr @{_STATE}, i64 0, i64 TILE
  %where = getelementptr [{_TILES} x i8], ptr @{_STATE}_rows, i64 0, i64 TILE
  %count = load i8, ptr %where
  %rows = zext i8 %count to i64
  %none = icmp eq i64 %rows, 0
  br i1 %none, label %end, label %loop
loop:
  %i = phi i64 [ 0, %begin ], [ %next, %loop ]
  %skip = mul i64 %i, %stride
  %place = getelementptr i8, ptr %at, i64 %skip
  %row = getelementptr <16 x i32>, ptr %tile, i64 %i
{body}
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %rows
  br i1 %more, label %loop, label %end
end:
  ret void
}}
"""


_LOAD = _each_row(
    "load", "  %words = load <16 x i32>, ptr %place, align 1\n  store <16 x i32> %words, ptr %row, align 64"
)
_STORE = _each_row(
    "store", "  %words = load <16 x i32>, ptr %row, align 64\n  store <16 x i32> %words, ptr %place, align 1"
)


def _each_product(name: str, begin: str, step: str, end: str) -> str:
    """Loops over rows and, in each, over the depth in words; `begin`, `step` and `end` make what is added to `%to`.

    A step has `%left`, a word of the left side in every lane, and `%right`, a row of the right side.
    """
    return f"""
define void @graphopt_tile_{name}_TOTALLEFTRIGHT() {{
begin:
  %total = getelementptr [{_TILES} x [16 x <16 x i32>]], ptr @{_STATE}, i64 0, i64 TOTAL
  %tile = getelementptr [{_TILES} x [16 x <16 x i32>]], ptr @{_STATE}, i64 0, i64 LEFT
  %lines = getelementptr [{_TILES} x [16 x <16 x i32>]], ptr @{_STATE}, i64 0, i64 RIGHT
  %where = getelementptr [{_TILES} x i8], ptr @{_STATE}_rows, i64 0, i64 TOTAL
  %count = load i8, ptr %where
  %rows = zext i8 %count to i64
  br label %row
row:
  %m = phi i64 [ 0, %begin ], [ %next_m, %sum ]
  %to = getelementptr <16 x i32>, ptr %total, i64 %m
  br label %depth
depth:
  %k = phi i64 [ 0, %row ], [ %next_k, %depth ]
{begin}
  %at = getelementptr [16 x i32], ptr %tile, i64 %m, i64 %k
  %pair = load i32, ptr %at
  %one = insertelement <16 x i32> poison, i32 %pair, i64 0
  %left = shufflevector <16 x i32> %one, <16 x i32> poison, <16 x i32> zeroinitializer
  %line = getelementptr <16 x i32>, ptr %lines, i64 %k
  %right = load <16 x i32>, ptr %line, align 64
{step}
  %next_k = add i64 %k, 1
  %deeper = icmp ult i64 %next_k, 16
  br i1 %deeper, label %depth, label %sum
sum:
{end}
  %next_m = add i64 %m, 1
  %more = icmp ult i64 %next_m, %rows
  br i1 %more, label %row, label %end
end:
  ret void
}}
"""


_MULTIPLY = _each_product(
    "tdpbf16ps",
    """  %even = phi <16 x float> [ zeroinitializer, %row ], [ %more_even, %depth ]
  %odd = phi <16 x float> [ zeroinitializer, %row ], [ %more_odd, %depth ]""",
    """  %lower_left = shl <16 x i32> %left, splat (i32 16)
  %lower_right = shl <16 x i32> %right, splat (i32 16)
  %upper_left = and <16 x i32> %left, splat (i32 -65536)
  %upper_right = and <16 x i32> %right, splat (i32 -65536)
  %a = bitcast <16 x i32> %lower_left to <16 x float>
  %b = bitcast <16 x i32> %lower_right to <16 x float>
  %c = bitcast <16 x i32> %upper_left to <16 x float>
  %d = bitcast <16 x i32> %upper_right to <16 x float>
  %more_even = call <16 x float> @llvm.fma.v16f32(<16 x float> %a, <16 x float> %b, <16 x float> %even)
  %more_odd = call <16 x float> @llvm.fma.v16f32(<16 x float> %c, <16 x float> %d, <16 x float> %odd)""",
    """  %both = fadd <16 x float> %more_even, %more_odd
  %old = load <16 x float>, ptr %to, align 64
  %new = fadd <16 x float> %old, %both
  store <16 x float> %new, ptr %to, align 64""",
)
_ADD_CODES = f"""
define <16 x i32> @graphopt_tile_add_codes(<16 x i32> %total, <16 x i32> %left, <16 x i32> %right) {{
{sums_of_parts(16, 8, "uint8")}  ret <16 x i32> %sum
}}
"""


def _multiply_codes(name: str, operands: str) -> str:
    """`operands`: the one without a sign, then the other."""
    return _each_product(
        name,
        "  %sums = phi <16 x i32> [ zeroinitializer, %row ], [ %more_sums, %depth ]",
        f"  %more_sums = call <16 x i32> @graphopt_tile_add_codes(<16 x i32> %sums, {operands})",
        """  %old = load <16 x i32>, ptr %to, align 64
  %new = add <16 x i32> %old, %more_sums
  store <16 x i32> %new, ptr %to, align 64""",
    )


_MULTIPLY_CODES = _multiply_codes("tdpbusd", "<16 x i32> %left, <16 x i32> %right")
_MULTIPLY_SIGNED = _multiply_codes("tdpbsud", "<16 x i32> %right, <16 x i32> %left")
