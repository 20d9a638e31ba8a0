"""Running sums and products along one axis.

Along an axis that is not the innermost in memory the other columns run in vectors. Along the innermost one each sum
waits for the last, 4 cycles; 8 rows at a time hide that, one load, addition and store an element.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.rules.reduction import accumulated_in
from graphopt.backends.rules.windows import vector_width
from graphopt.backends.sizes import product
from graphopt.backends.target import Target
from graphopt.backends.values import Index, View

RULE = "scan"
_ROWS = 8  # summed up side by side along the innermost axis


def running(source: View, axis: int, dtype: str, target: Target, *, products: bool = False) -> Code:
    """out[..., i, ...] = sum of source[..., j, ...] over j <= i along `axis`, or product; `dtype` is the result's.

    float16 and bfloat16 are added up in float32.
    """
    last = len(source.shape) - 1

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        (_write_rows if axis == last else _write_columns)(kernel, source, axis, outputs[0], products)

    return write_kernel(
        RULE,
        "cumprod" if products else "cumsum",
        target,
        [source],
        [(source.shape, dtype)],
        body,
        configuration={"lanes": 1, "rows": _ROWS} if axis == last else {"lanes": target.lanes, "rows": 1},
        flops=product(source.shape) if "float" in dtype else 0,
    )


def _write_columns(kernel: Kernel, source: View, axis: int, output: Output, products: bool) -> None:
    outer = [number for number in range(len(source.shape) - 1) if number != axis]
    columns = kernel.size(source.shape[-1])
    lanes = vector_width(source.shape[-1], kernel.target)
    if not isinstance(source.shape[-1], int):
        lanes = kernel.target.lanes
    vectors = tirx.truncdiv(columns, int64(lanes))
    rest = columns - vectors * lanes
    tasks = vectors + rest
    with kernel.parallel(kernel.size(product(source.shape[number] for number in outer)) * tasks) as task:
        where = kernel.index(tuple(source.shape[n] for n in outer), linear=tirx.truncdiv(task, tasks))
        at: dict[int, Any] = {number: where.axis(n) for n, number in enumerate(outer)}
        part = tirx.truncmod(task, tasks)

        def add(width: int, column: Any) -> None:
            total = kernel.registers(width, dtype=accumulated_in(output.dtype))
            with kernel.vectorized(width) as lane:
                T.buffer_store(total, tirx.const(int(products), total.dtype), [lane])
            with kernel.serial(kernel.size(source.shape[axis])) as step, kernel.vectorized(width) as lane:
                position = {**at, axis: step, len(source.shape) - 1: column + lane}
                _accumulate(kernel, source, position, output, total, lane, products)

        with T.If(part < vectors):
            with T.Then():
                add(lanes, part * lanes)
            with T.Else():
                add(1, vectors * lanes + (part - vectors))


def _write_rows(kernel: Kernel, source: View, axis: int, output: Output, products: bool) -> None:
    outer = source.shape[:-1]
    rows = kernel.size(product(outer))

    def add(first: Any, count: int) -> None:
        places = [kernel.index(outer, linear=first + number) for number in range(count)]
        totals = kernel.registers(count, dtype=accumulated_in(output.dtype))
        for number in range(count):
            T.buffer_store(totals, tirx.const(int(products), totals.dtype), [number])
        with kernel.serial(kernel.size(source.shape[-1])) as step:
            for number, place in enumerate(places):
                position = {n: place.axis(n) for n in range(len(outer))} | {axis: step}
                _accumulate(kernel, source, position, output, totals, number, products)

    with kernel.parallel(tirx.truncdiv(rows + (_ROWS - 1), int64(_ROWS))) as task:
        first = task * _ROWS
        with T.If(first + _ROWS <= rows):
            with T.Then():
                add(first, _ROWS)
            with T.Else(), kernel.serial(rows - first) as row:
                add(first + row, 1)


def _accumulate(
    kernel: Kernel, source: View, position: dict[int, Any], output: Output, totals: Any, number: Any, products: bool
) -> None:
    index = Index(source.shape, kernel.sizes, axes=tuple(position[n] for n in range(len(source.shape))))
    value = kernel.load(source, index).astype(totals.dtype)
    T.buffer_store(totals, totals[number] * value if products else totals[number] + value, [number])
    output.store(index.flat(), totals[number])
