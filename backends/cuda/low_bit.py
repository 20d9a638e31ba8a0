"""y = x W with W's codes of 1 to 8 bits taken apart in registers, for any number of rows.

A block makes the results of one panel of outputs for some rows. Beside each other in a warp are neighbouring outputs,
whose words lie beside each other, so that a warp reads whole lines; warps take turns at the groups. Each thread sums
the products of a group in int32 by `dp4a`, which is exact, and leaves scale times sum in shared memory; then the
numbers of each result are added up in the order of groups. The CPU's kernels do so too: int32 sums are equal to theirs,
results to rounding, as compilers fuse other multiplications with additions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cuda.threads import threads
from graphopt.backends.integer_instructions import multiply_quads
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.low_bit_codes import EVERY, Groups, Operands, Unpacking
from graphopt.backends.rules.low_bit_layout import QUAD
from graphopt.backends.sizes import product
from graphopt.backends.target import Target
from graphopt.backends.values import Product, fused_name

RULE = "cuda-low-bit"
WARP = 32
_WARPS = 8
_THREADS = WARP * _WARPS
_ROWS = 4  # of a block, where there are so many
_SHARED = 32 << 10  # bytes of numbers that wait to be added up


def gemv(operands: Operands, result: Product, end: Any, name: str, target: Target) -> Code:
    """y[row, n] as graphopt::lut_gemv says, then the element-wise tree `end` over `result`."""
    layout = operands.layout
    rows = product(result.shape[:-1])
    together = min(rows, _ROWS) if isinstance(rows, int) else _ROWS

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        _Gemv(kernel, operands, result, end, outputs[0], together).write()

    return write_kernel(
        RULE,
        fused_name(name, end),
        target,
        [*operands.views(), end],
        [(end.shape, end.dtype)],
        body,
        configuration={
            "bits": layout.bits,
            "group": layout.group,
            "threads": _THREADS,
            "vectors": layout.vectors,
            "rows": together,
        },
        flops=2 * rows * layout.n * layout.k + operations([end], target),
    )


class _OfThread(Unpacking):
    """Takes the words of one thread's outputs apart: of each vector of words, one."""

    lane: Any

    def word(self, start: Any, number: int) -> Any:
        return T.bind(self.weight[start + number * WARP + self.lane])

    def tags(self, start: Any) -> list[Any]:
        tag = self.operands.tag
        if tag is None:
            return []
        flat = self.kernel.flat(tag.storage)
        places = [start + vector * WARP + self.lane for vector in range(self.layout.vectors)]
        return [T.bind(flat[place].astype("uint32") * self.same(EVERY << self.layout.bits)) for place in places]

    def looked_up(self, code: Any) -> Any:
        book = self.operands.book
        assert book is not None
        entries, code, word = self.kernel.flat(book.storage), T.bind(code), tirx.const(0, "uint32")
        for byte in range(QUAD):
            place = code >> tirx.const(8 * byte, "uint32") & tirx.const(0xFF, "uint32")
            word = word | entries[place.astype("int32")].astype("uint32") << tirx.const(8 * byte, "uint32")
        return word


def _same(total: Any, _index: Any) -> Any:
    return total


class _Gemv:
    def __init__(
        self, kernel: Kernel, operands: Operands, result: Product, end: Any, output: Output, together: int
    ) -> None:
        self.kernel, self.operands, self.layout = kernel, operands, operands.layout
        self.result, self.end, self.output, self.together = result, end, output, together
        self.rows = kernel.size(product(result.shape[:-1]))
        self.unpacking, self.groups = _OfThread(kernel, operands), Groups(kernel, operands)
        self.codes = kernel.words(operands.codes.storage, "uint32")
        self.sums = together * self.layout.outputs  # results of a block
        self.each = -(-self.sums // _THREADS)  # results of a thread
        most = max(_WARPS, _SHARED // (4 * self.sums) // _WARPS * _WARPS)
        self.chunk = min(most, -(-self.layout.groups // _WARPS) * _WARPS)  # groups whose numbers wait together

    def write(self) -> None:
        kernel, panels = self.kernel, self.layout.panels
        tiles = tirx.truncdiv(self.rows + (self.together - 1), int64(self.together))
        with kernel.parallel(tiles * panels) as block:
            panel = T.bind(tirx.truncmod(block, int64(panels)))
            first_row = T.bind(tirx.truncdiv(block, int64(panels)) * self.together)
            numbers = kernel.registers(1, self.chunk, self.sums)
            totals = kernel.registers(_THREADS, self.each)
            with threads(_THREADS) as thread:
                for number in range(self.each):
                    T.buffer_store(totals, tirx.const(0.0, "float32"), [thread, number])
            with kernel.serial(-(-self.layout.groups // self.chunk)) as chunk:
                begin = T.bind(chunk * self.chunk)
                with threads(_THREADS) as thread:
                    self._write_numbers(numbers, thread, panel, first_row, begin)
                with threads(_THREADS) as thread:
                    self._add_up(numbers, totals, thread, begin)
            with threads(_THREADS) as thread:
                self._store(totals, thread, panel, first_row)

    def _write_numbers(self, numbers: Any, thread: Any, panel: Any, first_row: Any, begin: Any) -> None:
        """What the groups of a chunk add to each result of the block."""
        kernel, layout = self.kernel, self.layout
        warp = T.bind(tirx.truncdiv(thread, int64(WARP)))
        self.unpacking.lane = lane = T.bind(tirx.truncmod(thread, int64(WARP)))
        sums = kernel.registers(self.together, layout.vectors, dtype="int32")
        with kernel.serial(self.chunk // _WARPS) as turn:
            place = T.bind(turn * _WARPS + warp)
            group = T.bind(begin + place)
            with T.If(group < layout.groups), T.Then():
                at = T.bind(panel * layout.groups + group)
                rows = [T.bind(tirx.min(first_row + r, self.rows - 1)) for r in range(self.together)]
                self._multiply(sums, rows, group, at)
                for r, row in enumerate(rows):
                    of_row = self.groups.row(row, group)
                    for c in range(layout.vectors):
                        scales = at * layout.outputs + c * WARP + lane
                        number = self.groups.number(of_row, sums[r, c], scales)
                        T.buffer_store(numbers, number, [0, place, (r * layout.vectors + c) * WARP + lane])

    def _multiply(self, sums: Any, rows: list[Any], group: Any, at: Any) -> None:
        """The exact sums of products of a group."""
        kernel, layout = self.kernel, self.layout
        for r in range(self.together):
            for c in range(layout.vectors):
                T.buffer_store(sums, tirx.const(0, "int32"), [r, c])
        tags = self.unpacking.tags(T.bind(at * layout.outputs))
        starts = [T.bind(row * (layout.packed_k // QUAD) + group * (layout.depth // QUAD)) for row in rows]
        with kernel.serial(layout.steps) as step:
            start = T.bind((at * layout.steps + step) * (layout.step_vectors * WARP))
            words = [self.unpacking.word(start, number) for number in range(layout.step_vectors)]
            for quad in range(layout.quads):
                for c in range(layout.vectors):
                    value = self.unpacking.value(words, quad, c, tags)
                    for r in range(self.together):
                        code = self.codes[starts[r] + step * layout.quads + quad]
                        T.buffer_store(sums, multiply_quads(sums[r, c], value, code, 1), [r, c])

    def _results(self, thread: Any) -> list[Any]:
        """The numbers of a thread's results among those of the block."""
        return [thread + number * _THREADS for number in range(self.each)]

    def _add_up(self, numbers: Any, totals: Any, thread: Any, begin: Any) -> None:
        count = tirx.min(int64(self.chunk), self.layout.groups - begin)
        for number, at in enumerate(self._results(thread)):
            with T.If(at < self.sums), T.Then(), self.kernel.serial(count) as place:
                total = totals[thread, number] + numbers[0, place, at]
                T.buffer_store(totals, total, [thread, number])

    def _store(self, totals: Any, thread: Any, panel: Any, first_row: Any) -> None:
        kernel, outputs = self.kernel, self.layout.outputs
        for number, at in enumerate(self._results(thread)):
            row = first_row + tirx.truncdiv(at, int64(outputs))
            column = panel * outputs + tirx.truncmod(at, int64(outputs))
            inside = tirx.all(at < self.sums, row < self.rows, column < self.layout.n)
            with T.If(inside), T.Then():
                total = totals[thread, number]
                kernel.define(self.result, partial(_same, total))
                index = kernel.index(self.end.shape, row=row, column=column)
                self.output.store(index.flat(), kernel.load(self.end, index))
            kernel.forget()
