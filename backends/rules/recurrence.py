"""Recurrent layers: all steps of a sequence in one kernel, the product with the state and the gates in it.

A step takes the states of a few rows of the batch through weights packed as [panels, H, gates, units]: a tile holds the
sums of all gates of some units, which are lanes, so that what follows from them needs nothing of other tiles. The
product with the inputs is made for all steps at once before, by the packed matrix product or, in float64, by
`projection`.

Threads share out directions and rows of the batch; each goes through all steps on its own. A row that has ended keeps
its state. Sums run over the state from first to last, so results depend on neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import count_operations
from graphopt.backends.rules.pointwise import for_columns
from graphopt.backends.rules.recurrent_cells import Cell, Layer, Units, unknown_units
from graphopt.backends.rules.register_tile import RegisterTile, Tile, lanes_of, tile_cost, tiles
from graphopt.backends.sizes import Size, product
from graphopt.backends.target import Target
from graphopt.backends.values import Index, View

RULE = "recurrence"
_MOST_SETTLED = 16  # values on the way to a new state
_MANY_ROWS = 8  # what choosing a tile takes a batch known at run time for


@dataclass(frozen=True)
class Plan:
    """How rows and units are taken together: `rows` of a tile, `units` of one of the `panels`; `shares` of the rows."""

    rows: int
    units: int
    panels: int
    shares: int

    @property
    def width(self) -> int:
        """Units with those that fill the last panel."""
        return self.units * self.panels


@dataclass(frozen=True)
class Operands:
    """What a kernel reads; packed tensors as `pack_matrix` and `pack_biases` make them.

    `given` is the product of inputs and weights with the biases, [T, B, D, panels, gates, units]. There are weights of
    each stage of the cell. `own_bias` [D, panels, units] stays apart from the others.
    """

    given: View
    weights: tuple[View, ...]
    own_bias: View | None = None
    peepholes: View | None = None
    lengths: View | None = None
    states: tuple[View | None, ...] = ()

    def views(self) -> list[View]:
        every = (self.given, *self.weights, self.own_bias, self.peepholes, self.lengths, *self.states)
        return [view for view in every if view is not None]


def choose_plan(layer: Layer, batch: Size, target: Target) -> Plan:
    """The tile with the least time of one step, its rows a share of the batch."""
    lanes, gates, directions = lanes_of(target, layer.dtype), max(map(len, layer.stages)), len(layer.reverse)
    shares = max(1, target.threads // directions)
    rows = -(-batch // shares) if isinstance(batch, int) else _MANY_ROWS

    def panels(tile: Tile) -> int:
        return -(-layer.hidden // (tile.vectors // gates * lanes))

    def cost(tile: Tile) -> float:
        return tile_cost(target, tile, rows, panels(tile) * tile.vectors * target.lanes, layer.hidden)

    best = min((tile for tile in tiles(target) if tile.vectors % gates == 0), key=cost)
    some = min(best.rows, rows)
    shares = min(shares, -(-batch // some)) if isinstance(batch, int) else shares
    return Plan(some, best.vectors // gates * lanes, panels(best), shares)


def in_panels(array: np.ndarray, parts: int, plan: Plan) -> np.ndarray:
    """[D, parts H, ...] -> [D, panels, parts, units, ...], zero where H ends."""
    directions, rows, *rest = array.shape
    hidden = rows // parts
    padded = np.zeros((directions, parts, plan.width, *rest), array.dtype)
    padded[:, :, :hidden] = array.reshape(directions, parts, hidden, *rest)
    return padded.reshape(directions, parts, plan.panels, plan.units, *rest).swapaxes(1, 2)


def pack_matrix(array: np.ndarray, layer: Layer, stage: Sequence[int], plan: Plan) -> np.ndarray:
    """The weights of some gates, [D, G H, K] -> [D, panels, K, gates, units]."""
    return in_panels(array, layer.gates, plan)[:, :, list(stage)].transpose(0, 1, 4, 2, 3)


def pack_biases(array: np.ndarray, layer: Layer, plan: Plan) -> np.ndarray:
    """[D, 2 G H] -> [D, panels, G, units]: sums of both biases, but for one that the layer keeps apart."""
    given, own = np.split(array, 2, 1)
    if layer.keeps_bias:
        own = np.concatenate([own[:, : -layer.hidden], np.zeros_like(own[:, -layer.hidden :])], 1)
    return in_panels(given + own, layer.gates, plan)


def pack_own_bias(array: np.ndarray, layer: Layer, plan: Plan) -> np.ndarray:
    """[D, 2 G H] -> [D, panels, units]: the bias that the layer keeps apart."""
    return in_panels(array[:, -layer.hidden :], 1, plan)[:, :, 0]


def recurrence(
    layer: Layer, operands: Operands, plan: Plan, steps: Size, batch: Size, dtype: str, name: str, target: Target
) -> Code:
    """Outputs [T, B, D, H] and each last state [D, B, H]."""
    directions, hidden = len(layer.reverse), layer.hidden
    state = (directions, batch, hidden)

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        _Recurrence(kernel, layer, operands, plan, (steps, batch), outputs).write()

    each = sum(count_operations(target, partial(_evaluated, layer, cell)) for cell in layer.cells)
    return write_kernel(
        RULE,
        name,
        target,
        operands.views(),
        [((steps, batch, directions, hidden), dtype), *((state, dtype) for _ in range(layer.states))],
        body,
        configuration={
            "rows": plan.rows,
            "units": plan.units,
            "lanes": lanes_of(target, layer.dtype),
            "row_shares": plan.shares,
        },
        flops=steps * batch * directions * hidden * (2 * layer.gates * hidden + each),
    )


def projection(
    layer: Layer, x: View, weights: View, biases: View | None, plan: Plan, name: str, target: Target
) -> Code:
    """x [T, B, I], contiguous, times weights [D, panels, I, gates, units], with the biases; as `Operands.given`."""
    directions, panels, depth, gates, units = (int(size) for size in weights.shape)
    shape, lanes = (*x.shape[:-1], directions, panels, gates, units), lanes_of(target, layer.dtype)
    count, columns = product(x.shape[:-1]), gates * units

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        def write(rows: int, begin: Any, panel: Any) -> None:
            registers = RegisterTile(kernel, Tile(rows, columns // lanes), layer.dtype)
            registers.zero()
            a, b = kernel.flat(x.storage), kernel.flat(weights.storage)
            registers.multiply(
                depth,
                lambda r, k: a[(begin + r) * depth + k],
                lambda k, c, lane: b[(panel * depth + k) * columns + c * lanes + lane],
            )
            for r in range(rows):
                for c in range(columns // lanes):
                    with kernel.vectorized(lanes) as lane:
                        place = panel * columns + c * lanes + lane
                        value = registers.values[r, c, lane]
                        value = value if biases is None else value + kernel.flat(biases.storage)[place]
                        outputs[0].store((begin + r) * (directions * panels * columns) + place, value)

        rows = kernel.size(count)
        with kernel.parallel(tirx.truncdiv(rows + (plan.rows - 1), int64(plan.rows))) as group:
            begin = group * plan.rows
            with kernel.serial(directions * panels) as panel, T.If(begin + plan.rows <= rows):
                with T.Then():
                    write(plan.rows, begin, panel)
                with T.Else(), kernel.serial(rows - begin) as row:
                    write(1, begin + row, panel)

    return write_kernel(
        RULE,
        name,
        target,
        [view for view in (x, weights, biases) if view is not None],
        [(shape, layer.dtype)],
        body,
        configuration={"rows": plan.rows, "units": units, "lanes": lanes},
        flops=count * directions * gates * layer.hidden * (2 * depth + (biases is not None)),
    )


def _evaluated(layer: Layer, cell: Cell, _: Kernel) -> Any:
    """Writes what a cell gives at units of which nothing is known."""
    *first, last = cell(layer, 0, unknown_units(layer))
    for value in first:
        T.evaluate(value)
    return last


class _Recurrence:
    def __init__(
        self,
        kernel: Kernel,
        layer: Layer,
        operands: Operands,
        plan: Plan,
        sizes: tuple[Size, Size],
        outputs: list[Output],
    ) -> None:
        self.kernel, self.layer, self.operands, self.plan, self.outputs = kernel, layer, operands, plan, outputs
        self.steps, self.batch = map(kernel.size, sizes)
        self.batch_size = sizes[1]
        self.lanes = lanes_of(kernel.target, layer.dtype)
        self.columns = [len(stage) * plan.units for stage in layer.stages]

    def write(self) -> None:
        """Tasks are directions x shares of the rows."""
        plan, directions = self.plan, len(self.layer.reverse)
        groups = tirx.truncdiv(self.batch + (plan.rows - 1), int64(plan.rows))
        tasks = directions * plan.shares
        with (self.kernel.serial if tasks == 1 else self.kernel.parallel)(tasks) as task:
            share = T.bind(tirx.truncmod(task, int64(plan.shares)))
            self.direction = T.bind(tirx.truncdiv(task, int64(plan.shares)))
            self.first = T.bind(tirx.truncdiv(share * groups, int64(plan.shares)) * plan.rows)
            end = tirx.truncdiv((share + 1) * groups, int64(plan.shares)) * plan.rows
            self.rows = T.bind(tirx.min(self.batch, end) - self.first)
            self.room = tirx.truncdiv(groups + (plan.shares - 1), int64(plan.shares)) * (plan.rows * plan.width)
            self.allocate()
            if len(set(self.layer.functions)) == 1:
                self.run(0)
                return
            for number in range(directions):
                with T.If(tirx.EQ(self.direction, int64(number))), T.Then():
                    self.run(number)

    def allocate(self) -> None:
        """Two states h, of which each step reads one and writes the other, and what is kept besides, row after row."""
        kernel, dtype = self.kernel, self.layer.dtype
        self.h: Any = kernel.scratch(self.room * 2, dtype=dtype)
        self.c: Any = kernel.scratch(self.room, dtype=dtype) if self.layer.states == 2 else None
        in_two = len(self.layer.stages) == 2
        self.kept: Any
        self.changed: Any
        self.kept, self.changed = (kernel.scratch(self.room, dtype=dtype) if in_two else None for _ in range(2))
        self.sums = kernel.registers(self.plan.rows * max(self.columns), dtype=dtype)
        self.settled: Any = kernel.registers(_MOST_SETTLED, self.lanes, dtype=dtype)

    def run(self, number: int) -> None:
        """All steps of a direction with the activations of this number."""
        kernel = self.kernel
        self.begin()
        with kernel.serial(self.steps) as step:
            self.step = step
            self.current = T.bind(tirx.truncmod(step, int64(2)) * self.room)
            self.following = T.bind(self.room - self.current)
            for stage in range(len(self.columns)):
                with kernel.serial(self.plan.panels) as panel:
                    self.panel = T.bind(panel)
                    with kernel.serial(tirx.truncdiv(self.rows + (self.plan.rows - 1), int64(self.plan.rows))) as group:
                        self.tile(stage, number, T.bind(group * self.plan.rows))
            with kernel.serial(self.rows) as row:
                self.put_out(row)
        self.end()

    def begin(self) -> None:
        kernel = self.kernel
        states = [*self.operands.states, *[None] * self.layer.states]
        with kernel.serial(self.rows) as row:

            def copy(unit: Any) -> None:
                for state, buffer in zip(states, (self.h, self.c), strict=False):
                    if buffer is not None:
                        T.buffer_store(buffer, self.initial(state, row, unit), [row * self.plan.width + unit])

            for_columns(kernel, int64(self.layer.hidden), copy)

    def initial(self, state: View | None, row: Any, unit: Any) -> Any:
        if state is None:
            return tirx.const(0, self.layer.dtype)
        index = Index(state.shape, self.kernel.sizes, axes=(self.direction, self.first + row, unit))
        return self.kernel.load(state, index).astype(self.layer.dtype)

    # Rows -------------------------------------------------------------------------------------------------------------
    def length(self, row: Any) -> Any:
        """Steps of a row."""
        lengths = self.operands.lengths
        if lengths is None:
            return self.steps
        index = Index(lengths.shape, self.kernel.sizes, axes=(self.first + row,))
        return tirx.min(self.kernel.load(lengths, index).astype("int64"), self.steps)

    def time(self, row: Any) -> Any:
        """The step of the sequence that a row is at: a reverse direction begins at the row's own end."""
        if not any(self.layer.reverse):
            return self.step
        length = self.length(row)
        back = length - 1 - self.step
        if self.operands.lengths is not None:
            back = tirx.Select(self.step < length, back, self.step)
        return back if all(self.layer.reverse) else tirx.Select(self.direction > 0, back, self.step)

    def active(self, row: Any) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Around what is done only for rows that have not ended."""
        if self.operands.lengths is None:
            return nullcontext(), nullcontext()
        return T.If(self.step < self.length(row)), T.Then()

    # One tile ---------------------------------------------------------------------------------------------------------
    def tile(self, stage: int, number: int, begin: Any) -> None:
        kernel, most = self.kernel, self.plan.rows
        exist = T.bind(tirx.min(int64(most), self.rows - begin))
        whole = isinstance(self.batch_size, int) and self.batch_size % most == 0
        if most == 1 or whole:
            self.multiply(stage, most, begin, int64(0))
        else:
            with T.If(exist >= most):
                with T.Then():
                    self.multiply(stage, most, begin, int64(0))
                with T.Else(), kernel.serial(exist) as row:
                    self.multiply(stage, 1, begin + row, row * self.columns[stage])
        with kernel.serial(exist) as row:
            outer, inner = self.active(begin + row)
            with outer, inner:
                self.follow(stage, number, begin + row, row * self.columns[stage])

    def multiply(self, stage: int, rows: int, begin: Any, where: Any) -> None:
        """The sums of all gates of a stage, kept from `where` on."""
        columns, layer, operands = self.columns[stage], self.layer, self.operands
        registers = RegisterTile(self.kernel, Tile(rows, columns // self.lanes), layer.dtype)
        registers.zero()
        block = self.direction * self.plan.panels + self.panel
        source, offset = (self.h, self.current) if stage == 0 else (self.changed, int64(0))
        weights = self.kernel.flat(operands.weights[stage].storage)
        first = T.bind(block * (layer.hidden * columns))
        starts = [T.bind(offset + (begin + r) * self.plan.width) for r in range(rows)]
        registers.multiply(
            layer.hidden,
            lambda r, k: source[starts[r] + k],
            lambda k, c, lane: weights[first + k * columns + c * self.lanes + lane],
        )
        registers.keep(self.sums, where)

    def follow(self, stage: int, number: int, row: Any, where: Any) -> None:
        """What the sums from `where` on make of a row."""
        layer, plan = self.layer, self.plan
        row_of_given = (self.time(row) * self.batch + self.first + row) * len(layer.reverse) + self.direction
        start = T.bind((row_of_given * plan.panels + self.panel) * (layer.gates * plan.units))
        first = T.bind(row * plan.width + self.panel * plan.units)
        stores = [(self.h, self.following), (self.c, 0)] if stage + 1 == len(self.columns) else []
        stores = stores or [(self.kept, 0), (self.changed, 0)]
        for vector in range(0, plan.units, self.lanes):
            with self.kernel.vectorized(self.lanes) as lane:
                at = self.units(stage, lane, vector, where, start, first)
                values = layer.cells[stage](layer, number, at)
                for (buffer, offset), value in zip(stores, map(at.settle, values), strict=False):
                    T.buffer_store(buffer, value, [offset + first + vector + lane])

    def units(self, stage: int, lane: Any, vector: int, where: Any, start: Any, first: Any) -> Units:
        plan, gates, operands, flat = self.plan, self.layer.stages[stage], self.operands, self.kernel.flat
        where, start, unit, column = (position + vector + lane for position in (where, start, first, 0))
        block = self.direction * plan.panels + self.panel

        def peephole(number: int) -> Any:
            assert operands.peepholes is not None
            return flat(operands.peepholes.storage)[(block * 3 + number) * plan.units + column]

        places = count()

        def settle(value: Any) -> Any:
            place = next(places)
            T.buffer_store(self.settled, value, [place, lane])
            return self.settled[place, lane]

        own, given = operands.own_bias, flat(operands.given.storage)
        return Units(
            lambda gate: self.sums[where + gates.index(gate) * plan.units],
            lambda gate: given[start + gate * plan.units],
            self.h[self.current + unit],
            None if self.c is None else self.c[unit],
            None if self.kept is None else self.kept[unit],
            None if own is None else flat(own.storage)[block * plan.units + column],
            None if operands.peepholes is None else peephole,
            settle,
        )

    # Results ----------------------------------------------------------------------------------------------------------
    def put_out(self, row: Any) -> None:
        """The output of a row at this step; zero, its state kept, where the row has ended."""
        kernel, output, hidden = self.kernel, self.outputs[0], self.layer.hidden
        here = T.bind(row * self.plan.width)

        def place(step: Any) -> Any:
            row_of_y = (step * self.batch + self.first + row) * len(self.layer.reverse)
            return T.bind((row_of_y + self.direction) * hidden)

        def copy() -> None:
            start = place(self.time(row))
            for_columns(
                kernel, int64(hidden), lambda unit: output.store(start + unit, self.h[self.following + here + unit])
            )

        if self.operands.lengths is None:
            copy()
            return

        def keep(unit: Any) -> None:
            output.store(start + unit, tirx.const(0, self.layer.dtype))
            T.buffer_store(self.h, self.h[self.current + here + unit], [self.following + here + unit])

        with T.If(self.step < self.length(row)):
            with T.Then():
                copy()
            with T.Else():
                start = place(self.step)
                for_columns(kernel, int64(hidden), keep)

    def end(self) -> None:
        """The last states; zero for a row of no steps."""
        last = T.bind(tirx.truncmod(self.steps, int64(2)) * self.room)
        states = [(self.h, last), (self.c, int64(0))]
        with self.kernel.serial(self.rows) as row:
            start = T.bind((self.direction * self.batch + self.first + row) * self.layer.hidden)
            length = self.length(row)

            def copy(unit: Any) -> None:
                for output, (buffer, offset) in zip(self.outputs[1:], states, strict=False):
                    value = buffer[offset + row * self.plan.width + unit]
                    if self.operands.lengths is not None:
                        value = tirx.Select(length > 0, value, tirx.const(0, self.layer.dtype))
                    output.store(start + unit, value)

            for_columns(self.kernel, int64(self.layer.hidden), copy)
