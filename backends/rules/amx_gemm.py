"""Packed-weight product of bfloat16 or 8-bit codes on AMX tiles, with the epilogue of every other, in the same kernel.

Two tiles of rows times two of columns make 32 x 32 sums in four tile registers; a step of 32 bfloat16 or 64 codes of
the depth loads two tiles of activations from where they lie and two of the weight, packed [N / 32, K / 32, 2, 16, 32]
with pairs of the depth beside each other, or [N / 32, K / 64, 2, 16, 64] with fours, for four multiplications. The sums
are then stored on the stack, 4 KB, and the element-wise tree runs over them row by row. Each step prefetches its share
of the next panel.

No row is computed with that does not exist: a product of fewer than 16 rows has tiles of so many, and the last tiles of
others begin 16 rows before the end, so that some rows are computed twice and stored once. Where steps do not divide the
depth, the rest of each row is copied between zeros; a wide load would read another row's numbers, and NaN times zero is
NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends import amx
from graphopt.backends.bfloat16 import BFLOAT16
from graphopt.backends.choice import UNUSUAL, Choice, epilogue_parameters, size_parameter
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules import amx_block
from graphopt.backends.sizes import Size, product
from graphopt.backends.target import Target
from graphopt.backends.tuner.record import Workload
from graphopt.backends.values import Product, View, fused_name

RULE = "amx-gemm"
_FEWEST_ROWS = 4  # fewer are bound by reading the weight, which vectors do as fast
_SERIAL_BELOW = 1 << 20  # multiply-adds that are not worth the launch of threads
_ROWS_KEPT_FROM = 64  # rows known at run time from which each thread keeps its own
_ROWS_AWAY = 1.04  # how much longer a product takes whose rows lie in the L2 cache of another core
_PASSED_BYTES = 512 << 10  # of the rows that all panels pass over before the next ones
_MOST_PASSED = 1024


@dataclass(frozen=True)
class Configuration:
    """What may be chosen for one product; results do not depend on it."""

    passed_rows: int  # that all panels pass over before the next ones, a multiple of 32
    row_shares: int  # shares of the rows between threads
    panel_shares: int  # shares of the panels between threads


def fits(target: Target, a: View) -> bool:
    """Whether a [..., K] is bfloat16 or uint8 with enough rows, all equally far apart, and the target has tiles."""
    rows = product(a.shape[:-1])
    enough = not isinstance(rows, int) or rows >= _FEWEST_ROWS
    return target.amx and a.dtype in amx.NUMBERS and enough and row_stride(a) is not None


def row_stride(a: View) -> Size | None:
    """How many elements lie between two rows, counted over all axes but the last; None where that differs."""
    stride: Size | None = None
    below: Size = 1
    for size, step in zip(a.shape[-2::-1], a.strides[-2::-1], strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != stride * below:
            return None
        below = below * size
    return 0 if stride is None else stride


def offer(target: Target, a: View, n: int, end: Any, write: Callable[[Configuration], Code]) -> Choice[Configuration]:
    """What may be chosen for a [..., K] times a weight [N, K], followed by the tree `end`."""
    rows, k, numbers = product(a.shape[:-1]), int(a.shape[-1]), amx.NUMBERS[a.dtype]
    parameters = {"rows": size_parameter(rows), "n": n, "k": k, "contiguous": a.contiguous}
    parameters |= {} if a.dtype == BFLOAT16 else {"dtype": a.dtype}
    found = worth_timing(target, rows, n, k, numbers)
    return Choice(Workload.of(RULE, {**parameters, **epilogue_parameters(end)}), found[0], lambda: found, write)


def worth_timing(target: Target, rows: Size, n: int, k: int, numbers: amx.Numbers) -> list[Configuration]:
    """Every share with blocks of three sizes, the least expected time first."""
    passed = min(_MOST_PASSED, max(_ROWS_KEPT_FROM, _PASSED_BYTES // (numbers.bytes * k)))
    costs: dict[Configuration, float] = {}
    for scale, doubt in ((1.0, 1.0), (0.5, UNUSUAL), (2.0, UNUSUAL)):
        for row_shares, panel_shares in _shares(target.threads, rows, n, k):
            share = -(-rows // row_shares) if isinstance(rows, int) else _MOST_PASSED
            block = -(-min(share, int(scale * passed)) // amx_block.ROWS) * amx_block.ROWS
            choice = Configuration(block, row_shares, panel_shares)
            costs.setdefault(choice, doubt * _cost(choice, rows, n, k, numbers))
    return sorted(costs, key=lambda choice: costs[choice])


def _shares(threads: int, rows: Size, n: int, k: int) -> list[tuple[int, int]]:
    """(shares of rows, shares of panels), those that keep rows on their thread first."""
    if not isinstance(rows, int):
        return [(threads, threads), (1, threads)]
    if rows * n * k < _SERIAL_BELOW:
        return [(1, 1)]
    return [(threads // panels, panels) for panels in range(1, threads + 1) if threads % panels == 0]


def _cost(choice: Configuration, rows: Size, n: int, k: int, numbers: amx.Numbers) -> float:
    """Cycles of the longest share."""
    panels, steps = -(-n // amx_block.PANEL), -(-k // numbers.depth)
    if not isinstance(rows, int):
        return float(-(-panels // choice.panel_shares)) * (_ROWS_AWAY if choice.row_shares == 1 else 1)
    away = 1 if choice.panel_shares == 1 else _ROWS_AWAY
    blocks = -(-rows // amx_block.ROWS)
    return away * amx_block.cycles(-(-blocks // choice.row_shares), -(-panels // choice.panel_shares), steps)


def gemm(a: View, weight: View, result: Product, end: Any, name: str, target: Target, choice: Configuration) -> Code:
    """C[row, n] = sum over k of A[row, k] B[k, n], then the element-wise tree `end` over `result`.

    bfloat16 with float32 sums or, exactly, uint8 by int8 with int32 sums; `a` [..., K] as in `fits`, its last axis
    contiguous, `weight` packed by `pack_tiles`.
    """
    rows, n, k = product(result.shape[:-1]), int(result.shape[-1]), int(a.shape[-1])

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        _Gemm(kernel, a, weight, result, end, outputs[0], choice).write()

    code = write_kernel(
        RULE,
        fused_name(name, end),
        target,
        [a, weight, end],
        [(end.shape, end.dtype)],
        body,
        configuration={
            "products": f"tiles of {amx.NUMBERS[a.dtype].name}",
            "passed_rows": choice.passed_rows,
            "row_shares": choice.row_shares,
            "panel_shares": choice.panel_shares,
        },
        flops=2 * rows * n * k + operations([end], target),
    )
    return replace(code, function=code.function.with_attr(amx.USES_TILES, True))


class _Gemm:
    def __init__(
        self, kernel: Kernel, a: View, weight: View, result: Product, end: Any, output: Output, choice: Configuration
    ) -> None:
        self.kernel, self.choice = kernel, choice
        self.output, self.end, self.result = output, end, result
        self.numbers = numbers = amx.NUMBERS[a.dtype]
        self.a, self.b = kernel.words(a.storage, numbers.bits), kernel.words(weight.storage, numbers.bits)
        self.offset, stride = kernel.size(a.offset), row_stride(a)
        assert stride is not None, "rows of the left side are not equally far apart"
        self.stride = int64(kernel.size(stride))
        self.panels, self.steps = (int(size) for size in weight.shape[:2])
        self.whole, self.rest = divmod(int(a.shape[-1]), numbers.depth)
        self.step = amx_block.STEP // numbers.bytes  # numbers of a weight in one step
        self.row_count = product(result.shape[:-1])
        self.rows = int64(kernel.size(self.row_count))

    def write(self) -> None:
        """Tasks are shares of rows x shares of panels; up to 16 rows are one tile high."""
        amx.require()
        if isinstance(self.row_count, int):
            shares = int64(self.choice.row_shares)
            self.write_shares(1 if self.row_count <= amx.ROWS else 2, shares)
            return
        with T.If(self.rows > amx.ROWS):
            with T.Then():
                kept = tirx.Select(self.rows >= _ROWS_KEPT_FROM, int64(self.choice.row_shares), int64(1))
                self.write_shares(2, kept)
            with T.Else():
                self.write_shares(1, int64(1))

    def write_shares(self, height: int, row_shares: Any) -> None:
        kernel, panel_shares = self.kernel, self.choice.panel_shares
        tall = height * amx.ROWS
        blocks = tirx.floordiv(self.rows + (tall - 1), int64(tall))
        alone = isinstance(self.row_count, int) and self.choice.row_shares * panel_shares == 1
        with (kernel.serial if alone else kernel.parallel)(row_shares * panel_shares) as task:
            row_share = tirx.truncdiv(task, int64(panel_shares))
            panel_share = tirx.truncmod(task, int64(panel_shares))
            first = T.bind(tirx.truncdiv(row_share * blocks, row_shares))
            own = T.bind(tirx.truncdiv((row_share + 1) * blocks, row_shares) - first)
            first_panel = T.bind(tirx.truncdiv(panel_share * self.panels, int64(panel_shares)))
            panels = T.bind(tirx.truncdiv((panel_share + 1) * self.panels, int64(panel_shares)) - first_panel)
            passed = max(1, self.choice.passed_rows // tall)
            memory = _Memory(kernel, height, self.rest, self.numbers)
            one = min(self.row_count, amx.ROWS) if isinstance(self.row_count, int) else None
            amx_block.configure(kernel, height, tirx.min(self.rows, int64(amx.ROWS)) if one is None else one)
            with kernel.serial(tirx.truncdiv(own + (passed - 1), int64(passed))) as at:
                count = T.bind(tirx.min(int64(passed), own - at * passed))

                def block(number: Any) -> _Block:
                    panel, of_panel = tirx.truncdiv(number, count), T.bind(tirx.truncmod(number, count))
                    row = T.bind((first + at * passed + of_panel) * tall)
                    return _Block(self, memory, height, T.bind(first_panel + panel), row, of_panel, count)

                amx_block.overlapped(
                    kernel,
                    height,
                    panels * count,
                    lambda number, row: block(number).multiply_rows(row),
                    lambda number, row: block(number).finish(row),
                )
            amx.release()


class _Memory:
    """What a task keeps on the stack: a block of sums, and the rest of its rows' depth between zeros."""

    def __init__(self, kernel: Kernel, height: int, rest: int, numbers: amx.Numbers) -> None:
        self.sums = amx_block.StoredSums(kernel, height, numbers)
        depth, bits = numbers.depth, numbers.bits
        self.rest = kernel.registers(height, amx.ROWS, depth, dtype=bits) if rest else None
        if self.rest is not None:
            with kernel.serial(height) as tile, kernel.serial(amx.ROWS) as row, kernel.vectorized(depth) as lane:
                T.buffer_store(self.rest, tirx.const(0, bits), [tile, row, lane])


class _Block:
    """The sums of one panel for the rows from `first_row` on, `height` tiles of them."""

    def __init__(
        self, gemm_: _Gemm, memory: _Memory, height: int, panel: Any, first_row: Any, number: Any, count: Any
    ) -> None:
        self.gemm, self.kernel, self.memory, self.height = gemm_, gemm_.kernel, memory, height
        self.panel, self.first_row, self.number, self.count = panel, first_row, number, count
        self.starts = [self.start(first_row + tile * amx.ROWS) for tile in range(height)]

    def start(self, row: Any) -> Any:
        """The first row of the tile that holds `row` and those after it."""
        count = self.gemm.row_count
        if isinstance(count, int) and count % (self.height * amx.ROWS) == 0:
            return row
        return T.bind(tirx.max(int64(0), tirx.min(row, self.gemm.rows - amx.ROWS)))

    def multiply_rows(self, row: Any) -> None:
        """The sums, stored from the row `row` of memory on."""
        gemm_, kernel = self.gemm, self.kernel
        amx_block.zero(self.height)
        weights = T.bind(self.panel * (gemm_.steps * gemm_.step))
        positions = [T.bind(gemm_.offset + start * gemm_.stride) for start in self.starts]
        with kernel.serial(gemm_.whole) as step:
            self.prefetch(weights, step)
            left = [tirx.address_of(gemm_.a[position + step * gemm_.numbers.depth]) for position in positions]
            self.multiply(left, gemm_.stride * gemm_.numbers.bytes, weights + step * gemm_.step)
        if self.memory.rest is not None:
            self.copy_rest(self.memory.rest, positions)
            left = [tirx.address_of(self.memory.rest[tile, 0, 0]) for tile in range(self.height)]
            self.multiply(left, int64(amx.ROW_BYTES), weights + gemm_.whole * gemm_.step)
        # A second tile that begins early overwrites sums with the same ones.
        self.memory.sums.store([row + start - self.starts[0] for start in self.starts])

    def finish(self, row: Any) -> None:
        """The element-wise tree over sums stored from the row `row` on."""
        gemm_, sums = self.gemm, self.memory.sums
        sums.begin = T.bind(row + self.first_row - self.starts[0])
        sums.write(
            gemm_.result,
            gemm_.end,
            gemm_.output,
            rows=tirx.min(int64(self.height * amx.ROWS), gemm_.rows - self.first_row),
            position=lambda r: self.starts[0] - row + r,
            first=T.bind(self.panel * amx_block.PANEL),
            width=int(gemm_.result.shape[-1]),
        )

    def multiply(self, left: list[Any], stride: Any, weights: Any) -> None:
        """One step of the depth; `left` are addresses of tiles of activations."""
        amx_block.multiply(self.gemm.numbers, left, stride, self.gemm.b, weights)

    def copy_rest(self, rest: Any, positions: list[Any]) -> None:
        """The last numbers of each row, in whole parts of 32, 16, 8, 4, 2 and 1."""
        gemm_, kernel = self.gemm, self.kernel
        begin = gemm_.whole * gemm_.numbers.depth
        for tile, position in enumerate(positions):
            with kernel.serial(tirx.min(int64(amx.ROWS), gemm_.rows)) as row:
                done = 0
                for part in (32, 16, 8, 4, 2, 1):
                    if not gemm_.rest & part:
                        continue
                    with kernel.vectorized(part) as lane:
                        value = gemm_.a[position + row * gemm_.stride + (begin + done) + lane]
                        T.buffer_store(rest, value, [tile, row, done + lane])
                    done += part

    def prefetch(self, weights: Any, step: Any) -> None:
        """Touch this step's share of the lines of the next panel, which all blocks of rows fetch between them."""
        gemm_ = self.gemm
        share = tirx.truncdiv(int64(amx_block.LINES) + (self.count - 1), self.count)
        if isinstance(gemm_.row_count, int):
            rows = min(gemm_.choice.passed_rows, -(-gemm_.row_count // gemm_.choice.row_shares))
            share = int64(-(-amx_block.LINES // -(-rows // (self.height * amx.ROWS))))
        start = weights + gemm_.steps * gemm_.step
        first = (self.number * gemm_.steps + step) * share
        amx_block.prefetch(self.kernel, gemm_.numbers, gemm_.b, start, first, share)
