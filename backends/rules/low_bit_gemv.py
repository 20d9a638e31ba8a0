"""Products of 8-bit activations with weights of 1 to 8 bits, whose codes are taken apart in registers.

A panel of outputs passes over its part of the weight once, in the order of memory. For one row of activations on x86
the fields of a word are not even shifted down: masked where they lie, those at bit p add 2^p times their products to
sums of their own, which are shifted once a group. For several rows, or where numbers stand in a codebook, the parts of
each code are put together, looked up, and multiplied by all rows of a tile.

Sums of a group are int32 and exact, whichever instructions make them. Groups are added in float32 from the first to the
last, so that results depend neither on the tile nor on how threads share the panels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends import amx
from graphopt.backends.choice import Choice, epilogue_parameters, size_parameter
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.low_bit_account import LOOKED_UP, TAKEN_APART, TILES, account
from graphopt.backends.rules.low_bit_codes import Groups, Operands, Unpacking
from graphopt.backends.rules.low_bit_layout import Layout
from graphopt.backends.rules.low_bit_lut import GivenTables, LookedUp, SummedTables
from graphopt.backends.rules.low_bit_lut_nibbles import GivenNibbles, LookedUpNibbles, SummedNibbles
from graphopt.backends.rules.low_bit_nibbles import Nibbles
from graphopt.backends.rules.low_bit_rows import RowTile
from graphopt.backends.rules.low_bit_tiles import write_tiles
from graphopt.backends.sizes import Size, least, product
from graphopt.backends.target import Target
from graphopt.backends.tuner.record import Parameter, Workload
from graphopt.backends.values import Product, fused_name

RULE = "low-bit"
_AHEAD = (8 << 10, 2 << 10)  # bytes ahead of the words that are read: the longer, the faster they are used up
_OUTPUTS = (16, 32)  # of a panel: two vectors of 16 share words of activations, one reads memory more evenly
_LOOKED_UP_OUTPUTS = 64  # which share tables, as large as four words of activations each
_FEW_ROWS, _MANY_ROWS = 4, 8  # of a tile, where there are several


@dataclass(frozen=True)
class Configuration:
    """What may be chosen for one product; results do not depend on it."""

    looks_up: bool  # sums of few rows, rather than taking bits apart
    vectors: int  # of outputs of a panel
    panel_shares: int  # shares of the panels between threads
    ahead: int  # bytes ahead of which lines are prefetched
    nearest: bool  # into the first-level cache: better where weights stay in the caches, worse from memory


Layouts = Callable[[bool, int], Layout]  # for looking up or not, and for panels of so many vectors
Packed = Callable[[Layout], tuple[int, ...]]  # outputs of the panels in which the weight is kept already


@dataclass(frozen=True)
class Means:
    """What a product may be made of, by the number of rows.

    `few` rows or fewer look sums up, where the first of `looking_up`, or what was measured, says so, and any number in
    `Nibbles`; from `tiled` rows on there are tiles, where that is not None: the target has them then. `reason` is why.
    """

    looking_up: tuple[bool, ...] = (False,)
    few: int = 1
    tiled: int | None = None
    reason: str = ""

    def parameters(self) -> dict[str, Parameter]:
        """As workloads have it."""
        order = " ".join("look-up" if looks_up else "unpack" for looks_up in self.looking_up)
        return {"means": order, "few": self.few, "tiled": self.tiled or 0}


def offer(
    target: Target,
    rows: Size,
    layout: Layouts,
    end: Any,
    kinds: Mapping[str, Parameter],
    means: Means,
    cached: bool,
    write: Callable[[Configuration], Code],
    packed: Packed,
) -> Choice[Configuration]:
    """What may be chosen for so many rows times a weight in one of the layouts.

    `kinds` are what else tells workloads apart. `cached`: weights are expected in the caches rather than in memory.
    """
    if isinstance(rows, int) and rows > means.few:
        means = replace(means, looking_up=means.looking_up[:1])
    found = candidates(target, layout, means, cached, packed)
    one = layout(found[0].looks_up, found[0].vectors)
    parameters = {"rows": size_parameter(rows), "n": one.n, "k": one.k, "bits": one.bits, "group": one.group}
    parameters |= {**kinds, "planes": one.planes, **means.parameters()}
    return Choice(Workload.of(RULE, {**parameters, **epilogue_parameters(end)}), found[0], lambda: found, write)


def candidates(target: Target, layout: Layouts, means: Means, cached: bool, packed: Packed) -> list[Configuration]:
    """Panels of some widths, the least expected time first: from memory narrow ones, unless threads then share worse.

    What instructions bound, and not memory, has wide panels and lines that come shortly before they are used: weights
    in the caches, and words of one bit a weight, which take many multiplications each. A weight that another product
    has packed has the width that it has there.
    """
    chosen = []
    for looks_up in means.looking_up:
        least_wide = layout(looks_up, layout(looks_up, 1).together)
        bound, found = cached or least_wide.bits == 1, []
        wide = means.looking_up[0] and not isinstance(least_wide, Nibbles)
        widths = packed(least_wide) or ((*_OUTPUTS, _LOOKED_UP_OUTPUTS) if wide else _OUTPUTS)
        for place, outputs in enumerate(reversed(widths) if bound else widths):
            one = layout(looks_up, max(least_wide.vectors, outputs // target.lanes))
            share = -(-one.panels // target.threads) * one.outputs
            found.append((share, place, one.vectors))
        every = dict.fromkeys(vectors for *_, vectors in sorted(found))
        distances = _AHEAD[::-1] if bound else _AHEAD
        chosen += [
            Configuration(looks_up, vectors, target.threads, ahead, nearest)
            for nearest, ahead, vectors in itertools.product((cached, not cached), distances, every)
        ]
    return chosen


def gemv(
    operands: Operands,
    result: Product,
    end: Any,
    name: str,
    target: Target,
    choice: Configuration,
    means: Means,
) -> Code:
    """y[row, n] as graphopt::lut_gemv says, then the element-wise tree `end` over `result`."""
    layout = operands.layout
    rows = product(result.shape[:-1])
    products = products_of(rows, operands, choice, means)
    reason = means.reason if choice.looks_up == means.looking_up[0] else "it was measured to be faster"

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        Gemv(kernel, operands, result, end, outputs[0], choice, means).write()

    code = write_kernel(
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
            "nearest": choice.nearest,
            "products": products,
            **account(operands, target, products, reason),
        },
        flops=2 * rows * layout.n * layout.k + operations([end], target),
    )
    tiled = uses_tiles(rows, means.tiled)
    return replace(code, function=code.function.with_attr(amx.USES_TILES, True)) if tiled else code


def uses_tiles(rows: Size, tiled: int | None) -> bool:
    return tiled is not None and (not isinstance(rows, int) or rows >= tiled)


def products_of(rows: Size, operands: Operands, choice: Configuration, means: Means) -> str:
    """What a product is made of, for the report: of few rows and of many where their number is open."""
    always = operands.tables or isinstance(operands.layout, Nibbles)
    if always or (choice.looks_up and isinstance(rows, int) and rows <= means.few):
        return LOOKED_UP
    many = TILES if uses_tiles(rows, means.tiled) else TAKEN_APART
    if isinstance(rows, int):
        return many
    few = [LOOKED_UP if looked_up else TAKEN_APART for looked_up in few_rows(rows, choice, means).values()]
    return "; ".join(dict.fromkeys([*few, many]))


def few_rows(rows: Size, choice: Configuration, means: Means) -> dict[int, bool]:
    """Where the number of rows is open: how many the kernels of few hold at most, and whether these look up."""
    fewest, looked_up = least(rows), means.few if choice.looks_up else 0
    found = {looked_up: True} if fewest <= looked_up else {}
    below = means.tiled or _MANY_ROWS
    return found | {most: False for most in (1, _FEW_ROWS) if max(fewest, looked_up + 1) <= most < below}


def masks(target: Target, bits: int, book: bool) -> bool:
    """Whether one row is multiplied by fields that are not shifted down: their bytes are below 256, not 128."""
    return target.quads == "uint8" and target.machine == "x86_64" and bits < 8 and not book


class Gemv:
    def __init__(
        self,
        kernel: Kernel,
        operands: Operands,
        result: Product,
        end: Any,
        output: Output,
        choice: Configuration,
        means: Means,
    ) -> None:
        self.kernel, self.operands, self.choice = kernel, operands, choice
        self.result, self.end, self.output = result, end, output
        self.layout, self.target, self.lanes = operands.layout, kernel.target, kernel.target.lanes
        self.unpacking = Unpacking(kernel, operands)
        self.groups = Groups(kernel, operands)
        self.weight = self.unpacking.weight
        self.codes = kernel.words(operands.codes.storage, "uint32")
        self.row_count = product(result.shape[:-1])
        self.rows = kernel.size(self.row_count)
        self.masked = masks(self.target, self.layout.bits, operands.book is not None)
        self.means = means
        self.nibbles = isinstance(self.layout, Nibbles)

    def write(self) -> None:
        """Few rows are a tile of so many, also where their number is known at run time."""
        if self.operands.tables or self.nibbles:
            self.write_looked_up()
        elif isinstance(self.row_count, int):
            if self.choice.looks_up and self.row_count <= self.means.few:
                self.write_looked_up()
            elif uses_tiles(self.row_count, self.means.tiled):
                amx.require()
                write_tiles(self)
            else:
                self.write_shares(min(self.row_count, _MANY_ROWS))
        else:
            if self.means.tiled is not None:
                amx.require()
            self.write_rows(few_rows(self.row_count, self.choice, self.means))

    def write_rows(self, few: dict[int, bool]) -> None:
        """A number of rows known at run time: the first of `few`, which may be looked up, that holds all, else many."""
        if few:
            (most, looked_up), *others = few.items()
            with T.If(self.rows > most):
                with T.Then():
                    self.write_rows(dict(others))
                with T.Else():
                    self.write_looked_up() if looked_up else self.write_shares(most)
        elif self.means.tiled is not None:
            write_tiles(self)
        else:
            self.write_shares(_MANY_ROWS)

    def write_shares(self, height: int) -> None:
        """Each thread passes over panels of its own, for all rows."""
        kernel = self.kernel
        tiles = tirx.truncdiv(self.rows + (height - 1), int64(height))
        with self.shares() as (first, own), kernel.serial(own) as number:
            panel = T.bind(first + number)
            if height == 1:
                RowTile(self, 1, int64(0), panel).write()
            else:
                with kernel.serial(tiles) as tile:
                    RowTile(self, height, T.bind(tile * height), panel).write()

    def write_looked_up(self) -> None:
        """Row after row by tables: given ones while a panel is in the caches, those of codes for all panels."""
        kernel = self.kernel
        with self.shares() as (first, own):
            if self.operands.tables:
                with kernel.serial(own) as number:
                    panel = T.bind(first + number)
                    with kernel.serial(self.rows) as row:
                        if self.nibbles:
                            LookedUpNibbles(self, row, panel, GivenNibbles(self, row)).write()
                        else:
                            LookedUp(self, row, panel, GivenTables(self, row)).write()
                return
            tables = SummedNibbles(self) if self.nibbles else SummedTables(self)
            with kernel.serial(self.rows) as row:
                tables.make(row)
                with kernel.serial(own) as number:
                    panel = T.bind(first + number)
                    if isinstance(tables, SummedNibbles):
                        LookedUpNibbles(self, row, panel, tables).write()
                    else:
                        LookedUp(self, row, panel, tables).write()

    @contextmanager
    def shares(self) -> Iterator[tuple[Any, Any]]:
        """The first panel of each thread, and how many it has."""
        kernel, panels = self.kernel, self.layout.panels
        count = min(self.choice.panel_shares, panels)
        with (kernel.serial if count == 1 else kernel.parallel)(count) as task:
            first = T.bind(tirx.truncdiv(task * panels, int64(count)))
            yield first, tirx.truncdiv((task + 1) * panels, int64(count)) - first
