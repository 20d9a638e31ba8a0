"""The counted slow path: any reduction as plain loops, output columns in vectors, one accumulator.

Correct for every shape and never tuned: `compile` lists its kernels. The reduced axes run innermost in a fixed order,
so the result does not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Kernel, Output, int64, write_kernel
from graphopt.backends.operations import axes_of, count_operations, operations
from graphopt.backends.rules.pointwise import split_rows
from graphopt.backends.sizes import Shape, Size, product
from graphopt.backends.values import Index, View

if TYPE_CHECKING:
    from graphopt.backends.lowering import Lowering

RULE = "generic"
Element = Callable[[Kernel, Index, tuple[Any, ...]], Any]


def start_value(combine: str, dtype: str) -> Any:
    """What combining starts from: 0 for sums, 1 for products, the lowest or highest value for max and min."""
    if combine in ("sum", "product"):
        return tirx.const(0 if combine == "sum" else 1, dtype)
    if "float" in dtype:
        return tirx.const(-math.inf if combine == "max" else math.inf, dtype)
    if dtype == "bool":
        return tirx.const(combine == "min", "bool")
    return tirx.min_value(dtype) if combine == "max" else tirx.max_value(dtype)


def combined(combine: str, a: Any, b: Any) -> Any:
    """max and min keep NaN, as PyTorch does."""
    if combine == "sum":
        return a + b
    if combine == "product":
        return a * b
    better = tirx.Select(b > a if combine == "max" else b < a, b, a)
    kind = str(b.ty.dtype)
    if "float" not in kind:
        return better
    # A NaN in `a` stays, since comparisons with it are false. TVM keeps this one and would turn its opposite around.
    return tirx.Select(b <= tirx.const(math.inf, kind), better, b)


def reduce_generic(
    lowering: Lowering,
    name: str,
    shape: Shape,
    dtype: str,
    depth: Sequence[Size],
    reads: Sequence[Any],
    element: Element,
    combine: str,
    finish: Callable[[Kernel, Any], Any] = lambda kernel, total: total,
    rule: str = RULE,
) -> View:
    """out[index] = finish(combine over all positions in `depth` of element(index, position))."""
    accumulate = "float32" if dtype in ("float16", "bfloat16") else dtype

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        rows, columns = split_rows(shape)
        width, lanes = kernel.size(columns), kernel.target.lanes

        def write(row: Any, first: Any, vector: int) -> None:
            total = kernel.registers(vector, dtype=accumulate)

            def each(value: Callable[[Any], Any]) -> None:
                with kernel.vectorized(vector) as lane:
                    T.buffer_store(total, value(lane), [lane])

            def inner(position: tuple[Any, ...]) -> None:
                def value(lane: Any) -> Any:
                    index = kernel.index(shape, row=row, column=first + lane)
                    return combined(combine, total[lane], element(kernel, index, position).astype(accumulate))

                each(value)

            each(lambda lane: start_value(combine, accumulate))
            _nest(kernel, list(depth), (), inner)
            with kernel.vectorized(vector) as lane:
                outputs[0].store(row * width + first + lane, finish(kernel, total[lane]))
            kernel.forget()

        with kernel.parallel(kernel.size(rows)) as row:
            with kernel.serial(tirx.truncdiv(width, int64(lanes))) as step:
                write(row, step * lanes, lanes)
            start = tirx.truncdiv(width, int64(lanes)) * lanes
            with kernel.serial(tirx.truncmod(width, int64(lanes))) as step:
                write(row, start + step, 1)

    def term(kernel: Kernel) -> Any:
        value = element(kernel, Index(shape, kernel.sizes, axes=axes_of(shape)), axes_of(tuple(depth)))
        return combined(combine, tirx.Var("total", accumulate), value.astype(accumulate))

    each = count_operations(lowering.target, term) + ("float" in accumulate and combine in ("max", "min"))
    (stored,) = lowering.call(
        write_kernel(
            rule,
            name,
            lowering.target,
            reads,
            [(shape, dtype)],
            body,
            configuration={"lanes": lowering.target.lanes, "vector": "last axis", "accumulators": 1},
            flops=each * product(shape) * product(depth) + operations(reads, lowering.target),
            extra_shapes=[tuple(depth)],
        )
    )
    return stored


def _nest(
    kernel: Kernel, extents: list[Size], position: tuple[Any, ...], inner: Callable[[tuple[Any, ...]], None]
) -> None:
    if not extents:
        inner(position)
        return
    with kernel.serial(kernel.size(extents[0])) as at:
        _nest(kernel, extents[1:], (*position, at), inner)
