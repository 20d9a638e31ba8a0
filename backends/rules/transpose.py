"""Transposition rule: element-wise trees that read memory along another axis than the one they are written along.

Square blocks of such operands are read as whole vectors along the axis in which they lie, exchanged in registers, and
written as whole vectors. The last blocks of an axis overlap their neighbours: what is computed twice is equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Code, Configuration, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.lanes import settled, shuffled, span, transposed
from graphopt.backends.rules.pointwise import pointwise, shared_out, work, write_rows
from graphopt.backends.sizes import Size, contiguous_strides, product
from graphopt.backends.target import Target
from graphopt.backends.values import Index, Lazy, View, inverse, permuted, placed_views

RULE = "transpose"
_LEAST = 4  # rows and columns of a block
_TILE = 64  # rows and columns of one task: so many pages of either side have their addresses at hand


@dataclass(frozen=True)
class _Read:
    """A view of the size of the result; axis n of it is axis order[n] of the result, whose strides these are."""

    view: View
    order: tuple[int, ...]
    strides: tuple[Size, ...]


@dataclass(frozen=True)
class _Plan:
    """Blocks of `side` places on axis `across`, along which the operands lie, and `side` on `along`, the last axis."""

    across: int
    along: int
    side: int
    reads: tuple[_Read, ...]


def stored(value: Lazy | View, name: str, target: Target) -> Code:
    """The kernel that stores `value` contiguously, in blocks where it reads along another axis than it writes."""
    shorter = merged(value) if isinstance(value, View) else value
    plan = _plan(shorter, target)
    zipped = None if plan or target.lanes == 1 else _zipped(shorter)
    if plan is None and zipped is None:
        return pointwise(value, name, target)
    configuration: Configuration

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        if plan is not None:
            _write_guarded(kernel, shorter, plan, outputs[0])
        elif zipped is not None:
            _write_zipped(kernel, zipped, outputs[0])

    if plan is not None:
        configuration = {"lanes": plan.side, "order": "blocks", "tile": _TILE}
    else:
        configuration = {"lanes": target.lanes, "order": "zipped"}
    return write_kernel(
        RULE,
        name,
        target,
        [shorter],
        [(value.shape, value.dtype)],
        body,
        configuration=configuration,
        flops=operations([value], target),
    )


def merged(view: View) -> View:
    """The same elements with neighbouring axes made one where they are one in memory; those of size 1 are left out."""
    axes: list[tuple[Size, Size]] = []
    for size, stride in zip(view.shape, view.strides, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == stride * size:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return View(view.storage, tuple(size for size, _ in axes), tuple(stride for _, stride in axes), view.offset)


def _plan(value: Lazy | View, target: Target) -> _Plan | None:
    """None where nothing is read along another axis than the last, or too little for a block."""
    strided = [axis for axis, size in enumerate(value.shape) if size != 1]
    if len(strided) < 2:
        return None
    along = strided[-1]
    found: dict[int, list[_Read]] = {}
    for view, order in placed_views(value):
        strides = permuted(view, inverse(order)).strides
        unit = [axis for axis in strided[:-1] if strides[axis] == 1]
        if len(unit) == 1 and strides[along] not in (0, 1) and view.dtype == "float32":
            found.setdefault(unit[0], []).append(_Read(view, order, strides))
    if not found:
        return None
    across = max(found, key=lambda axis: len(found[axis]))
    sizes = [size for axis in (across, along) if isinstance(size := value.shape[axis], int)]
    least = min([target.lanes, *sizes])
    side = 1 << (least.bit_length() - 1)
    return _Plan(across, along, side, tuple(found[across])) if side >= _LEAST else None


def _write_guarded(kernel: Kernel, value: Lazy | View, plan: _Plan, output: Output) -> None:
    """In blocks; where sizes are known at run time only and one is less than a block, row by row."""
    sizes = [value.shape[axis] for axis in (plan.across, plan.along)]
    enough = [kernel.size(size) >= plan.side for size in sizes if not isinstance(size, int)]
    if not enough:
        _write_blocks(kernel, value, plan, output)
        return
    with T.If(tirx.all(*enough)):
        with T.Then():
            _write_blocks(kernel, value, plan, output)
        with T.Else():
            write_rows(kernel, value, output)


def _write_blocks(kernel: Kernel, value: Lazy | View, plan: _Plan, output: Output) -> None:
    rows, columns = (kernel.size(value.shape[axis]) for axis in (plan.across, plan.along))
    outer = tuple(size for axis, size in enumerate(value.shape) if axis not in (plan.across, plan.along))
    down, right = (tirx.truncdiv(size + (_TILE - 1), int64(_TILE)) for size in (rows, columns))
    with shared_out(kernel, kernel.size(product(outer)) * down * right, work(value, kernel.target)) as task:
        place = kernel.index(outer, linear=tirx.truncdiv(task, down * right))
        others = iter([settled(kernel, place.axis(number)) for number in range(len(outer))])
        axes = [int64(0) if axis in (plan.across, plan.along) else next(others) for axis in range(len(value.shape))]
        tile = tirx.truncmod(task, down * right)
        top, left = tirx.truncdiv(tile, right) * _TILE, tirx.truncmod(tile, right) * _TILE
        with (
            kernel.serial(_blocks(rows - top, plan.side)) as below,
            kernel.serial(_blocks(columns - left, plan.side)) as beside,
        ):
            axes[plan.across] = settled(kernel, tirx.min(top + below * plan.side, rows - plan.side))
            axes[plan.along] = settled(kernel, tirx.min(left + beside * plan.side, columns - plan.side))
            _write_block(kernel, value, plan, axes, output)


def _blocks(size: Any, side: int) -> Any:
    return tirx.truncdiv(tirx.min(size, int64(_TILE)) + (side - 1), int64(side))


def _write_block(kernel: Kernel, value: Lazy | View, plan: _Plan, axes: list[Any], output: Output) -> None:
    """The block whose first element is at `axes`."""
    side, tiles = plan.side, []
    down = kernel.size(contiguous_strides(value.shape)[plan.across])
    for read in plan.reads:
        start, stride = _position(kernel, axes, read.strides, read.view.offset), kernel.size(read.strides[plan.along])
        memory = kernel.flat(read.view.storage)
        rows = transposed([T.bind(memory[span(start + stride * c, side)]) for c in range(side)])
        if value is read.view:
            first = _position(kernel, axes, contiguous_strides(value.shape))
            for r, row in enumerate(rows):
                T.buffer_store(output.flat, row, [span(first + down * r, side)])
            return
        tiles.append(kernel.registers(side, side))
        for r, row in enumerate(rows):
            T.buffer_store(tiles[-1], row, [r, span(0, side)])
    with kernel.serial(side) as r, kernel.vectorized(side) as lane:
        here = list(axes)
        here[plan.across], here[plan.along] = axes[plan.across] + r, axes[plan.along] + lane
        index = Index(value.shape, kernel.sizes, axes=tuple(here))
        for read, tile in zip(plan.reads, tiles, strict=True):
            kernel.know(read.view, index.permuted(read.order), tile[r, lane])
        output.store(index.flat(), kernel.load(value, index))


def _position(kernel: Kernel, axes: list[Any], strides: tuple[Size, ...], offset: Size = 0) -> Any:
    position = kernel.size(offset)
    for place, stride in zip(axes, strides, strict=True):
        position = position + place * kernel.size(stride)
    return settled(kernel, position)


@dataclass(frozen=True)
class _Zipped:
    """`count` rows of `view` that lie apart and are written element by element in turn, or the other way round."""

    view: View
    count: int
    apart: bool


def _zipped(value: Lazy | View) -> _Zipped | None:
    """Two or three rows only: more make a block."""
    if not isinstance(value, View) or value.dtype != "float32" or len(value.shape) < 2:
        return None
    (rows, columns), (down, right) = value.shape[-2:], value.strides[-2:]
    if isinstance(columns, int) and columns < _LEAST and down == 1:
        return _Zipped(value, columns, apart=True)
    if isinstance(rows, int) and rows < _LEAST and (down, right) == (1, rows):
        return _Zipped(value, rows, apart=False)
    return None


def _write_zipped(kernel: Kernel, zipped: _Zipped, output: Output) -> None:
    view, count, lanes = zipped.view, zipped.count, kernel.target.lanes
    outer, inner = view.shape[:-2], view.shape[-2] if zipped.apart else view.shape[-1]
    length = kernel.size(inner)
    memory = kernel.flat(view.storage)
    lines = tirx.truncdiv(length + (_TILE * lanes - 1), int64(_TILE * lanes))
    with shared_out(kernel, kernel.size(product(outer)) * lines, work(view, kernel.target)) as task:
        place = kernel.index(outer, linear=tirx.truncdiv(task, lines))
        axes = [place.axis(number) for number in range(len(outer))]
        source = _position(kernel, axes, view.strides[:-2], view.offset)
        result = settled(kernel, tirx.truncdiv(task, lines) * length * count)
        first = settled(kernel, tirx.truncmod(task, lines) * (_TILE * lanes))
        here = settled(kernel, tirx.min(length - first, int64(_TILE * lanes)))
        apart = (source, kernel.size(view.strides[-1])) if zipped.apart else (result, length)
        together = result if zipped.apart else source

        with kernel.serial(tirx.truncdiv(here, int64(lanes))) as step:
            at = settled(kernel, first + step * lanes)
            spread = [span(apart[0] + apart[1] * number + at, lanes) for number in range(count)]
            dense = [span(together + at * count + number * lanes, lanes) for number in range(count)]
            reads, writes = (spread, dense) if zipped.apart else (dense, spread)
            vectors = [T.bind(memory[position]) for position in reads]
            for number, position in enumerate(writes):
                places = [number * lanes + lane for lane in range(lanes)]
                if zipped.apart:
                    order = [flat % count * lanes + flat // count for flat in places]
                else:
                    order = [lane * count + number for lane in range(lanes)]
                T.buffer_store(output.flat, shuffled(vectors, order), [position])
        rest = settled(kernel, first + tirx.truncdiv(here, int64(lanes)) * lanes)
        with kernel.serial(tirx.truncmod(here, int64(lanes))) as step, kernel.serial(count) as number:
            row, flat = apart[0] + apart[1] * number + rest + step, together + (rest + step) * count + number
            source_at, result_at = (row, flat) if zipped.apart else (flat, row)
            output.store(result_at, memory[source_at])
