"""Direct convolution that leaves out blocks of channels, as many as a sample's masks say.

The loops are those of the direct convolution. A panel is any vectors of output channels that take part, so that weights
are packed once, one vector wide, and a tile reads as many streams of them as it has vectors; under each tap only the
blocks of input channels that take part are gone through. The last panel of a block of pixels repeats its last vector.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.active_blocks import ActiveList, Gates, store_vector
from graphopt.backends.rules.convolution import Block, ConvolutionWriter, Direct, Source
from graphopt.backends.rules.register_tile import RegisterTile
from graphopt.backends.sizes import product
from graphopt.backends.target import Target
from graphopt.backends.values import Product, fused_name

RULE = "gated-direct-convolution"


def gated_convolution(direct: Direct, gates: Gates, result: Product, end: Any, name: str, target: Target) -> Code:
    """`convolution` over the blocks that take part, with the bias of `gates`; what takes no part is zero.

    The weight is packed one vector wide. Work is counted as if every block took part.
    """
    choice, depth = direct.choice, int(direct.weight.shape[1])

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        _Gated(kernel, direct, gates, result, end, outputs[0]).write()

    return write_kernel(
        RULE,
        fused_name(name, end),
        target,
        [direct.x, direct.weight, *gates.reads, end],
        [(end.shape, end.dtype)],
        body,
        configuration={
            "rows": choice.tile.rows,
            "columns": choice.tile.vectors * target.lanes,
            "lanes": target.lanes,
            "block_rows": choice.block_rows,
            "row_groups": choice.row_groups,
            "panel_groups": choice.panel_groups,
            "taps": "row by row" if choice.chunked else "all",
            "input": "padded copy" if direct.padded else "in place",
            "block": gates.block,
        },
        flops=2 * depth * product(direct.outputs) + operations([end], target),
        extra_shapes=[direct.outputs],
    )


class _Gated(ConvolutionWriter):
    def __init__(self, kernel: Kernel, direct: Direct, gates: Gates, result: Product, end: Any, output: Output) -> None:
        super().__init__(kernel, direct, result, end, output)
        self.gates = gates
        self.columns = self.choice.tile.vectors * self.lanes
        self.vectors: list[Any] = []  # of the panel that is being written

    def begin_task(self) -> None:
        gates = self.gates
        self.taking = ActiveList(self.kernel, gates.inputs, gates.block, self.channels, gates.block)
        self.making = ActiveList(self.kernel, gates.outputs, gates.block, self.outputs, self.lanes)

    def write_panels(self, source: tuple[Source, Any], partial: Any, image: Any, first_row: Any, share: Any) -> None:
        kernel, shares, wide = self.kernel, self.choice.panel_groups, self.choice.tile.vectors
        self.taking.read(image)
        self.making.read(image)
        count = T.bind(self.making.count)
        panels = T.bind(tirx.truncdiv(count + (wide - 1), int64(wide)))
        first = T.bind(tirx.truncdiv(share * panels, int64(shares)))
        with kernel.serial(tirx.truncdiv((share + 1) * panels, int64(shares)) - first) as own:
            place = T.bind((first + own) * wide)
            self.vectors = [T.bind(self.making.unit(tirx.min(place + c, count - 1))) for c in range(wide)]
            self.write_panel(source, partial, image, first_row, first + own)
        with T.If(tirx.EQ(share, int64(0))), T.Then():
            self.write_zeros(image, first_row, count)

    def write_zeros(self, image: Any, first_row: Any, count: Any) -> None:
        """The channels that take no part, at every pixel of a block of rows."""
        kernel = self.kernel
        pixels = tirx.min(int64(self.choice.block_rows), self.height - first_row) * self.width
        if self.gates.outputs is None:
            return
        with kernel.serial(pixels) as pixel, self.making.each_other() as place:
            row = (image * self.height + first_row) * self.width + pixel
            self.store(row, self.making.unit(count + place) * self.lanes, None)

    def weight_place(self, panel: Any, depth: Any, c: int) -> Any:
        return (self.vectors[c] * self.depth + depth) * self.lanes

    def tiles_together(self) -> int | None:
        return None

    def run_channels(self, run: Callable[[Any, int], None]) -> None:
        if self.gates.inputs is None:
            run(0, self.channels)
            return
        block = self.gates.block
        with self.taking.each_active() as place:
            run(T.bind(self.taking.unit(place) * block), block)

    def write_tile(self, registers: RegisterTile, block: Block, number: Any) -> None:
        first = number * self.choice.tile.rows
        for r in range(self.choice.tile.rows):
            with T.If(first + r < block.pixels), T.Then():
                for c, vector in enumerate(self.vectors):
                    row = block.first_pixel + first + r
                    self.store(row, vector * self.lanes, partial(registers.value, r, c))

    def store(self, row: Any, column: Any, value: Callable[[Any], Any] | None) -> None:
        store_vector(self.kernel, self.gates, self.result, self.end, self.output, row, column, value)
