"""Rows in order, stably: merge sort, or for a few of the best a sorted list into which better elements are inserted.

Rows are shared out between threads. NaN counts as the largest number, as in PyTorch.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.approximations import is_nan
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.sizes import Size, product
from graphopt.backends.target import Target
from graphopt.backends.values import Index, View

RULE = "sort"
_MOST_KEPT = 64  # elements in a list; more are taken from a whole row in order
_MOST_PASSES = 62  # of a merge sort over rows whose length is known when it runs
_KEYS = {"float16": "float32", "bfloat16": "float32", "bool": "uint8"}


def sort(source: View, kept: Size, descending: bool, target: Target) -> Code:
    """The first `kept` elements of each row in order, and their positions as int64; equal ones keep their order."""
    insert = isinstance(kept, int) and kept <= _MOST_KEPT and kept != source.shape[-1]
    dtype = _KEYS.get(source.dtype, source.dtype)
    outer = source.shape[:-1]

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        with kernel.parallel(kernel.size(product(outer))) as row:
            _Row(kernel, source, dtype, descending, row).write(outputs, kept, insert)

    shape = (*outer, kept)
    return write_kernel(
        RULE,
        "topk" if insert else "sort",
        target,
        [source],
        [(shape, source.dtype), (shape, "int64")],
        body,
        configuration={"form": "insertion" if insert else "merge"},
        flops=0,
    )


class _Row:
    def __init__(self, kernel: Kernel, source: View, dtype: str, descending: bool, row: Any) -> None:
        self.kernel, self.source, self.dtype, self.descending, self.row = kernel, source, dtype, descending, row
        self.length = kernel.size(source.shape[-1])

    def write(self, outputs: list[Output], kept: Size, insert: bool) -> None:
        count = self.kernel.size(kept)
        keys, places, first = self.insert(int(kept)) if insert else self.merge()
        with self.kernel.serial(count) as at:
            outputs[0].store(self.row * count + at, keys[first + at])
            outputs[1].store(self.row * count + at, places[first + at])

    def load(self, position: Any) -> Any:
        where = self.kernel.index(self.source.shape[:-1], linear=self.row)
        axes = tuple(where.axis(number) for number in range(len(self.source.shape) - 1))
        index = Index(self.source.shape, self.kernel.sizes, axes=(*axes, position))
        return self.kernel.load(self.source, index).astype(self.dtype)

    def before(self, a: Any, b: Any) -> Any:
        """Whether `a` comes before `b`, which are not equal."""
        better = a > b if self.descending else a < b
        if "float" not in self.dtype:
            return better
        number, other = (b, a) if self.descending else (a, b)
        return tirx.any(better, tirx.all(tirx.Not(is_nan(number)), is_nan(other)))

    def insert(self, kept: int) -> tuple[Any, Any, Any]:
        """A list of the best so far, the best first."""
        kernel = self.kernel
        keys, places = kernel.registers(kept, dtype=self.dtype), kernel.registers(kept, dtype="int64")
        new, slot = kernel.registers(1, dtype=self.dtype), kernel.registers(1, dtype="int64")
        for buffer in (keys, places):
            with kernel.serial(kept) as at:
                T.buffer_store(buffer, tirx.const(0, str(buffer.dtype)), [at])
        with kernel.serial(self.length) as position:
            T.buffer_store(new, self.load(position), [0])
            with T.If(tirx.any(position < kept, self.before(new[0], keys[kept - 1]))), T.Then():
                T.buffer_store(slot, tirx.min(position, int64(kept - 1)), [0])
                with kernel.serial(kept - 1):
                    above = tirx.max(slot[0] - 1, int64(0))
                    with T.If(tirx.all(slot[0] > 0, self.before(new[0], keys[above]))), T.Then():
                        T.buffer_store(keys, keys[above], [slot[0]])
                        T.buffer_store(places, places[above], [slot[0]])
                        T.buffer_store(slot, above, [0])
                T.buffer_store(keys, new[0], [slot[0]])
                T.buffer_store(places, position, [slot[0]])
        return keys, places, int64(0)

    def merge(self) -> tuple[Any, Any, Any]:
        """Runs of 1, 2, 4, ... elements are merged pairwise, from one half of the working memory to the other."""
        kernel, length = self.kernel, self.length
        keys, places = kernel.scratch(length * 2, dtype=self.dtype), kernel.scratch(length * 2, dtype="int64")
        with kernel.serial(length) as at:
            T.buffer_store(keys, self.load(at), [at])
            T.buffer_store(places, at, [at])
        passes = kernel.registers(1, dtype="int64")
        T.buffer_store(passes, int64(0), [0])
        with kernel.serial(_MOST_PASSES) as step, T.If((int64(1) << step) < length), T.Then():
            T.buffer_store(passes, step + 1, [0])
        with kernel.serial(passes[0]) as step:
            width = int64(1) << step
            source = tirx.truncmod(step, int64(2)) * length
            with kernel.serial(tirx.truncdiv(length + width * 2 - 1, width * 2)) as pair:
                first = pair * width * 2
                middle, end = tirx.min(first + width, length), tirx.min(first + width * 2, length)
                self.merge_pair(keys, places, source, length - source, first, middle, end)
        return keys, places, tirx.truncmod(passes[0], int64(2)) * length

    def merge_pair(self, keys: Any, places: Any, source: Any, result: Any, first: Any, middle: Any, end: Any) -> None:
        kernel, last = self.kernel, self.length - 1
        heads, right = kernel.registers(2, dtype="int64"), kernel.registers(1, dtype="int64")
        T.buffer_store(heads, first, [0])
        T.buffer_store(heads, middle, [1])
        with kernel.serial(end - first) as at:
            a, b = (keys[source + tirx.min(heads[number], last)] for number in (0, 1))
            take = tirx.any(heads[0] >= middle, tirx.all(heads[1] < end, self.before(b, a)))
            T.buffer_store(right, tirx.Select(take, int64(1), int64(0)), [0])
            chosen = source + tirx.Select(right[0] > 0, heads[1], heads[0])
            T.buffer_store(keys, keys[chosen], [result + first + at])
            T.buffer_store(places, places[chosen], [result + first + at])
            T.buffer_store(heads, heads[0] + (int64(1) - right[0]), [0])
            T.buffer_store(heads, heads[1] + right[0], [1])
