"""Products of two computed tensors of 8-bit codes with int32 sums: the float32 product with words of codes for numbers.

Where the target multiplies bytes a word is four codes, of which the right ones are signed: unsigned ones become so less
128. A task packs a panel of the right operand as [K / codes, columns, codes], as a packed weight is; the left operand
is read in place. With zero points a and b of the codes as they are multiplied, sum (x - a)(y - b) is sum x y
- b sum x - a sum y + K a b: sums of y are made once a panel, those of x once a row and panel, and where a zero point is
0 neither. Other targets multiply 16-bit numbers from which zero points are already taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.choice import Choice, epilogue_parameters, size_parameter
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.batched_gemm import Batched, Configuration, beside, configure, merged, worth_timing
from graphopt.backends.rules.integer_gemm import Words, WordTile, words_of
from graphopt.backends.rules.lanes import same, span, store_folded, transposed, vector_type
from graphopt.backends.sizes import Shape, product
from graphopt.backends.target import Target
from graphopt.backends.tuner.record import Workload
from graphopt.backends.values import Product, View, fused_name

RULE = "integer-batched-gemm"
_SIGNS = 0x80  # of a byte: unsigned codes less 128
_ONES = 0x01010101


@dataclass(frozen=True)
class Operands:
    """Codes a [..., M, K], whose last axis lies contiguous, as the target's words have activations; b [..., K, N].

    What they stand for are differences from the zero points; on targets without quads that of a is 0.
    """

    a: View
    b: View
    a_zero: int
    b_zero: int


def offer(operands: Operands, result: Product, end: Any, name: str, target: Target) -> Choice[Configuration]:
    """What may be chosen for the kernel that `integer_batched_gemm` writes."""
    a, b, shape = merged(operands.a, operands.b, result)
    words = words_of(target)
    sizes = (product(shape[:-2]), shape[-2], shape[-1], -(-int(a.shape[-1]) // words.codes))
    parameters = {
        **dict(zip(("batch", "rows", "n", "k"), map(size_parameter, sizes), strict=True)),
        "codes": words.codes,
        "b_beside": beside(b, "depth", "columns"),
        "zeros": f"{int(operands.a_zero != 0)}{int(operands.b_zero != 0)}",
    }
    return Choice(
        Workload.of(RULE, {**parameters, **epilogue_parameters(end)}),
        configure(target, *sizes, words.temporaries),
        lambda: worth_timing(target, *sizes, words.temporaries),
        lambda choice: integer_batched_gemm(operands, result, end, name, target, choice),
    )


def integer_batched_gemm(
    operands: Operands, result: Product, end: Any, name: str, target: Target, choice: Configuration
) -> Code:
    """C[..., m, n] = sum over k of (A[..., m, k] - a)(B[..., k, n] - b) in int32, then the tree `end` over `result`."""
    a, b, shape = merged(operands.a, operands.b, result)
    words = words_of(target)

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        codes = Operands(a, b, operands.a_zero, operands.b_zero)
        _IntegerBatched(kernel, codes, shape, choice, words).write(result, end, outputs[0])

    return write_kernel(
        RULE,
        fused_name(name, end),
        target,
        [a, b, end],
        [(end.shape, end.dtype)],
        body,
        configuration={
            "rows": choice.tile.rows,
            "columns": choice.tile.vectors * target.lanes,
            "steps": choice.tile.steps,
            "lanes": target.lanes,
            "products": words.products,
            "row_shares": choice.row_shares,
        },
        flops=2 * product(shape) * a.shape[-1] + operations([end], target),
        extra_shapes=[shape],
    )


class _IntegerBatched(Batched):
    def __init__(self, kernel: Kernel, operands: Operands, shape: Shape, choice: Configuration, words: Words) -> None:
        super().__init__(kernel, operands.a, operands.b, shape, choice)
        self.words, self.codes = words, words.codes
        self.count = int(operands.a.shape[-1])  # codes of a row
        self.deep = -(-self.count // self.codes)  # words of a row
        self.quads = self.codes == 4
        self.signs = _SIGNS if self.quads and operands.b.dtype == "uint8" else 0
        self.a_zero = operands.a_zero
        self.b_zero = operands.b_zero - (128 if self.signs else 0)
        self.sums_rows = self.quads and self.b_zero != 0
        self.sums_columns = self.quads and self.a_zero != 0
        self.columns_term: Any = None
        self.left_words = self._whole_words(operands.a)
        self.right_words = self.quads and self._whole_words(operands.b, down=True)

    def _whole_words(self, view: View, down: bool = False) -> bool:
        """Whether every row of `view`, or column, begins with a whole word of it."""
        along = len(view.strides) - (2 if down else 1)
        steps = [stride for axis, stride in enumerate(view.strides) if axis != along and view.shape[axis] != 1]
        whole = all(isinstance(step, int) and step % self.codes == 0 for step in (*steps, view.offset))
        return whole and view.strides[along] == 1

    # The right operand ------------------------------------------------------------------------------------------------
    def panel(self) -> Any:
        return self.kernel.scratch(self.deep * self.columns, dtype="uint32")

    def copy_panel(self, copy: Any, right: Any, start: Any, first: Any) -> None:
        """Word w of column c holds codes w * codes and on; past the last column that one is read again."""
        start = T.bind(start)
        if self.right_words:
            self._transpose_words(copy, start, first)
        else:
            self._gather_words(copy, right, start, first)
        if self.sums_columns:
            self._sum_columns(copy)

    def _gather_words(self, copy: Any, right: Any, start: Any, first: Any) -> None:
        """A word of codes from as many rows, vectors of columns at once where these lie beside each other."""
        kernel = self.kernel
        down, across = (kernel.size(stride) for stride in self.b.strides[-2:])

        def word(k: Any, column: Any, count: int) -> Any:
            total = tirx.const(0, "uint32")
            for number in range(count):
                code = right[start + (k + number) * down + column * across]
                total = total | self._part(code) << tirx.const(32 // self.codes * number, "uint32")
            return total

        def write(number: Any, count: int) -> None:
            def vectors() -> None:
                for c in range(self.choice.tile.vectors):
                    with kernel.vectorized(self.lanes) as lane:
                        at = c * self.lanes + lane
                        value = word(number * self.codes, first + at, count)
                        T.buffer_store(copy, value, [number * self.columns + at])

            def alone() -> None:
                with kernel.serial(self.columns) as at:
                    value = word(number * self.codes, tirx.min(first + at, self.n - 1), count)
                    T.buffer_store(copy, value, [number * self.columns + at])

            if self.b.strides[-1] != 1:
                alone()
                return
            with T.If(first + self.columns <= self.n):
                with T.Then():
                    vectors()
                with T.Else():
                    alone()

        self._each_word(write)

    def _each_word(self, write: Any) -> None:
        """write(number of the word, codes in it) for all words, of which the last may be shorter."""
        with self.kernel.serial(self.count // self.codes) as number:
            write(number, self.codes)
        if self.count % self.codes:
            write(int64(self.deep - 1), self.count % self.codes)

    def _part(self, code: Any) -> Any:
        """A code of the right operand as it is multiplied, in the lower bits of a word."""
        if not self.quads:
            number = code.astype("int32") - tirx.const(self.b_zero, "int32")
            return number.astype("uint32") & tirx.const(0xFFFF, "uint32")
        return code.astype("uint8").astype("uint32") ^ tirx.const(self.signs, "uint32")

    def _transpose_words(self, copy: Any, start: Any, first: Any) -> None:
        """Words that lie one after the other in a column, as squares of float32: moves keep all bits."""
        kernel, lanes = self.kernel, self.lanes
        memory = kernel.words(self.b.storage, "float32")
        step = kernel.size(self.b.strides[-1])
        whole = self.count // self.codes

        def square(begin: Any, size: int) -> None:
            for group in range(self.columns // size):
                columns = [tirx.min(first + group * size + number, self.n - 1) for number in range(size)]
                places = [tirx.truncdiv(start + column * step, int64(self.codes)) + begin for column in columns]
                vectors = [T.bind(memory[span(place, size)]) for place in places]
                for number, vector in enumerate(transposed(vectors)):
                    word = tirx.reinterpret(vector_type("uint32", size), vector)
                    signs: Any = tirx.const(self.signs * _ONES, "uint32")
                    word = word ^ (same(signs, size))
                    place = (begin + number) * self.columns + group * size
                    T.buffer_store(copy, word, [span(place, size)])

        with kernel.serial(whole // lanes) as block:
            square(block * lanes, lanes)
        done = whole // lanes * lanes
        while done < whole:
            size = 1 << (whole - done).bit_length() - 1
            square(int64(done), size)
            done += size
        if self.count % self.codes:
            right, down = kernel.flat(self.b.storage), int64(whole * self.codes)
            with kernel.serial(self.columns) as at:
                column = tirx.min(first + at, self.n - 1)
                total = tirx.const(0, "uint32")
                for number in range(self.count % self.codes):
                    code = self._part(right[start + column * step + down + number])
                    total = total | code << tirx.const(8 * number, "uint32")
                T.buffer_store(copy, total, [whole * self.columns + at])

    def _sum_columns(self, copy: Any) -> None:
        """What the left zero point adds to every sum of a column."""
        kernel, lanes = self.kernel, self.lanes
        whole = span(0, lanes)
        self.columns_term = kernel.registers(self.choice.tile.vectors, lanes, dtype="int32")
        sums = self.columns_term
        for c in range(self.choice.tile.vectors):
            T.buffer_store(sums, same(tirx.const(0, "int32"), lanes), [int64(c), whole])
        ones = same(tirx.const(_ONES, "uint32"), lanes)
        with kernel.serial(self.deep) as number:
            for c in range(self.choice.tile.vectors):
                word = copy[span(number * self.columns + c * lanes, lanes)]
                T.buffer_store(sums, self.words.multiply(sums[int64(c), whole], ones, word, lanes), [int64(c), whole])
        for c in range(self.choice.tile.vectors):
            constant = self.count * self.a_zero * self.b_zero
            scaled = sums[int64(c), whole] * same(tirx.const(-self.a_zero, "int32"), lanes)
            T.buffer_store(sums, scaled + same(tirx.const(constant, "int32"), lanes), [int64(c), whole])

    # The left operand -------------------------------------------------------------------------------------------------
    def multiply(self, copy: Any, left: Any, origin: Any, first_row: Any) -> WordTile:
        kernel, tile = self.kernel, self.choice.tile
        down = kernel.size(self.a.strides[-2])
        starts = [T.bind(origin + tirx.min(first_row + r, self.rows - 1) * down) for r in range(tile.rows)]
        registers = WordTile(kernel, tile, self.words)
        self._start(registers, left, starts)
        places = starts
        if self.left_words:
            memory = kernel.words(self.a.storage, "uint32")
            places = [T.bind(tirx.truncdiv(start, int64(self.codes))) for start in starts]

        def word(r: int, k: Any) -> Any:
            if self.left_words:
                return memory[places[r] + k]
            return self._joined(left, starts[r] + k * self.codes, self.codes)

        def right(k: Any, c: Any, lane: Any) -> Any:
            return copy[lane + (k * self.columns + c * self.lanes)]

        registers.multiply(self.count // self.codes, word, right)
        rest = self.count % self.codes
        if rest:
            registers._step(
                int64(self.deep - 1), lambda r, k: self._joined(left, starts[r] + (self.count - rest), rest), right
            )
        return registers

    def _joined(self, left: Any, place: Any, count: int) -> Any:
        """A word of codes that lie beside each other, which LLVM reads at once."""
        bits = 32 // self.codes
        total: Any = None
        for number in range(count):
            read = left[place + number]
            lanes = tvm.DataType(str(read.ty.dtype)).lanes
            code = read.astype(vector_type(f"uint{bits}", lanes)).astype(vector_type("uint32", lanes))
            if number:
                shift: Any = tirx.const(bits * number, "uint32")
                code = code << (same(shift, lanes))
            total = code if total is None else total | code
        return total

    def _start(self, registers: WordTile, left: Any, starts: list[Any]) -> None:
        """The sums of a tile before its products: what zero points add."""
        if not self.sums_rows and not self.sums_columns:
            registers.zero()
            return
        rows = self._row_terms(left, starts) if self.sums_rows else None
        for r, c, lane in registers.elements():
            term = tirx.const(0, "int32") if self.columns_term is None else self.columns_term[int64(c), lane]
            term = term if rows is None else term + rows[int64(r)]
            T.buffer_store(registers.values, term, [r, c, lane])

    def _row_terms(self, left: Any, starts: list[Any]) -> Any:
        """What the right zero point adds to every sum of a row, as a buffer; sums of codes are exact in float32."""
        kernel, lanes = self.kernel, self.lanes
        whole = span(0, lanes)
        ones = same(tirx.const(_ONES, "uint32"), lanes)
        sums = kernel.registers(len(starts), lanes, dtype="int32")
        for r, start in enumerate(starts):
            T.buffer_store(sums, same(tirx.const(0, "int32"), lanes), [int64(r), whole])
            for done, codes in self._pieces():
                at = sums[int64(r), whole]
                read = left[span(start + done, codes)]
                if codes == 4 * lanes:
                    at = self.words.multiply(at, tirx.reinterpret(vector_type("uint32", lanes), read), ones, lanes)
                else:
                    at = at + read.astype(vector_type("int32", lanes))
                T.buffer_store(sums, at, [int64(r), whole])
        rest = self.count % lanes
        terms = kernel.registers(len(starts), dtype="int32")
        result = kernel.registers(1 << (len(starts) - 1).bit_length())
        vectors = [T.bind(sums[int64(r), whole].astype(vector_type("float32", lanes))) for r in range(len(starts))]
        store_folded(kernel, result, vectors, "sum")
        for r, start in enumerate(starts):
            total = result[int64(r)].astype("int32")
            for number in range(rest):
                total = total + left[start + (self.count - rest + number)].astype("int32")
            T.buffer_store(terms, total * tirx.const(-self.b_zero, "int32"), [int64(r)])
        return terms

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Where whole vectors of a row's codes begin, and how many codes they have: words of bytes, then bytes."""
        done = 0
        for codes in dict.fromkeys((4 * self.lanes if self.lanes > 1 else 1, self.lanes)):
            while done + codes <= self.count:
                yield done, codes
                done += codes
