"""Elements written to places that are read from memory, over a copy of a tensor or into the tensor itself.

Tasks write to places of their own and are shared out between threads; the steps of a task may meet in one place, and
run one after the other, so that the result does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tvm import tirx

from graphopt.backends.kernel import Code, Kernel, Output, write_kernel
from graphopt.backends.rules.generic import combined, start_value
from graphopt.backends.rules.pointwise import for_columns, shared_out, write_rows
from graphopt.backends.sizes import Shape, Size, product
from graphopt.backends.target import Target
from graphopt.backends.values import Index

RULE = "scatter"
_NARROW = ("float16", "bfloat16")
Places = Callable[[Kernel, Index, Index, Any], tuple[Index, Any]]


def scatter(
    base: Any,
    reads: Sequence[Any],
    tasks: Shape,
    steps: Shape,
    columns: Size | None,
    places: Places,
    combine: str,
    include_base: bool,
    target: Target,
    in_place: bool = False,
) -> Code:
    """A copy of `base` with elements written to it.

    places(kernel, task, step, column) is the index in `base` and the element; with `columns`, the last axis of `base`
    is not chosen by a step, and is written in vectors. `combine` is "set", or how an element joins what is there; with
    `include_base` off, what was there before the first one counts for nothing. `in_place`: the output is the memory of
    `base`, whose other elements stay.
    """
    dtype = base.dtype

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        if not in_place:
            write_rows(kernel, base, outputs[0])
        count = product(tasks)
        with shared_out(kernel, kernel.size(count), product((*tasks, *steps, columns or target.lanes))) as task:
            here = kernel.index(tasks, linear=task)
            if combine != "set" and not include_base:
                each_step(kernel, here, lambda at, _: outputs[0].store(at, start_value(combine, dtype)))
            each_step(kernel, here, lambda at, value: outputs[0].store(at, _joined(combine, outputs[0], at, value)))

    def each_step(kernel: Kernel, here: Index, write: Callable[[Any, Any], None]) -> None:
        with kernel.serial(kernel.size(product(steps))) as step:
            there = kernel.index(steps, linear=step)

            def write_at(column: Any) -> None:
                index, value = places(kernel, here, there, column)
                write(index.flat(), value)

            if columns is None:
                write_at(None)
                kernel.forget()
            else:
                for_columns(kernel, kernel.size(columns), write_at)

    code = write_kernel(
        RULE,
        "scatter" if combine == "set" else f"scatter_{combine}",
        target,
        reads if in_place else [base, *reads],
        [(base.shape, dtype)],
        body,
        configuration={"lanes": 1 if columns is None else target.lanes},
        flops=0 if combine == "set" or "float" not in dtype else product((*tasks, *steps)),
        extra_shapes=[tasks, steps],
    )
    return replace(code, written=product((*tasks, *steps, columns or 1))) if in_place else code


def _joined(combine: str, output: Output, at: Any, value: Any) -> Any:
    if combine == "set":
        return value
    before, dtype = output.flat[at], output.dtype
    if dtype == "bool":
        return tirx.any(before, value) if combine in ("sum", "max") else tirx.all(before, value)
    if dtype in _NARROW:
        return combined(combine, before.astype("float32"), value.astype("float32")).astype(dtype)
    return combined(combine, before, value)
