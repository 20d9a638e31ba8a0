"""Codes of few bits as kernels read them: words out of memory, and the numbers that their fields stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Kernel, int64
from graphopt.backends.low_bit_instructions import look_up_16
from graphopt.backends.rules.lanes import same
from graphopt.backends.rules.low_bit_layout import Layout
from graphopt.backends.values import View

EVERY = 0x01010101  # times a byte: that one in all bytes of a word
_TABLE = 16  # entries of one that an instruction looks up


@dataclass(frozen=True, eq=False)
class Operands:
    """What a product reads.

    `codes` [..., K] are int8, each row padded with zeros as `layout.packed_k` says, `scale` [..., G] float32 and `sums`
    [..., G] int32, contiguous; `weight`, `weight_scale` and, where it differs between groups, `weight_zero` are packed
    by `layout`, as is `tag`. `book` holds uint8: the numbers that codes stand for, `offset` added; where there is none
    and `offset` is not 0, that is flipped in codes of 8 bits. With `tables` codes are tables, [..., packed_k / 4, 16],
    and sums are float32.
    """

    layout: Layout
    codes: View
    scale: View
    sums: View
    weight: View
    weight_scale: View
    weight_zero: View | float | None
    book: View | None
    tag: View | None
    offset: int
    tables: bool = False

    def views(self) -> list[View]:
        every = (
            *(self.codes, self.scale, self.sums, self.weight, self.weight_scale),
            *(self.weight_zero, self.book, self.tag),
        )
        return [view for view in every if isinstance(view, View)]


class Unpacking:
    """Takes vectors of words of `operands.weight` apart."""

    def __init__(self, kernel: Kernel, operands: Operands) -> None:
        self.kernel, self.operands, self.layout = kernel, operands, operands.layout
        self.lanes = kernel.target.lanes
        self.weight = kernel.words(operands.weight.storage, "uint32")

    def word(self, start: Any, number: int) -> Any:
        """The vector of words `number` of those from `start` on."""
        return T.bind(self.weight[tirx.Ramp(start + number * self.lanes, int64(1), self.lanes)])

    def tags(self, start: Any) -> list[Any]:
        """What the codes of each vector have above their bits: which codebook is theirs in this group."""
        tag, lanes = self.operands.tag, self.lanes
        if tag is None:
            return []
        flat = self.kernel.flat(tag.storage)
        found = []
        for c in range(self.layout.vectors):
            tags = flat[tirx.Ramp(start + c * lanes, int64(1), lanes)].astype(f"uint32x{lanes}")
            found.append(T.bind(tags * self.same(EVERY << self.layout.bits)))
        return found

    def value(self, words: list[Any], quad: int, vector: int, tags: list[Any]) -> Any:
        """The codes of one quad, put together, and what they stand for."""
        operands, lanes = self.operands, self.lanes
        code = None
        for field in self.layout.fields(quad, vector):
            part = shifted_down(words[field.vector], field.position - field.part.place, lanes)
            if field.part.bits < 8:
                part = part & self.same(((1 << field.part.bits) - 1 << field.part.place) * EVERY)
            code = part if code is None else code | part
        if operands.book is None:
            return T.bind(code ^ self.same(0x80 * EVERY) if operands.offset else code)
        return T.bind(self.looked_up(code if not tags else code | tags[vector]))

    def looked_up(self, code: Any) -> Any:
        """Entries of the codebooks."""
        book, lanes = self.operands.book, self.lanes
        assert book is not None
        address = tirx.address_of(self.kernel.flat(book.storage)[int64(0)])
        if int(book.shape[0]) == _TABLE:
            return look_up_16(code, address, lanes)
        codes = tirx.reinterpret(f"uint8x{4 * lanes}", code)
        found = tirx.call_pure_extern(f"uint8x{4 * lanes}", f"graphopt_table_{4 * lanes}", codes, address)
        return tirx.reinterpret(f"uint32x{lanes}", found)

    def same(self, word: int) -> Any:
        """A word in all lanes."""
        return same(tirx.const(word, "uint32"), self.lanes)


@dataclass(frozen=True)
class Row:
    """What a row of activations has for a group: scale, and the sum of its codes as int32 and float32."""

    scale: Any
    total: Any
    sum: Any


class Groups:
    """What becomes of the finished sums of groups."""

    def __init__(self, kernel: Kernel, operands: Operands) -> None:
        self.operands, self.groups = operands, operands.layout.groups
        self.scale, self.sums, self.steps = (
            kernel.flat(view.storage) for view in (operands.scale, operands.sums, operands.weight_scale)
        )
        zero = operands.weight_zero
        self.zero = kernel.flat(zero.storage) if isinstance(zero, View) else zero

    def row(self, row: Any, group: Any) -> Row:
        at = row * self.groups + group
        total = T.bind(self.sums[at])
        if self.operands.tables:
            return Row(T.bind(self.scale[at] * tirx.const(0.5, "float32")), total, total)
        return Row(T.bind(self.scale[at]), total, T.bind(total.astype("float32")))

    def number(self, row: Row, total: Any, position: Any) -> Any:
        """What an int32 sum adds to a result; `position`: of its output among the scales of the weight."""
        if self.operands.tables:
            offset: Any = tirx.const((2**self.operands.layout.bits - 1) / 2, "float32")
            if isinstance(self.zero, float):
                offset = tirx.const(offset.value - self.zero, "float32")
            elif self.zero is not None:
                offset = offset - self.zero[position].astype("float32")
            number = total.astype("float32") * row.scale + offset * row.sum
            return self.steps[position].astype("float32") * number
        if self.operands.offset:
            total = total - row.total * tirx.const(self.operands.offset, "int32")
        number = total.astype("float32")
        if isinstance(self.zero, float):
            number = number - tirx.const(self.zero, "float32") * row.sum
        elif self.zero is not None:
            number = number - self.zero[position].astype("float32") * row.sum
        return number * (self.steps[position].astype("float32") * row.scale)


def shifted_down(word: Any, count: int, lanes: int) -> Any:
    """Shifted down, or up by a negative count."""
    if count == 0:
        return word
    by = same(tirx.const(abs(count), "uint32"), lanes)
    return word >> by if count > 0 else word << by
