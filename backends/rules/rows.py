"""Row rule: softmax, layer norm and RMS norm along the last axis, one row a task step.

A row is read two or three times and stays in the L1 cache. Sums run in several independent vectors, which hides the
latency of the additions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends import approximations
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import count_operations, operations
from graphopt.backends.rules.generic import combined, start_value
from graphopt.backends.rules.lanes import fold_lanes
from graphopt.backends.rules.pointwise import for_columns, split_rows
from graphopt.backends.sizes import Size, product
from graphopt.backends.target import Target
from graphopt.backends.values import View

RULE = "row-reduction"
_WAYS = 4  # independent vectors of partial sums
f32 = approximations.f32


class Rows:
    """One float32 tensor walked row by row inside a kernel."""

    def __init__(self, kernel: Kernel, value: Any) -> None:
        self.kernel, self.value = kernel, value
        rows, columns = split_rows(value.shape)
        self.count, self.width = kernel.size(rows), kernel.size(columns)
        self.columns: Size = columns
        self.lanes = kernel.target.lanes
        self.partial = kernel.registers(_WAYS, self.lanes)

    def at(self, row: Any, column: Any) -> Any:
        return self.kernel.load(self.value, self.kernel.index(self.value.shape, row=row, column=column))

    def fold(self, row: Any, combine: str, element: Callable[[Any, Any], Any]) -> Any:
        """Combine element(x, column) over the row; the result is a scalar read from a register."""
        kernel, partial, lanes = self.kernel, self.partial, self.lanes
        block = _WAYS * lanes
        for way in range(_WAYS):
            with kernel.vectorized(lanes) as lane:
                T.buffer_store(partial, start_value(combine, "float32"), [way, lane])

        def step(way: int, column: Any, lane: Any) -> None:
            value = element(self.at(row, column), column)
            T.buffer_store(partial, combined(combine, partial[way, lane], value), [way, lane])
            kernel.forget()

        with kernel.serial(tirx.truncdiv(self.width, int64(block))) as at:
            for way in range(_WAYS):
                with kernel.vectorized(lanes) as lane:
                    step(way, at * block + way * lanes + lane, lane)
        done = tirx.truncdiv(self.width, int64(block)) * block
        if not (isinstance(self.columns, int) and self.columns % block == 0):
            with kernel.serial(tirx.truncdiv(self.width - done, int64(lanes))) as at, kernel.vectorized(lanes) as lane:
                step(0, done + at * lanes + lane, lane)
            done = tirx.truncdiv(self.width, int64(lanes)) * lanes
        if not (isinstance(self.columns, int) and self.columns % lanes == 0):
            with kernel.serial(self.width - done) as at:
                step(0, done + at, int64(0))
        fold_lanes(kernel, partial, _WAYS, combine)
        result = kernel.registers(1)
        T.buffer_store(result, partial[0, 0], [0])
        return result[0]


def layer_norm(x: Any, weight: View | None, bias: View | None, epsilon: float, target: Target) -> Code:
    """(x - mean) / sqrt(variance + epsilon) weight + bias over the last axis; two passes, so no cancellation."""

    def row(kernel: Kernel, rows: Rows, output: Output, at: Any) -> None:
        inverse_width = f32(1) / rows.width.astype("float32")
        mean = kernel.registers(1)
        T.buffer_store(mean, rows.fold(at, "sum", lambda e, _: e) * inverse_width, [0])
        variance = rows.fold(at, "sum", lambda e, _: (e - mean[0]) * (e - mean[0])) * inverse_width
        scale = kernel.registers(1)
        T.buffer_store(scale, f32(1) / tirx.sqrt(variance + f32(epsilon)), [0])

        def write(column: Any) -> None:
            value = (rows.at(at, column) - mean[0]) * scale[0]
            value = value if weight is None else value * kernel.flat(weight.storage)[column]
            value = value if bias is None else value + kernel.flat(bias.storage)[column]
            output.store(at * rows.width + column, value)

        for_columns(kernel, rows.width, write)

    # Mean 1, variance 3, result 2 and one for each parameter.
    parameters = [v for v in (weight, bias) if v is not None]
    return _row_kernel("layer_norm", x, parameters, target, row, 6 + len(parameters))


def rms_norm(x: Any, weight: View | None, epsilon: float, target: Target) -> Code:
    """x / sqrt(mean(x^2) + epsilon) weight over the last axis."""

    def row(kernel: Kernel, rows: Rows, output: Output, at: Any) -> None:
        squares = rows.fold(at, "sum", lambda e, _: e * e)
        scale = kernel.registers(1)
        mean = squares * (f32(1) / rows.width.astype("float32"))
        T.buffer_store(scale, f32(1) / tirx.sqrt(mean + f32(epsilon)), [0])

        def write(column: Any) -> None:
            value = rows.at(at, column) * scale[0]
            output.store(
                at * rows.width + column, value if weight is None else value * kernel.flat(weight.storage)[column]
            )

        for_columns(kernel, rows.width, write)

    parameters = [weight] if weight is not None else []
    return _row_kernel("rms_norm", x, parameters, target, row, 3 + len(parameters))


def softmax(x: Any, target: Target, *, log: bool = False) -> Code:
    """Over the last axis; a row of nothing but -inf is NaN, as in PyTorch."""

    def row(kernel: Kernel, rows: Rows, output: Output, at: Any) -> None:
        top = kernel.registers(1)
        T.buffer_store(top, rows.fold(at, "max", lambda e, _: e), [0])
        if log:
            total = rows.fold(at, "sum", lambda e, _: approximations.exp(e - top[0]))
            shift = kernel.registers(1)
            T.buffer_store(shift, tirx.log(total), [0])
            for_columns(
                kernel,
                rows.width,
                lambda c: output.store(at * rows.width + c, rows.at(at, c) - top[0] - shift[0]),
            )
            return
        for_columns(
            kernel,
            rows.width,
            lambda c: output.store(at * rows.width + c, approximations.exp_nonpositive(rows.at(at, c) - top[0])),
        )
        inverse = kernel.registers(1)
        total = rows.fold(at, "sum", lambda _, column: output.flat[at * rows.width + column])
        T.buffer_store(inverse, f32(1) / total, [0])
        for_columns(
            kernel,
            rows.width,
            lambda c: output.store(at * rows.width + c, output.flat[at * rows.width + c] * inverse[0]),
        )

    def exponential(_: Kernel) -> Any:
        x = tirx.Var("x", "float32")
        return approximations.exp(x) if log else approximations.exp_nonpositive(x)

    # Largest 1, distance to it 1, exponential, sum 1, result 2 with the logarithm and 1 without.
    each = 4 + log + count_operations(target, exponential)
    return _row_kernel("log_softmax" if log else "softmax", x, [], target, row, each)


def _row_kernel(
    name: str,
    x: Any,
    others: list[View],
    target: Target,
    write_row: Callable[[Kernel, Rows, Output, Any], None],
    operations_each: int,
) -> Code:
    """`operations_each`: on one element of `x`, besides computing it."""

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        rows, _ = split_rows(x.shape)
        with kernel.parallel(kernel.size(rows)) as at:
            write_row(kernel, Rows(kernel, x), outputs[0], at)

    return write_kernel(
        RULE,
        name,
        target,
        [x, *others],
        [(x.shape, "float32")],
        body,
        configuration={"lanes": target.lanes, "ways": _WAYS},
        flops=operations_each * product(x.shape) + operations([x], target),
    )
