"""Row rule: softmax, layer norm, RMS norm and any reduction spread over its row again, four rows together.

A row is read two or three times and stays in the L1 cache; one that is computed where it is read, such as from codes,
is computed once and kept there. What follows element by element, such as a quantize, reads the results as they are
made. Four rows together hide the latency of each other's sums,
divisions and roots, share the loads of weights, and are folded to one vector of four numbers by six shuffles and three
additions. Rows that are left are computed one by one, in the same order of additions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends import approximations
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import count_operations, operations
from graphopt.backends.rules.generic import combined, start_value
from graphopt.backends.rules.lanes import fill_tile, fold_lanes, span, store_folded
from graphopt.backends.rules.pointwise import shared_out, split_rows
from graphopt.backends.rules.reduction import accumulated_in
from graphopt.backends.sizes import Shape, Size, product
from graphopt.backends.target import Target
from graphopt.backends.values import Lazy, Product, View, fused_name

RULE = "row-reduction"
_TOGETHER = 4  # rows
_WAYS = 2  # independent vectors of partial sums of one row
_ON_STACK = 1 << 16  # bytes of rows that are kept; more take workspace of the runtime
Ending = tuple[Product, Any]  # the result of a kernel, and the end of the element-wise tree over it
f32 = approximations.f32


class Rows:
    """Some rows of a float32 tensor; what is folded from them are buffers with one number a row."""

    def __init__(self, kernel: Kernel, value: Any, output: Output, first: Any, count: int) -> None:
        self.kernel, self.value, self.output = kernel, value, output
        self.numbers = [first + number for number in range(count)]
        self.here: Any = 0  # the row whose numbers are read
        self.columns: Size = split_rows(value.shape)[1]
        self.width = kernel.size(self.columns)
        self.lanes = kernel.target.lanes
        self.kept: Any = None  # [rows, columns] of float32

    def at(self, number: int, column: Any) -> Any:
        if self.kept is not None:
            return self.kept[self.kept_at(number, column)]
        return self.load(self.value, number, column).astype("float32")

    def room(self) -> Any:
        """Memory for a float32 for each element."""
        count, columns = len(self.numbers), self.columns
        if isinstance(columns, int) and 4 * count * columns <= _ON_STACK:
            return self.kernel.registers(count * columns)
        return self.kernel.scratch(self.width * count)

    def keep(self, element: Callable[[int, Any], Any]) -> None:
        """From here on the rows are element(number of the row, column), computed once."""
        room = self.room() if self.kept is None else self.kept

        def write(column: Any, _lane: Any, _way: int) -> None:
            for number in range(len(self.numbers)):
                T.buffer_store(room, element(number, column), [self.kept_at(number, column)])

        self.each_column(write)
        self.kept = room

    def kept_at(self, number: int, column: Any) -> Any:
        """Where in the rows that are kept an element lies."""
        return number * self.width + column

    def load(self, value: Any, number: int, column: Any) -> Any:
        self.here = number
        return self.kernel.load(value, self.kernel.index(value.shape, row=self.numbers[number], column=column))

    def each_column(self, write: Callable[[Any, Any, int], None]) -> None:
        """write(column, lane, way) in whole vectors, `_WAYS` of them beside each other, then in what is left.

        A known rest is cut into vectors of 8, 4, 2 and 1 lanes, an unknown one into single columns.
        """
        kernel, lanes, block = self.kernel, self.lanes, _WAYS * self.lanes

        def vector(first: Any, count: int, way: int) -> None:
            with kernel.vectorized(count) as lane:
                write(first + lane, lane, way)

        blocks = tirx.truncdiv(self.width, int64(block))
        with kernel.serial(blocks) as at:
            for way in range(_WAYS):
                vector(at * block + way * lanes, lanes, way)
        if isinstance(self.columns, int):
            done = self.columns // block * block
            while done < self.columns:
                count = min(lanes, 1 << (self.columns - done).bit_length() - 1)
                vector(int64(done), count, 0)
                done += count
            return
        with kernel.serial(tirx.truncdiv(self.width - blocks * block, int64(lanes))) as at:
            vector(blocks * block + at * lanes, lanes, 0)
        done = tirx.truncdiv(self.width, int64(lanes)) * lanes
        with kernel.serial(self.width - done) as at:
            write(done + at, int64(0), 0)
            kernel.forget()

    def fold(self, combine: str, element: Callable[[Any, int, Any], Any]) -> Any:
        """Combine element(x, number of the row, column) over every row."""
        return self.fold_together(combine, lambda column: [element(x, r, column) for r, x in self.loaded(column)])

    def loaded(self, column: Any) -> list[tuple[int, Any]]:
        return [(number, self.at(number, column)) for number in range(len(self.numbers))]

    def fold_together(self, combine: str, elements: Callable[[Any], list[Any]]) -> Any:
        """Combine over every row what `elements(column)` gives for all rows; "max" may lose NaN."""
        kernel, lanes, count = self.kernel, self.lanes, len(self.numbers)
        partial = kernel.registers(count, _WAYS, lanes)
        fill_tile(kernel, partial, count, _WAYS, 0.0 if combine == "sum" else -math.inf)
        apply = tirx.max if combine == "max" else lambda a, b: a + b

        def step(column: Any, lane: Any, way: int) -> None:
            for r, value in enumerate(elements(column)):
                T.buffer_store(partial, apply(partial[r, way, lane], value), [r, way, lane])

        self.each_column(step)
        whole = span(0, lanes)
        vectors = [T.bind(apply(partial[r, 0, whole], partial[r, 1, whole])) for r in range(count)]
        result = kernel.registers(1 << (count - 1).bit_length())
        store_folded(kernel, result, vectors, combine)
        return result

    def fold_exactly(self, combine: str) -> Any:
        """Combine every row; max and min keep NaN."""
        kernel, lanes, count = self.kernel, self.lanes, len(self.numbers)
        partial = [kernel.registers(_WAYS, lanes) for _ in range(count)]
        for each in partial:
            for way in range(_WAYS):
                with kernel.vectorized(lanes) as lane:
                    T.buffer_store(each, start_value(combine, "float32"), [way, lane])

        def step(column: Any, lane: Any, way: int) -> None:
            for each, (_, value) in zip(partial, self.loaded(column), strict=True):
                T.buffer_store(each, combined(combine, each[way, lane], value), [way, lane])

        self.each_column(step)
        result = kernel.registers(count)
        for number, each in enumerate(partial):
            fold_lanes(kernel, each, _WAYS, combine)
            T.buffer_store(result, each[0, 0], [number])
        return result

    def define(self, product_value: Product, element: Callable[[Any], Any]) -> None:
        """From here on `product_value` is element(number of the row), computed once a row.

        Narrow floats are rounded and kept in float32, since TVM cannot bind all of them.
        """
        kept = accumulated_in(product_value.dtype)
        result = self.kernel.registers(len(self.numbers), dtype=kept)
        with self.kernel.vectorized(len(self.numbers)) as number:
            self.here = number
            T.buffer_store(result, element(number).astype(product_value.dtype).astype(kept), [number])
        self.kernel.define(product_value, lambda _: result[self.here].astype(product_value.dtype))

    def numbers_of(self, vector: Any) -> Any:
        """A vector with one number a row as a buffer."""
        count = len(self.numbers)
        result = self.kernel.registers(count)
        T.buffer_store(result, vector, [span(0, count) if count > 1 else int64(0)])
        return result

    def map(self, numbers: Any, function: Callable[[Any], Any]) -> Any:
        """function(number) of every row, in a new buffer."""
        result = self.kernel.registers(len(self.numbers))
        with self.kernel.vectorized(len(self.numbers)) as number:
            T.buffer_store(result, function(numbers[number]), [number])
        return result

    def store(self, element: Callable[[Any, int, Any], Any], ending: Ending | None = None) -> None:
        """Store element(x, number of the row, column) everywhere, or the end of the tree that reads it."""

        def write(column: Any, _lane: Any, _way: int) -> None:
            for number, x in self.loaded(column):
                value = element(x, number, column)
                if ending is not None:
                    result, end = ending
                    made = T.bind(value)
                    self.kernel.define(result, lambda _, made=made: made)  # type: ignore[misc]
                    value = self.load(end, number, column)
                self.output.store(self.position(number, column), value)

        self.each_column(write)

    def position(self, number: int, column: Any) -> Any:
        return self.numbers[number] * self.width + column


def layer_norm(
    x: Any,
    weight: View | None,
    bias: View | None,
    epsilon: float,
    target: Target,
    dtype: str = "float32",
    ending: Ending | None = None,
) -> Code:
    """(x - mean) / sqrt(variance + epsilon) weight + bias over the last axis; two passes, so no cancellation.

    Computed in float32 and rounded to `dtype`, or as the `ending` has it.
    """

    def write(rows: Rows) -> None:
        flat = rows.kernel.flat
        inverse_width = f32(1) / rows.width.astype("float32")
        mean = rows.map(rows.fold("sum", lambda e, *_: e), lambda total: total * inverse_width)
        squares = rows.fold("sum", lambda e, r, _: (e - mean[r]) * (e - mean[r]))
        scale = rows.map(squares, lambda total: f32(1) / tirx.sqrt(total * inverse_width + f32(epsilon)))

        def element(e: Any, r: int, column: Any) -> Any:
            value = (e - mean[r]) * scale[r]
            value = value if weight is None else value * flat(weight.storage)[column]
            return value if bias is None else value + flat(bias.storage)[column]

        rows.store(element, ending)

    # Mean 1, variance 3, result 2 and one for each parameter.
    parameters = [v for v in (weight, bias) if v is not None]
    return _ending_kernel("layer_norm", x, parameters, target, write, 6 + len(parameters), dtype, ending)


def rms_norm(
    x: Any,
    weight: View | None,
    epsilon: float,
    target: Target,
    dtype: str = "float32",
    ending: Ending | None = None,
) -> Code:
    """x / sqrt(mean(x^2) + epsilon) weight over the last axis; computed and rounded as `layer_norm` is."""

    def write(rows: Rows) -> None:
        inverse_width = f32(1) / rows.width.astype("float32")
        squares = rows.fold("sum", lambda e, *_: e * e)
        scale = rows.map(squares, lambda total: f32(1) / tirx.sqrt(total * inverse_width + f32(epsilon)))

        def element(e: Any, r: int, column: Any) -> Any:
            return e * scale[r] if weight is None else e * scale[r] * rows.kernel.flat(weight.storage)[column]

        rows.store(element, ending)

    parameters = [weight] if weight is not None else []
    return _ending_kernel("rms_norm", x, parameters, target, write, 3 + len(parameters), dtype, ending)


def softmax(x: Any, target: Target, *, log: bool = False, ending: Ending | None = None) -> Code:
    """Over the last axis, then the `ending`; a row of nothing but -inf is NaN, as in PyTorch."""

    def write(rows: Rows) -> None:
        top = rows.fold("max", lambda e, *_: e)

        def powers(column: Any) -> list[Any]:
            return _exponentials([e - top[r] for r, e in rows.loaded(column)])

        if log:
            shift = rows.map(rows.fold_together("sum", powers), tirx.log)
            rows.store(lambda e, r, _: e - top[r] - shift[r], ending)
            return
        if ending is None:
            memory, place = rows.output.flat, rows.position
        else:
            memory, place = rows.room() if rows.kept is None else rows.kept, rows.kept_at

        def stored(column: Any) -> list[Any]:
            values = [T.bind(value) for value in powers(column)]
            for r, value in enumerate(values):
                T.buffer_store(memory, value, [place(r, column)])
            return values

        inverse = rows.map(rows.fold_together("sum", stored), lambda total: f32(1) / total)

        def scaled(column: Any, _lane: Any, _way: int) -> None:
            for r in range(len(rows.numbers)):
                at = place(r, column)
                T.buffer_store(memory, memory[at] * inverse[r], [at])

        if ending is None:
            rows.each_column(scaled)
        else:
            rows.kept = memory
            rows.store(lambda e, r, _: e * inverse[r], ending)

    # Largest 1, distance to it 1, exponential, sum 1, result 2 with the logarithm and 1 without.
    each = 4 + log + _exponential_operations(target)
    return _ending_kernel("log_softmax" if log else "softmax", x, [], target, write, each, "float32", ending)


def largest_probability(x: Any, result: Product, end: Any, target: Target) -> Code:
    """`end`, one element a row, reading `result`, the largest of softmax(x) in each row: 1 / sum(exp(x - max))."""

    def write(rows: Rows) -> None:
        kernel = rows.kernel
        top = rows.fold("max", lambda e, *_: e)
        total = rows.fold_together("sum", lambda at: _exponentials([e - top[r] for r, e in rows.loaded(at)]))
        rows.define(result, lambda number: f32(1) / total[number])
        for number, row in enumerate(rows.numbers):
            rows.here = number
            rows.output.store(row, kernel.load(end, kernel.index(end.shape, linear=row)))

    each = 3 + _exponential_operations(target)  # largest 1, distance to it 1, sum 1
    return _row_kernel(fused_name("pmax", end), x, [end], target, write, each, end.dtype, end.shape)


def reduced_rows(
    x: Any,
    combine: str,
    finish: Callable[[Kernel, Any], Any],
    result: Product,
    steps: Sequence[tuple[Product, Lazy]],
    end: Any,
    target: Target,
) -> Code:
    """`end`, of the rows and columns of `x`, reading `result`, which is finish(combine over the last axis of `x`).

    `steps` have one element a row. Each is computed from earlier ones, once a row, and read as its Product.
    """

    def write(rows: Rows) -> None:
        kernel, first = rows.kernel, rows.numbers[0]
        total = rows.fold("sum", lambda e, *_: e) if combine == "sum" else rows.fold_exactly(combine)
        rows.define(result, lambda number: finish(kernel, total[number]))

        def step_of(value: Lazy) -> Callable[[Any], Any]:
            return lambda number: kernel.load(value, kernel.index(value.shape, linear=first + number))

        for number, value in steps:
            rows.define(number, step_of(value))

        def store(column: Any, _lane: Any, _way: int) -> None:
            for number in range(len(rows.numbers)):
                rows.output.store(rows.position(number, column), rows.load(end, number, column))

        rows.each_column(store)

    values = [*(value for _, value in steps), end]
    name = combine
    for value in values:
        name = fused_name(name, value)
    each = 1 if combine == "sum" else 2
    return _row_kernel(name, x, values, target, write, each, end.dtype)


def _exponentials(distances: list[Any]) -> list[Any]:
    return approximations.exp2_nonpositive(*(distance * f32(1 / math.log(2)) for distance in distances))


def _exponential_operations(target: Target) -> int:
    return count_operations(target, lambda _: _exponentials([tirx.Var("x", "float32")])[0])


def _ending_kernel(
    name: str,
    x: Any,
    others: Sequence[View | Lazy],
    target: Target,
    write: Callable[[Rows], None],
    operations_each: int,
    dtype: str,
    ending: Ending | None,
) -> Code:
    """A kernel of this `dtype`, or of what is at the end of the tree over its result."""
    name = f"{fused_name('', x)}_{name}" if isinstance(x, Lazy) else name

    def write_kept(rows: Rows) -> None:
        if isinstance(x, Lazy):
            rows.keep(rows.at)
        write(rows)

    if ending is None:
        return _row_kernel(name, x, others, target, write_kept, operations_each, dtype)
    _, end = ending
    values = [*others, end]
    return _row_kernel(fused_name(name, end), x, values, target, write_kept, operations_each, end.dtype, end.shape)


def _row_kernel(
    name: str,
    x: Any,
    others: Sequence[View | Lazy],
    target: Target,
    write: Callable[[Rows], None],
    operations_each: int,
    dtype: str = "float32",
    shape: Shape | None = None,
) -> Code:
    """`operations_each`: on one element of `x`, besides computing it. `shape` is that of the result, if not of `x`."""
    count, _ = split_rows(x.shape)
    flops = operations_each * product(x.shape) + operations([x, *others], target)

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        rows = kernel.size(count)

        def some(first: Any, number: int) -> None:
            write(Rows(kernel, x, outputs[0], first, number))

        groups = tirx.truncdiv(rows + (_TOGETHER - 1), int64(_TOGETHER))
        with shared_out(kernel, groups, flops) as group:
            first = group * _TOGETHER
            if isinstance(count, int) and count % _TOGETHER == 0:
                some(first, _TOGETHER)
                return
            with T.If(first + _TOGETHER <= rows):
                with T.Then():
                    some(first, _TOGETHER)
                with T.Else(), kernel.serial(tirx.min(int64(_TOGETHER), rows - first)) as rest:
                    some(first + rest, 1)

    return write_kernel(
        RULE,
        name,
        target,
        [x, *others],
        [(x.shape if shape is None else shape, dtype)],
        body,
        configuration={"lanes": target.lanes, "rows": _TOGETHER, "ways": _WAYS},
        flops=flops,
    )
