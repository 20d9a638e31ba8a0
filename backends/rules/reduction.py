"""Sums, products, largest and smallest elements over any axes, with vectors along the axis that lies innermost.

Where that axis is kept, a task holds up to 8 vectors of results and passes over the reduced axes: one load and one
addition a vector, so reading memory bounds it. Where it is reduced, partial results are vectors, folded at the end.
Several independent partial results hide the latency of additions. A result too small to share out between threads is
made from a fixed number of pieces, so the order of additions depends on sizes only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import axes_of, count_operations, operations
from graphopt.backends.rules.generic import combined, start_value
from graphopt.backends.rules.lanes import fold_lanes
from graphopt.backends.rules.windows import vector_width
from graphopt.backends.sizes import Shape, Size, least, product
from graphopt.backends.target import Target
from graphopt.backends.values import Index, Lazy, View

COLUMNS_RULE, ROWS_RULE = "column-reduction", "row-reduction"
Finish = Callable[[Kernel, Any], Any]
PIECES = 16  # of a reduction that has too few results to share out
_FEW_TASKS = 16
_LEAST_SPLIT = 1 << 16  # elements from which pieces are worth a second kernel
_VECTORS = 8  # of results in one task where the innermost axis is kept
_WAYS = 4  # independent partial results at least


def reduced(
    value: View | Lazy,
    axes: Sequence[int],
    dtype: str,
    combine: str,
    finish: Finish,
    target: Target,
    *,
    sizes: Shape = (),
    pieces: int = 0,
) -> Code:
    """finish(combine over `axes` of `value`), of dtype `dtype`, without these axes.

    The last axis of `value` lies innermost in memory. `sizes` are those that `finish` computes with. With `pieces`, the
    result has a new first axis of so many parts that are still to be combined, in the dtype of accumulation.
    """
    accumulate = accumulated_in(dtype)
    kept = [axis for axis in range(len(value.shape)) if axis not in axes]
    shape = tuple(value.shape[axis] for axis in kept)
    along_columns = not axes or (bool(kept) and kept[-1] > max(axes))
    shape, made = ((pieces, *shape), accumulate) if pieces else (shape, dtype)

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        kind = _Columns if along_columns else _Rows
        kind(kernel, value, axes, kept, accumulate, combine, max(1, pieces), finish, outputs[0], shape).write()

    def term(kernel: Kernel) -> Any:
        loaded = kernel.load(value, Index(value.shape, kernel.sizes, axes=axes_of(value.shape)))
        return combined(combine, tirx.Var("total", accumulate), loaded.astype(accumulate))

    each = count_operations(target, term) + ("float" in accumulate and combine in ("max", "min"))
    return write_kernel(
        COLUMNS_RULE if along_columns else ROWS_RULE,
        combine,
        target,
        [value],
        [(shape, made)],
        body,
        configuration={
            "lanes": vector_width(value.shape[-1], target) if value.shape else 1,
            "pieces": max(1, pieces),
        },
        flops=each * product(value.shape) + operations([value], target),
        extra_shapes=[sizes],
    )


def accumulated_in(dtype: str) -> str:
    """float16 and bfloat16 are added up in float32."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def pieces_for(value: View | Lazy, axes: Sequence[int], target: Target) -> int:
    """Pieces to reduce first, where the results are too few for a task each; otherwise 0."""
    kept = [size for axis, size in enumerate(value.shape) if axis not in axes]
    total = product(value.shape)
    if kept and len(value.shape) - 1 not in axes:
        kept[-1] = _blocks(kept[-1], target) if isinstance(kept[-1], int) else 1
    results = product(kept)
    few = isinstance(results, int) and results < _FEW_TASKS
    return PIECES if few and axes and not (isinstance(total, int) and total < _LEAST_SPLIT) else 0


def _blocks(columns: int, target: Target) -> int:
    """Tasks along an innermost axis that is kept."""
    return -(-columns // (vector_width(columns, target) * _VECTORS))


class _Reduction:
    """What both kinds share: where a task is, and the loops over reduced axes."""

    def __init__(
        self,
        kernel: Kernel,
        value: View | Lazy,
        axes: Sequence[int],
        kept: Sequence[int],
        accumulate: str,
        combine: str,
        pieces: int,
        finish: Finish,
        output: Output,
        shape: Shape,
    ) -> None:
        self.kernel, self.value, self.axes, self.kept = kernel, value, list(axes), list(kept)
        self.accumulate, self.combine, self.pieces = accumulate, combine, pieces
        self.finish, self.output, self.shape = finish, output, shape
        self.at: dict[int, Any] = {}  # where the kernel is along each axis
        self.piece: Any = int64(0)

    def load(self) -> Any:
        axes = tuple(self.at[axis] for axis in range(len(self.value.shape)))
        value = self.kernel.load(self.value, Index(self.value.shape, self.kernel.sizes, axes=axes))
        return value if str(value.ty.dtype) == self.accumulate else value.astype(self.accumulate)

    def place(self, task: Any, outer: Sequence[int]) -> None:
        """Find the task's piece and its position along the `outer` axes."""
        sizes = (self.pieces, *(self.value.shape[axis] for axis in outer))
        where = self.kernel.index(sizes, linear=task)
        self.piece = where.axis(0)
        self.at = {axis: where.axis(1 + number) for number, axis in enumerate(outer)}

    def tasks(self, outer: Sequence[int]) -> Any:
        return self.kernel.size(product((self.pieces, *(self.value.shape[axis] for axis in outer))))

    def span(self, axis: int, unit: int = 1) -> tuple[Any, Any]:
        """First position of this task's piece along a reduced axis, and how many there are."""
        size = self.kernel.size(self.value.shape[axis])
        if self.pieces == 1 or axis != self.axes[0]:
            return int64(0), size
        each = tirx.truncdiv(size + (self.pieces * unit - 1), int64(self.pieces * unit)) * unit
        return self.piece * each, tirx.max(int64(0), tirx.min(each, size - self.piece * each))

    def loops(self, axes: Sequence[int], inner: Callable[[], None]) -> None:
        if not axes:
            inner()
            return
        first, count = self.span(axes[0])
        with self.kernel.serial(count) as step:
            self.at[axes[0]] = first + step
            self.loops(axes[1:], inner)

    def start(self) -> Any:
        return start_value(self.combine, self.accumulate)

    def store(self, total: Any) -> None:
        kept = tuple(self.at[axis] for axis in self.kept)
        split = len(self.shape) > len(self.kept)
        place = Index(self.shape, self.kernel.sizes, axes=(self.piece, *kept) if split else kept).flat()
        self.output.store(place, total if split else self.finish(self.kernel, total))


class _Columns(_Reduction):
    """The innermost axis is kept: each task makes some vectors of results along it."""

    def write(self) -> None:
        kernel, outer = self.kernel, self.kept[:-1]
        self.columns: Size = self.value.shape[-1] if self.kept else 1
        width = kernel.size(self.columns)
        if isinstance(self.columns, int):
            lanes = vector_width(self.columns, kernel.target)
            vectors, blocks = min(_VECTORS, -(-self.columns // lanes)), _blocks(self.columns, kernel.target)
            with kernel.parallel(self.tasks(outer) * blocks) as task:
                self.place(tirx.truncdiv(task, int64(blocks)), outer)
                self.write_block(tirx.truncmod(task, int64(blocks)), lanes, vectors)
            return
        lanes = kernel.target.lanes
        with kernel.parallel(self.tasks(outer)) as task:
            self.place(task, outer)
            if least(self.columns) >= lanes:
                with kernel.serial(tirx.truncdiv(width + (lanes - 1), int64(lanes))) as block:
                    self.write_block(block, lanes, 1)
                return
            with T.If(width >= lanes):
                with T.Then(), kernel.serial(tirx.truncdiv(width + (lanes - 1), int64(lanes))) as block:
                    self.write_block(block, lanes, 1)
                with T.Else(), kernel.serial(width) as block:
                    self.write_block(block, 1, 1)

    def write_block(self, block: Any, lanes: int, vectors: int) -> None:
        """`vectors` of results; the last ones start early where they do not divide the axis."""
        kernel, last = self.kernel, self.kernel.size(self.columns) - lanes
        starts = [tirx.min((block * vectors + number) * lanes, last) for number in range(vectors)]
        ways = max(1, _WAYS // vectors)
        totals = kernel.registers(ways, vectors, lanes, dtype=self.accumulate)

        def each(way: int, value: Callable[[int, Any], Any]) -> None:
            self.each(starts, lanes, lambda v, lane: T.buffer_store(totals, value(v, lane), [way, v, lane]))

        def add(way: int) -> None:
            each(way, lambda v, lane: combined(self.combine, totals[way, v, lane], self.load()))

        def fold(way: int) -> None:
            each(0, lambda v, lane: combined(self.combine, totals[0, v, lane], totals[way, v, lane]))

        for way in range(ways):
            each(way, lambda v, lane: self.start())
        self.loops(self.axes[:-1], lambda: self.innermost(ways, add))
        for way in range(1, ways):
            fold(way)
        self.each(starts, lanes, lambda v, lane: self.store(totals[0, v, lane]))

    def each(self, starts: Sequence[Any], lanes: int, write: Callable[[int, Any], None]) -> None:
        for number, first in enumerate(starts):
            with self.kernel.vectorized(lanes) as lane:
                if self.kept:
                    self.at[self.kept[-1]] = first + lane
                write(number, lane)

    def innermost(self, ways: int, add: Callable[[int], None]) -> None:
        """The last reduced axis, `ways` elements at a time."""
        if not self.axes:
            add(0)
            return
        axis = self.axes[-1]
        first, count = self.span(axis)
        steps = tirx.truncdiv(count, int64(ways))
        with self.kernel.serial(steps) as step:
            for way in range(ways):
                self.at[axis] = first + step * ways + way
                add(way)
        if ways > 1:
            with self.kernel.serial(count - steps * ways) as step:
                self.at[axis] = first + steps * ways + step
                add(0)


class _Rows(_Reduction):
    """The innermost axis is reduced: each task makes one result from vectors along it."""

    def write(self) -> None:
        kernel = self.kernel
        self.lanes = vector_width(self.value.shape[-1], kernel.target)
        if not isinstance(self.value.shape[-1], int):
            self.lanes = kernel.target.lanes
        with kernel.parallel(self.tasks(self.kept)) as task:
            self.place(task, self.kept)
            self.partial = kernel.registers(_WAYS, kernel.target.lanes, dtype=self.accumulate)
            for way in range(_WAYS):
                with kernel.vectorized(kernel.target.lanes) as lane:
                    T.buffer_store(self.partial, self.start(), [way, lane])
            self.loops(self.axes[:-1], self.write_row)
            fold_lanes(kernel, self.partial, _WAYS, self.combine)
            self.store(self.partial[0, 0])

    def write_row(self) -> None:
        kernel, lanes, axis = self.kernel, self.lanes, self.axes[-1]
        block = _WAYS * lanes
        first, count = self.span(axis, block)

        def add(way: int, column: Any, lane: Any) -> None:
            self.at[axis] = first + column
            value = combined(self.combine, self.partial[way, lane], self.load())
            T.buffer_store(self.partial, value, [way, lane])
            kernel.forget()

        with kernel.serial(tirx.truncdiv(count, int64(block))) as step:
            for way in range(_WAYS):
                with kernel.vectorized(lanes) as lane:
                    add(way, step * block + way * lanes + lane, lane)
        done = tirx.truncdiv(count, int64(block)) * block
        with kernel.serial(tirx.truncdiv(count - done, int64(lanes))) as step, kernel.vectorized(lanes) as lane:
            add(0, done + step * lanes + lane, lane)
        done = tirx.truncdiv(count, int64(lanes)) * lanes
        if lanes > 1:
            with kernel.serial(count - done) as step:
                add(0, done + step, int64(0))
