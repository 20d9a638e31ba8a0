"""Element-wise rule: any tree of lazy values over one index, stored once.

Rows (all axes but the last) are shared out between threads, columns run in vectors with a scalar tail. Where every
operand is read at its own linear position the tensor is one long row, cut into blocks. Columns that are joined from
several parts have a loop for each part, in which TVM's simplifier finds that nothing of the others is chosen.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

from tvm import tirx

from graphopt.backends.kernel import Code, Configuration, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.sizes import Shape, Size, product
from graphopt.backends.target import Target
from graphopt.backends.traffic import lazy_values
from graphopt.backends.values import Lazy, View, reads_flat

RULE = "pointwise"
_BLOCK = 4096  # elements of one task of a flat kernel
_FEW_LEFT = 8  # vectors of bytes of a row from which those that are left do not count
_MOST_BORDERS = 7  # more loops than one more than these are more code than is worth it
_SERIAL_UP_TO = 1 << 17  # operations on vectors of 16 in 2 to 4 us: less is not worth the 1.3 us of a parallel launch


def pointwise(value: Lazy | View, name: str, target: Target) -> Code:
    """The kernel that stores `value` contiguously."""
    flat = reads_flat(value, value.shape)
    lanes = target.lanes if flat else _lanes(value, target)

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        if target.lanes == 1:
            write_each(kernel, value, outputs[0])
        elif flat:
            write_flat(kernel, value, outputs[0])
        else:
            write_rows(kernel, value, outputs[0], lanes)

    order: Configuration = {"order": "flat", "block": _BLOCK} if flat else {"order": "rows"}
    configuration = {"lanes": lanes, **({"order": "each"} if target.lanes == 1 else order)}
    return write_kernel(
        RULE,
        name,
        target,
        [value],
        [(value.shape, value.dtype)],
        body,
        configuration=configuration,
        flops=operations([value], target),
    )


def shared_out(kernel: Kernel, extent: Any, operations_done: Size) -> AbstractContextManager[Any]:
    """A loop whose steps are shared out between threads, unless it is known to be too short."""
    few = isinstance(operations_done, int) and operations_done <= _SERIAL_UP_TO and kernel.target.lanes > 1
    return kernel.serial(extent) if few else kernel.parallel(extent)


def work(value: Lazy | View, target: Target) -> Size:
    """Operations of storing `value`; reading and writing an element is worth four."""
    return 4 * product(value.shape) + operations([value], target)


def write_each(kernel: Kernel, value: Any, output: Output) -> None:
    """Every element as a task of its own: a GPU's threads beside each other write beside each other."""
    with kernel.parallel(kernel.size(product(value.shape))) as position:
        output.store(position, kernel.load(value, kernel.index(value.shape, linear=position)))


def write_flat(kernel: Kernel, value: Any, output: Output) -> None:
    total = kernel.size(product(value.shape))
    lanes = kernel.target.lanes
    blocks = tirx.floordiv(total + (_BLOCK - 1), int64(_BLOCK))
    with shared_out(kernel, blocks, work(value, kernel.target)) as block:
        here = tirx.min(total - block * _BLOCK, int64(_BLOCK))
        with kernel.serial(tirx.truncdiv(here, int64(lanes))) as step, kernel.vectorized(lanes) as lane:
            position = block * _BLOCK + step * lanes + lane
            output.store(position, kernel.load(value, kernel.index(value.shape, linear=position)))
        kernel.forget()
        start = block * _BLOCK + tirx.truncdiv(here, int64(lanes)) * lanes
        with kernel.serial(tirx.truncmod(here, int64(lanes))) as step:
            output.store(start + step, kernel.load(value, kernel.index(value.shape, linear=start + step)))
        kernel.forget()


def _lanes(value: Lazy | View, target: Target) -> int:
    """Whole vectors of bytes where bytes are looked up and nothing else is done."""
    _, columns = split_rows(value.shape)
    wide = 4 * target.lanes
    bytes_only = isinstance(value, Lazy) and value.name == "table" and all(isinstance(x, View) for x in value.operands)
    fits = isinstance(columns, int) and (columns % wide == 0 or columns > _FEW_LEFT * wide)
    return wide if bytes_only and fits else target.lanes


def write_rows(kernel: Kernel, value: Any, output: Output, lanes: int = 0) -> None:
    rows, columns = split_rows(value.shape)
    width = kernel.size(columns)
    with shared_out(kernel, kernel.size(rows), work(value, kernel.target)) as row:
        for start, end in pairwise((0, *borders(value), columns)):

            def write(at: Any, start: int = start) -> None:
                column = start + at
                output.store(
                    row * width + column, kernel.load(value, kernel.index(value.shape, row=row, column=column))
                )

            for_columns(kernel, kernel.size(end - start), write, lanes)


def borders(value: Lazy | View) -> list[int]:
    """Columns at which another part of a tensor joined along its last axis begins; none where they are many."""
    found = {border for each in lazy_values([value]) if each.shape[-1:] == value.shape[-1:] for border in each.borders}
    return sorted(found) if len(found) <= _MOST_BORDERS else []


def for_columns(kernel: Kernel, width: Any, write: Any, lanes: int = 0) -> None:
    """Call `write(column)` in vectors, by default of the target's lanes, then for the columns that are left."""
    lanes = lanes or kernel.target.lanes
    with kernel.serial(tirx.truncdiv(width, int64(lanes))) as step, kernel.vectorized(lanes) as lane:
        write(step * lanes + lane)
    kernel.forget()
    start = tirx.truncdiv(width, int64(lanes)) * lanes
    with kernel.serial(tirx.truncmod(width, int64(lanes))) as step:
        write(start + step)
    kernel.forget()


def split_rows(shape: Shape) -> tuple[Any, Any]:
    """(product of all axes but the last, last axis); a scalar is one row of one column."""
    return product(shape[:-1]), shape[-1] if shape else 1
