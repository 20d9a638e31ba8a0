"""Minimal filtering that leaves out blocks of channels, as many as a sample's masks say.

The loops are those of `winograd`, over one image after the other. Only channels that take part are transformed, side by
side in scratch; a panel is any vectors of output channels that take part, whose weights are packed one vector wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.active_blocks import ActiveList, Gates, store_vector
from graphopt.backends.rules.register_tile import RegisterTile
from graphopt.backends.rules.winograd import OUT, POINTS, Winograd, WinogradWriter
from graphopt.backends.sizes import product
from graphopt.backends.target import Target
from graphopt.backends.values import Product, fused_name

RULE = "gated-winograd"
_LINE = 16  # float32 elements of a cache line
_LEAST_PRODUCTS = 8  # multiply-adds of a line of weights: with fewer, asking for lines ahead takes longer than it saves


def gated_winograd(convolution: Winograd, gates: Gates, result: Product, end: Any, name: str, target: Target) -> Code:
    """`winograd` over the blocks that take part, with the bias of `gates`; what takes no part is zero.

    The weight is transformed and packed one vector wide. Work is counted as if every block took part.
    """
    choice, channels = convolution.choice, int(convolution.x.shape[3])

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        _Gated(kernel, convolution, gates, result, end, outputs[0]).write()

    return write_kernel(
        RULE,
        fused_name(name, end),
        target,
        [convolution.x, convolution.weight, *gates.reads, end],
        [(end.shape, end.dtype)],
        body,
        configuration={
            "rows": choice.tile.rows,
            "columns": choice.tile.vectors * target.lanes,
            "lanes": target.lanes,
            "outputs": f"{OUT}x{OUT}",
            "block_tiles": choice.block_tiles,
            "tile_groups": choice.tile_groups,
            "panel_groups": choice.panel_groups,
            "block": gates.block,
        },
        flops=2 * 9 * channels * product(convolution.outputs) + operations([end], target),
        extra_shapes=[convolution.outputs],
    )


class _Gated(WinogradWriter):
    def __init__(
        self, kernel: Kernel, convolution: Winograd, gates: Gates, result: Product, end: Any, output: Output
    ) -> None:
        super().__init__(kernel, convolution, result, end, output)
        self.gates = gates
        self.columns = self.choice.tile.vectors * self.lanes
        self.vectors: list[Any] = []  # of the panel that is being written

    def write(self) -> None:
        """A task takes its blocks of the tiles of each image and its panels."""
        kernel, choice, gates = self.kernel, self.choice, self.gates
        tiles = self.down * self.across
        per_image = -(-tiles // choice.block_tiles)
        blocks = self.batch * per_image
        each = tirx.truncdiv(blocks + (choice.tile_groups - 1), int64(choice.tile_groups))
        with kernel.parallel(choice.tile_groups * choice.panel_groups) as task:
            first_block = tirx.truncdiv(task, int64(choice.panel_groups)) * each
            share = tirx.truncmod(task, int64(choice.panel_groups))
            self.taking = ActiveList(kernel, gates.inputs, gates.block, self.channels, self.lanes)
            self.making = ActiveList(kernel, gates.outputs, gates.block, self.count, self.lanes)
            inputs = kernel.scratch(POINTS * choice.block_tiles * self.channels)
            rows = -(-choice.block_tiles // choice.tile.rows) * choice.tile.rows
            sums = kernel.scratch(POINTS * rows * self.columns)
            with kernel.serial(tirx.min(each, blocks - first_block)) as number:
                block = first_block + number
                image, inside = tirx.truncdiv(block, int64(per_image)), tirx.truncmod(block, int64(per_image))
                start = inside * choice.block_tiles
                here = T.bind(tirx.min(int64(choice.block_tiles), tiles - start))
                first = T.bind(image * tiles + start)
                self.taking.read(image)
                self.making.read(image)
                self.transform_inputs(inputs, first, here)
                self.write_panels(inputs, sums, rows, first, here, share)

    def write_panels(self, inputs: Any, sums: Any, rows: int, first: Any, here: Any, share: Any) -> None:
        kernel, shares, wide = self.kernel, self.choice.panel_groups, self.choice.tile.vectors
        count = T.bind(self.making.count)
        panels = T.bind(tirx.truncdiv(count + (wide - 1), int64(wide)))
        begin = T.bind(tirx.truncdiv(share * panels, int64(shares)))
        with kernel.serial(tirx.truncdiv((share + 1) * panels, int64(shares)) - begin) as own:
            place = T.bind((begin + own) * wide)
            self.vectors = [T.bind(self.making.unit(tirx.min(place + c, count - 1))) for c in range(wide)]
            self.multiply(inputs, sums, here, begin + own)
            self.transform_sums(sums, rows, first, here, begin + own)
        if self.gates.outputs is not None:
            with T.If(tirx.EQ(share, int64(0))), T.Then():
                self.write_zeros(first, here, count)

    @contextmanager
    def input_vectors(self) -> Iterator[tuple[Any, Any]]:
        with self.taking.each_active() as place:
            yield T.bind(self.taking.unit(place)), place

    def multiply_point(
        self, registers: RegisterTile, inputs: Any, starts: Sequence[Any], panel: Any, point: Any
    ) -> None:
        streams = [T.bind((vector * POINTS + point) * (self.channels * self.lanes)) for vector in self.vectors]
        ahead = self.choice.tile.rows * _LINE // self.lanes >= _LEAST_PRODUCTS

        def run(count: int, place: Any, channel: Any) -> None:
            registers.multiply(
                count,
                lambda r, k: inputs[starts[r] + place + k],
                lambda k, c, lane: self.weights[streams[c] + (channel + k) * self.lanes + lane],
                (lambda outer: self.prefetch(streams, channel + outer * self.choice.tile.steps)) if ahead else None,
            )

        if self.gates.inputs is None:
            run(self.channels, 0, 0)
            return
        with self.taking.each_active() as number:
            run(self.lanes, number * self.lanes, T.bind(self.taking.unit(number) * self.lanes))

    def prefetch(self, streams: Sequence[Any], channel: Any) -> None:
        """Ask for the lines that the next point reads where this one is: streams that lie apart come late otherwise.

        Not where weights are read faster than multiplied, by tiles of few rows: with it 2 x 64 takes a seventh longer.
        """
        for stream in streams:
            for step in range(self.choice.tile.steps):
                place = stream + (self.channels + channel + step) * self.lanes
                T.evaluate(tirx.call_intrin("void", "tirx.prefetch", tirx.address_of(self.weights[place]), 0, 3, 1))

    def column(self, panel: Any, c: int) -> Any:
        return self.vectors[c] * self.lanes

    def write_output(self, outputs: Any, i: int, j: int, row: Any, column: Any) -> None:
        self.store(row, column, lambda lane: outputs[i, j, lane])

    def write_zeros(self, first: Any, here: Any, count: Any) -> None:
        """The channels that take no part, at every output of the block's tiles."""
        kernel = self.kernel
        with kernel.serial(here) as tile:
            image, top, left = self.tile_place(first + tile)
            rows, columns = (tirx.min(int64(OUT), size - at) for size, at in ((self.height, top), (self.width, left)))
            with kernel.serial(rows) as i, kernel.serial(columns) as j, self.making.each_other() as place:
                row = (image * self.height + top + i) * self.width + left + j
                self.store(row, self.making.unit(count + place) * self.lanes, None)

    def store(self, row: Any, column: Any, value: Callable[[Any], Any] | None) -> None:
        store_vector(self.kernel, self.gates, self.result, self.end, self.output, row, column, value)
