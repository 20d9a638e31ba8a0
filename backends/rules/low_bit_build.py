"""graphopt::lut_build in one pass over each row: the largest number of a group, then its codes or tables.

A group's numbers are read twice, the second time from the first-level cache. Tables are made a vector of entries at a
time: four activations times vectors of signs; the largest one adds up magnitudes. Rows are shared between
threads; one row is not worth a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.rules.lanes import fold_lanes
from graphopt.backends.sizes import Size, product
from graphopt.backends.target import Target
from graphopt.backends.values import View

RULE = "low-bit-build"
_LARGEST = 127
_INFINITE, _NAN = 0x7F800000, 0x7FC00000  # bits of float32
_ENTRIES = 16  # of a table
_QUAD = 4  # numbers that a table sums
_VECTORS = 4  # maxima and sums beside each other, so that none waits for another
_WORTH_SHARING = 1 << 15  # numbers that are worth a launch of threads


def build(x: View, group: int, table: str, target: Target) -> Code:
    """x [..., K] contiguous floats: codes or tables, scales and sums, as graphopt::lut_build says."""
    *outer, k = x.shape
    width, groups = int(k), -(-int(k) // group)
    exact = table == "exact"
    codes = (*outer, width) if exact else (*outer, -(-width // _QUAD), _ENTRIES)
    shapes = [(codes, "int8"), ((*outer, groups), "float32"), ((*outer, groups), "int32" if exact else "float32")]

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        _Build(kernel, x, min(group, width), outputs, exact).write()

    return write_kernel(
        RULE,
        f"lut_build_{table}",
        target,
        [x],
        shapes,
        body,
        configuration={"group": group, "table": table, "lanes": target.lanes},
        flops=(4 if exact else 3 * _ENTRIES) * product(x.shape),
    )


class _Build:
    def __init__(self, kernel: Kernel, x: View, group: int, outputs: list[Output], exact: bool) -> None:
        self.kernel, self.group, self.exact, self.lanes = kernel, group, exact, kernel.target.lanes
        self.x = kernel.flat(x.storage)
        self.codes, self.scale, self.sums = (output.flat for output in outputs)
        self.rows, self.width = product(x.shape[:-1]), int(x.shape[-1])
        self.groups = -(-self.width // group)

    def write(self) -> None:
        rows: Size = self.rows
        alone = isinstance(rows, int) and rows * self.width < _WORTH_SHARING
        last = self.width - (self.groups - 1) * self.group
        same = last == self.group
        write = self.write_codes if self.exact else self.write_tables
        if self.lanes == 1:
            self.write_apart(write, self.groups if same else self.groups - 1, last)
            return
        with (self.kernel.serial if alone else self.kernel.parallel)(self.kernel.size(rows)) as row:
            with self.kernel.serial(self.groups if same else self.groups - 1) as number:
                write(row, number, self.group)
            if not same:
                write(row, int64(self.groups - 1), last)

    def write_apart(self, write: Callable[[Any, Any, int], None], whole: int, last: int) -> None:
        """Each group of each row as a task, for a GPU."""
        kernel, rows = self.kernel, self.kernel.size(self.rows)
        if whole:
            with kernel.parallel(rows * whole) as task:
                write(tirx.truncdiv(task, int64(whole)), tirx.truncmod(task, int64(whole)), self.group)
        if whole < self.groups:
            with kernel.parallel(rows) as row:
                write(row, int64(whole), last)

    def write_codes(self, row: Any, number: Any, size: int) -> None:
        kernel = self.kernel
        at = T.bind(row * self.groups + number)
        start = T.bind(row * self.width + number * self.group)
        best, total = (kernel.registers(_VECTORS, self.lanes, dtype="int32") for _ in range(2))
        self.clear(best)
        for place, vector, count in self.parts(size):
            with kernel.vectorized(count) as lane:
                larger = tirx.max(best[vector, lane], _magnitude(self.number(start + place + lane)))
                T.buffer_store(best, larger, [vector, lane])
        fold_lanes(kernel, best, _VECTORS, "max")
        step = self.store_scale(at, best[0, 0])
        self.clear(total)
        for place, vector, count in self.parts(size):
            with kernel.vectorized(count) as lane:
                code = _code(self.number(start + place + lane) / step)
                T.buffer_store(self.codes, code.astype("int8"), [start + place + lane])
                T.buffer_store(total, total[vector, lane] + code, [vector, lane])
        fold_lanes(kernel, total, _VECTORS, "sum")
        T.buffer_store(self.sums, total[0, 0], [at])

    def write_tables(self, row: Any, number: Any, size: int) -> None:
        kernel, lanes = self.kernel, self.lanes
        at = T.bind(row * self.groups + number)
        start = T.bind(row * self.width + number * self.group)
        first = T.bind((row * -(-self.width // _QUAD) + number * (self.group // _QUAD)) * _ENTRIES)
        quads, rest = divmod(size, _QUAD)
        parts = range(0, _ENTRIES, lanes)
        best, entries = kernel.registers(1, dtype="int32"), kernel.registers(len(parts), lanes)
        total = kernel.registers(1)
        T.buffer_store(best, tirx.const(0, "int32"), [0])
        T.buffer_store(total, tirx.const(0.0, "float32"), [0])

        def enlarge(quad: Any, count: int) -> None:
            numbers = self.quad(start + quad * _QUAD, count)
            T.buffer_store(total, total[0] + sum(numbers[1:count], numbers[0]), [0])
            head, *others = (tirx.abs(number) for number in numbers)
            largest = sum(others, head)
            T.buffer_store(best, tirx.max(best[0], _magnitude(largest)), [0])

        def store(quad: Any, count: int, inverse: Any) -> None:
            numbers = self.quad(start + quad * _QUAD, count)
            for vector, part in enumerate(parts):
                self.fill(entries, vector, part, numbers)
                with kernel.vectorized(lanes) as lane:
                    code = _code(entries[vector, lane] * inverse).astype("int8")
                    T.buffer_store(self.codes, code, [first + quad * _ENTRIES + part + lane])

        with kernel.serial(quads) as quad:
            enlarge(quad, _QUAD)
        if rest:
            enlarge(int64(quads), rest)
        step = self.store_scale(at, best[0])
        inverse = T.bind(tirx.min(tirx.const(1.0, "float32") / step, tirx.max_value("float32")))
        with kernel.serial(quads) as quad:
            store(quad, _QUAD, inverse)
        if rest:
            store(int64(quads), rest, inverse)
        T.buffer_store(self.sums, total[0], [at])

    def quad(self, start: Any, count: int) -> list[Any]:
        """The numbers of one table; what is beyond the row is 0."""
        return [T.bind(self.number(start + n)) if n < count else tirx.const(0.0, "float32") for n in range(_QUAD)]

    def fill(self, entries: Any, vector: int, first: int, numbers: list[Any]) -> None:
        """Entries from `first` on: sums of numbers with the signs that the bits of an entry's number say."""
        lanes = self.lanes
        total = None
        for bit, number in enumerate(numbers):
            signs = [1.0 if first + entry >> bit & 1 else -1.0 for entry in range(lanes)]
            term = tirx.Broadcast(number, lanes) * _constants(signs)
            total = term if total is None else total + term
        T.buffer_store(entries, total, [vector, tirx.Ramp(int64(0), int64(1), lanes)])

    def store_scale(self, at: Any, largest: Any) -> Any:
        """Store a group's scale, given the bits of its largest magnitude; returns what its numbers are divided by."""
        finite = tirx.Select(largest < tirx.const(_INFINITE, "int32"), largest, tirx.const(_NAN, "int32"))
        scale = T.bind(tirx.reinterpret("float32", finite) / tirx.const(_LARGEST, "float32"))
        T.buffer_store(self.scale, scale, [at])
        zero = tirx.const(0.0, "float32")
        return T.bind(tirx.Select(scale > zero, scale, tirx.const(1.0, "float32")))

    def number(self, position: Any) -> Any:
        return self.x[position].astype("float32")

    def clear(self, buffer: Any) -> None:
        for vector in range(int(buffer.shape[0])):
            with self.kernel.vectorized(self.lanes) as lane:
                T.buffer_store(buffer, tirx.const(0, buffer.dtype), [vector, lane])

    def parts(self, size: int) -> Iterator[tuple[Any, int, int]]:
        """Where parts of a group begin, the vector of maxima and sums that is theirs, and how many lanes they have."""
        together = _VECTORS * self.lanes
        if size // together > 1:
            with self.kernel.serial(size // together) as block:
                for vector in range(_VECTORS):
                    yield block * together + vector * self.lanes, vector, self.lanes
        done = size // together * together if size // together > 1 else 0
        for vector in range((size - done) // self.lanes):
            yield int64(done + vector * self.lanes), vector % _VECTORS, self.lanes
        done = size - size % self.lanes
        part = self.lanes // 2
        while part:
            if size % self.lanes & part:
                yield int64(done), 0, part
                done += part
            part //= 2


def _magnitude(number: Any) -> Any:
    """The bits of |number|, ordered as int32 as the numbers are, with NaN above infinity: a maximum keeps it."""
    return tirx.reinterpret("int32", number) & tirx.const(0x7FFFFFFF, "int32")


def _code(number: Any) -> Any:
    """The nearest int32, halves to even."""
    least, most = (tirx.const(bound, "float32") for bound in (-float(_LARGEST), float(_LARGEST)))
    return tirx.round(tirx.max(tirx.min(number, most), least)).astype("int32")


def _constants(values: list[float]) -> Any:
    """A vector of these numbers."""
    return tirx.Shuffle([tirx.const(value, "float32") for value in values], list(range(len(values))))
