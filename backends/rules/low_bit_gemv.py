"""Products of 8-bit activations with weights of 1 to 8 bits, whose codes are taken apart in registers.

A panel of outputs passes over its part of the weight once, in the order of memory. For one row of activations on x86
the fields of a word are not even shifted down: masked where they lie, those at bit p add 2^p times their products to
sums of their own, which are shifted once a group. For several rows, or where numbers stand in a codebook, the parts of
each code are put together, looked up, and multiplied by all rows of a tile.

Sums of a group are int32 and exact, whichever instructions make them. Groups are added in float32 from the first to the
last, so that results depend neither on the tile nor on how threads share the panels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.choice import Choice, epilogue_parameters, size_parameter
from graphopt.backends.integer_instructions import multiply_quads
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.low_bit_instructions import look_up_16, multiply_low, multiply_signed
from graphopt.backends.operations import operations
from graphopt.backends.rules.low_bit_layout import QUAD, Field, Layout, Part
from graphopt.backends.rules.register_tile import RegisterTile, Tile
from graphopt.backends.sizes import Size, least, product
from graphopt.backends.target import Target
from graphopt.backends.tuner.record import Workload
from graphopt.backends.values import Product, View, fused_name

RULE = "low-bit"
_LINE = 64  # bytes of a cache line
_AHEAD = 2 << 10  # bytes ahead of the words that are read
_MOST_SUMS = 16  # vectors of them in registers
_MOST_WRITTEN = 32  # vectors of words in a loop's body
_MANY_ROWS = 4  # of a tile, where there are several
_TABLE = 16  # entries of one that an instruction looks up
_EVERY = 0x01010101  # times a byte: that one in all bytes of a word


@dataclass(frozen=True)
class Configuration:
    """What may be chosen for one product; results do not depend on it."""

    vectors: int  # of outputs of a panel
    panel_shares: int  # shares of the panels between threads
    ahead: int  # bytes ahead of which lines are prefetched


@dataclass(frozen=True, eq=False)
class Operands:
    """What a product reads.

    `codes` [..., K] are int8, each row padded with zeros as `layout.packed_k` says, `scale` [..., G] float32 and `sums`
    [..., G] int32, contiguous; `weight`, `weight_scale` and, where it differs between groups, `weight_zero` are packed
    by `layout`, as is `tag`. `book` holds uint8: the numbers that codes stand for, `offset` added; where there is none
    and `offset` is not 0, that is flipped in codes of 8 bits.
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

    def views(self) -> list[View]:
        every = (
            *(self.codes, self.scale, self.sums, self.weight, self.weight_scale),
            *(self.weight_zero, self.book, self.tag),
        )
        return [view for view in every if isinstance(view, View)]


def offer(
    target: Target,
    rows: Size,
    layout: Callable[[int], Layout],
    end: Any,
    masked: bool,
    write: Callable[[Configuration], Code],
) -> Choice[Configuration]:
    """What may be chosen for so many rows times the weight that `layout` packs for panels of so many vectors."""
    found = candidates(target, layout, masked)
    one = layout(found[0].vectors)
    parameters = {"rows": size_parameter(rows), "n": one.n, "k": one.k, "bits": one.bits, "group": one.group}
    parameters |= {"masked": masked}
    return Choice(Workload.of(RULE, {**parameters, **epilogue_parameters(end)}), found[0], lambda: found, write)


def candidates(target: Target, layout: Callable[[int], Layout], masked: bool) -> list[Configuration]:
    """Panels of 1 to 8 vectors whose sums fit the registers, the least expected time first."""
    found = []
    for vectors in (1, 2, 4, 8):
        one = layout(vectors)
        sums = vectors * len(_places(one) if masked else (0,))
        if vectors % one.together or (sums > _MOST_SUMS and vectors > one.together):
            continue
        share = -(-one.panels // target.threads) * vectors  # vectors of outputs of the longest share
        alone = sums < _MOST_SUMS // 2  # additions wait for each other
        found.append((share * (1.3 if alone else 1.0), -vectors, vectors))
    return [
        Configuration(vectors, target.threads, ahead)
        for _, _, vectors in sorted(found)
        for ahead in (_AHEAD, 2 * _AHEAD)
    ]


def gemv(operands: Operands, result: Product, end: Any, name: str, target: Target, choice: Configuration) -> Code:
    """y[row, n] as graphopt::lut_gemv says, then the element-wise tree `end` over `result`."""
    layout = operands.layout
    rows = product(result.shape[:-1])

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        _Gemv(kernel, operands, result, end, outputs[0], choice).write()

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
            "lanes": target.lanes,
            "vectors": choice.vectors,
            "panel_shares": choice.panel_shares,
            "ahead": choice.ahead,
        },
        flops=2 * rows * layout.n * layout.k + operations([end], target),
    )


def masks(target: Target, bits: int, book: bool) -> bool:
    """Whether one row is multiplied by fields that are not shifted down: their bytes are below 256, not 128."""
    return target.quads == "uint8" and target.machine == "x86_64" and bits < 8 and not book


def _places(layout: Layout) -> tuple[int, ...]:
    """The bits from which on sums of their own hold products."""
    return (0, 4) if layout.parts[0].bits == 4 else (0, 2, 4, 6)


def _downs(part: Part, places: tuple[int, ...]) -> dict[int, tuple[int, int]]:
    """For a field at each bit: by how much its word is shifted down, and the place of the sums that it then adds to."""
    free = {place + part.place: place for place in places if place + part.place + part.bits <= 8}
    found: dict[int, tuple[int, int]] = {}
    used = [0]
    for position in range(0, 8, part.bits):
        fitting = [down for down in used if position - down in free]
        if not fitting:
            fitting = [min((position - at for at in free), key=abs)]
            used += fitting
        found[position] = (fitting[0], free[position - fitting[0]])
    return found


class _Gemv:
    def __init__(
        self, kernel: Kernel, operands: Operands, result: Product, end: Any, output: Output, choice: Configuration
    ) -> None:
        self.kernel, self.operands, self.choice = kernel, operands, choice
        self.result, self.end, self.output = result, end, output
        self.layout, self.target, self.lanes = operands.layout, kernel.target, kernel.target.lanes
        self.weight = kernel.words(operands.weight.storage, "uint32")
        self.codes = kernel.words(operands.codes.storage, "uint32")
        self.row_count = product(result.shape[:-1])
        self.rows = kernel.size(self.row_count)
        self.masked = masks(self.target, self.layout.bits, operands.book is not None)

    def write(self) -> None:
        """One row is a tile of its own, also where their number is known at run time."""
        if isinstance(self.row_count, int):
            self.write_shares(1 if self.row_count == 1 else _MANY_ROWS)
        elif least(self.row_count) > 1:
            self.write_shares(_MANY_ROWS)
        else:
            with T.If(self.rows > 1):
                with T.Then():
                    self.write_shares(_MANY_ROWS)
                with T.Else():
                    self.write_shares(1)

    def write_shares(self, height: int) -> None:
        """Each thread passes over panels of its own, for all rows."""
        kernel, shares, panels = self.kernel, self.choice.panel_shares, self.layout.panels
        shares = min(shares, panels)
        tiles = tirx.truncdiv(self.rows + (height - 1), int64(height))
        with (kernel.serial if shares == 1 else kernel.parallel)(shares) as task:
            first = T.bind(tirx.truncdiv(task * panels, int64(shares)))
            own = tirx.truncdiv((task + 1) * panels, int64(shares)) - first
            with kernel.serial(own) as number:
                panel = T.bind(first + number)
                if height == 1:
                    _Tile(self, 1, int64(0), panel).write()
                else:
                    with kernel.serial(tiles) as tile:
                        _Tile(self, height, T.bind(tile * height), panel).write()


class _Tile:
    """Some rows of the results of one panel."""

    def __init__(self, gemv_: _Gemv, height: int, first_row: Any, panel: Any) -> None:
        self.gemv, self.kernel, self.layout, self.height = gemv_, gemv_.kernel, gemv_.layout, height
        self.first_row, self.panel = first_row, panel
        self.masked = gemv_.masked and height == 1
        self.places = _places(self.layout) if self.masked else (0,)
        self.totals = RegisterTile(self.kernel, Tile(height, self.layout.vectors))
        self.sums = self.kernel.registers(height, self.layout.vectors, len(self.places), gemv_.lanes, dtype="int32")
        whole = isinstance(gemv_.row_count, int) and gemv_.row_count % height == 0
        self.row_numbers = [
            T.bind(first_row + r if whole or height == 1 else tirx.min(first_row + r, gemv_.rows - 1))
            for r in range(height)
        ]

    def write(self) -> None:
        gemv_, layout, kernel = self.gemv, self.layout, self.kernel
        self.totals.zero()
        rows = [T.bind(row * (layout.packed_k // QUAD)) for row in self.row_numbers]
        with kernel.serial(layout.groups) as group:
            at = T.bind(self.panel * layout.groups + group)
            self.zero()
            self.tags = self.tags_of(T.bind(at * layout.outputs))
            self.multiply(at * layout.steps, [row + group * (layout.depth // QUAD) for row in rows])
            self.add(group, T.bind(at * layout.outputs))
        self.totals.write(
            gemv_.result,
            gemv_.end,
            gemv_.output,
            rows=self.height if self.height == 1 else T.bind(gemv_.rows - self.first_row),
            position=lambda r: self.first_row + r,
            first=T.bind(self.panel * layout.outputs),
            width=layout.n,
        )

    def zero(self) -> None:
        for r in range(self.height):
            for c in range(self.layout.vectors):
                for place in range(len(self.places)):
                    with self.kernel.vectorized(self.gemv.lanes) as lane:
                        T.buffer_store(self.sums, tirx.const(0, "int32"), [r, c, place, lane])

    def tags_of(self, start: Any) -> list[Any]:
        """What the codes of each vector have above their bits: which codebook is theirs in this group."""
        tag, lanes = self.gemv.operands.tag, self.gemv.lanes
        if tag is None:
            return []
        flat = self.kernel.flat(tag.storage)
        found = []
        for c in range(self.layout.vectors):
            tags = flat[tirx.Ramp(start + c * lanes, int64(1), lanes)].astype(f"uint32x{lanes}")
            found.append(T.bind(tags * self.same(_EVERY << self.layout.bits)))
        return found

    # Products ---------------------------------------------------------------------------------------------------------
    def multiply(self, first_step: Any, rows: list[Any]) -> None:
        """Add the products of a group; `rows` say where the words of its activations begin."""
        layout, kernel = self.layout, self.kernel
        width = layout.step_vectors * self.gemv.lanes
        start = T.bind(first_step * width)
        rows = [T.bind(row) for row in rows]
        written = max(1, min(layout.steps, _MOST_WRITTEN // layout.step_vectors))
        whole = layout.steps // written

        def step(number: Any) -> None:
            self.step(start + number * width, [row + number * layout.quads for row in rows])

        if whole == 1:
            for number in range(written):
                step(int64(number))
        else:
            with kernel.serial(whole) as outer:
                for number in range(written):
                    step(outer * written + number)
        for number in range(whole * written, layout.steps):
            step(int64(number))

    def step(self, start: Any, rows: list[Any]) -> None:
        """One step of the panel, whose words begin at `start`."""
        self.prefetch(start)
        if self.masked:
            self.masked_step(start, rows[0])
            return
        words = [self.word(start, number) for number in range(self.layout.step_vectors)]
        for quad in range(self.layout.quads):
            for c in range(self.layout.vectors):
                value = self.value(words, self.layout.fields(quad, c), c)
                for r, row in enumerate(rows):
                    self.add_products(r, c, 0, value, row + quad)

    def masked_step(self, start: Any, row: Any) -> None:
        layout = self.layout
        fields: dict[int, list[tuple[int, int, Field]]] = {}
        for quad in range(layout.quads):
            for c in range(layout.vectors):
                for field in layout.fields(quad, c):
                    fields.setdefault(field.vector, []).append((quad, c, field))
        downs = {part: _downs(part, self.places) for part in layout.parts}
        for number in sorted(fields):
            shifted = {0: self.word(start, number)}
            for quad, c, field in fields[number]:
                down, place = downs[field.part][field.position]
                if down not in shifted:
                    shifted[down] = T.bind(_down(shifted[0], down, self.gemv.lanes))
                mask = (1 << field.part.bits) - 1 << field.position - down
                value = shifted[down] & self.same(mask * _EVERY)
                self.add_products(0, c, self.places.index(place), value, row + quad)

    def word(self, start: Any, number: int) -> Any:
        lanes = self.gemv.lanes
        return T.bind(self.gemv.weight[tirx.Ramp(start + number * lanes, int64(1), lanes)])

    def value(self, words: list[Any], fields: Iterable[Field], vector: int) -> Any:
        """The codes of one quad, put together, and what they stand for."""
        operands, lanes = self.gemv.operands, self.gemv.lanes
        code = None
        for field in fields:
            part = _down(words[field.vector], field.position - field.part.place, lanes)
            if field.part.bits < 8:
                part = part & self.same(((1 << field.part.bits) - 1 << field.part.place) * _EVERY)
            code = part if code is None else code | part
        if operands.book is None:
            return T.bind(code ^ self.same(0x80 * _EVERY) if operands.offset else code)
        return T.bind(self.looked_up(code, vector))

    def looked_up(self, code: Any, vector: int) -> Any:
        gemv_, lanes = self.gemv, self.gemv.lanes
        book = gemv_.operands.book
        assert book is not None
        code = code | self.tags[vector] if self.tags else code
        table = gemv_.kernel.flat(book.storage)
        address = tirx.address_of(table[int64(0)])
        if int(book.shape[0]) == _TABLE:
            return look_up_16(code, address, lanes)
        codes = tirx.reinterpret(f"uint8x{4 * lanes}", code)
        found = tirx.call_pure_extern(f"uint8x{4 * lanes}", f"graphopt_table_{4 * lanes}", codes, address)
        return tirx.reinterpret(f"uint32x{lanes}", found)

    def add_products(self, row: int, vector: int, place: int, value: Any, word: Any) -> None:
        gemv_, lanes = self.gemv, self.gemv.lanes
        whole = tirx.Ramp(int64(0), int64(1), lanes)
        total, right = self.sums[row, vector, place, whole], tirx.Broadcast(gemv_.codes[word], lanes)
        if gemv_.target.quads == "uint8":
            total = multiply_quads(total, value, right, lanes)
        elif gemv_.operands.book is not None or gemv_.layout.bits == 8:
            total = multiply_signed(gemv_.target, total, value, right)
        else:
            total = multiply_low(gemv_.target, total, value, right)
        T.buffer_store(self.sums, total, [row, vector, place, whole])

    def same(self, word: int) -> Any:
        """A word in all lanes."""
        return tirx.Broadcast(tirx.const(word, "uint32"), self.gemv.lanes)

    def prefetch(self, start: Any) -> None:
        """Touch the lines that lie as far ahead as was chosen, as many as this step reads."""
        gemv_ = self.gemv
        words = self.layout.step_vectors * gemv_.lanes
        for line in range(-(-words * 4 // _LINE)):
            address = tirx.address_of(gemv_.weight[start + (gemv_.choice.ahead + line * _LINE) // 4])
            T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, 0, 3, 1))

    # Groups -----------------------------------------------------------------------------------------------------------
    def add(self, group: Any, start: Any) -> None:
        """Add the finished sums of a group to the totals; `start`: where its scales begin in those of the weight."""
        gemv_, operands, kernel = self.gemv, self.gemv.operands, self.kernel
        scales, sums = (kernel.flat(view.storage) for view in (operands.scale, operands.sums))
        steps = kernel.flat(operands.weight_scale.storage)
        zero = operands.weight_zero
        for r, row in enumerate(self.row_numbers):
            at = row * self.layout.groups + group
            scale, total = T.bind(scales[at]), T.bind(sums[at])
            sum_ = T.bind(total.astype("float32"))
            for c in range(self.layout.vectors):
                with kernel.vectorized(gemv_.lanes) as lane:
                    whole = self.sums[r, c, 0, lane]
                    for number, place in enumerate(self.places[1:], 1):
                        whole = whole + (self.sums[r, c, number, lane] >> tirx.const(place, "int32"))
                    if operands.offset:
                        whole = whole - total * tirx.const(operands.offset, "int32")
                    number = whole.astype("float32")
                    position = start + c * gemv_.lanes + lane
                    if isinstance(zero, View):
                        number = number - kernel.flat(zero.storage)[position].astype("float32") * sum_
                    elif zero is not None:
                        number = number - tirx.const(zero, "float32") * sum_
                    factor = steps[position].astype("float32") * scale
                    T.buffer_store(self.totals.values, self.totals.values[r, c, lane] + number * factor, [r, c, lane])


def _down(word: Any, count: int, lanes: int) -> Any:
    """Shifted down, or up by a negative count."""
    if count == 0:
        return word
    by = tirx.Broadcast(tirx.const(abs(count), "uint32"), lanes)
    return word >> by if count > 0 else word << by
