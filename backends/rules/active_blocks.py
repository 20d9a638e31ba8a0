"""Which blocks of channels take part in a product, found at run time: a list for each sample.

A kernel goes through a list in place of a range. What takes part comes first in it, in order; the rest, which is to be
written as zero, comes last.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernel import Kernel, Output, int64
from graphopt.backends.values import Product, View


@dataclass(frozen=True)
class Gates:
    """The masks of a product, bool [N, channels / block], row-major, and its bias [O]; None: all take part, no bias."""

    inputs: View | None
    outputs: View | None
    bias: View | None
    block: int

    @property
    def reads(self) -> list[View]:
        """What a kernel loads for them."""
        return [view for view in (self.inputs, self.outputs, self.bias) if view is not None]


class ActiveList:
    """Units of `width` channels of those blocks that a sample's mask names; `width` divides a block.

    Without a mask it is all of them, the last of which may be smaller.
    """

    def __init__(self, kernel: Kernel, mask: View | None, block: int, channels: int, width: int) -> None:
        self.kernel, self.mask, self.total = kernel, mask, -(-channels // width)
        self.blocks, self.each = channels // block, block // width
        if mask is not None:
            self.numbers = kernel.scratch(self.total, dtype="int32")
            self.found = kernel.scratch(1, dtype="int32")

    def read(self, sample: Any) -> None:
        """Make it the list of one sample."""
        if self.mask is None:
            return
        T.buffer_store(self.found, tirx.const(0, "int32"), [0])
        mask = self.kernel.flat(self.mask.storage)
        with self.kernel.serial(self.blocks) as block:
            before = self.found[0].astype("int64")
            with T.If(mask[sample * self.blocks + block]):
                with T.Then():
                    self._put(before, block)
                    T.buffer_store(self.found, self.found[0] + 1, [0])
                with T.Else():
                    self._put(self.blocks - 1 - block + before, block)

    def _put(self, place: Any, block: Any) -> None:
        for number in range(self.each):
            value = (block * self.each + number).astype("int32")
            T.buffer_store(self.numbers, value, [place * self.each + number])

    @property
    def count(self) -> Any:
        """Units that take part."""
        return int64(self.total) if self.mask is None else self.found[0].astype("int64") * self.each

    def unit(self, place: Any) -> Any:
        """The number of the unit at a place of the list."""
        return place if self.mask is None else self.numbers[place].astype("int64")

    def each_active(self) -> AbstractContextManager[Any]:
        """A loop over the places of those that take part."""
        return self.kernel.serial(self.count)

    def each_other(self) -> AbstractContextManager[Any]:
        """A loop over how many places the others are behind them."""
        return self.kernel.serial(self.total - self.count)


def store_vector(
    kernel: Kernel,
    gates: Gates,
    result: Product,
    end: Any,
    output: Output,
    row: Any,
    column: Any,
    value: Callable[[Any], Any] | None,
) -> None:
    """One vector of the tree `end` at `row` of the result, from `column` on.

    `value(lane)` is a sum without bias; None stands for what takes no part, which is zero and has no bias. Of the last
    vector only the columns that exist are stored.
    """
    lanes, width = kernel.target.lanes, int(result.shape[-1])

    def store(lane: Any) -> None:
        if value is None:
            total: Any = tirx.const(0, "float32")
        elif gates.bias is None:
            total = value(lane)
        else:
            total = value(lane) + kernel.flat(gates.bias.storage)[column + lane]
        kernel.define(result, lambda _: total)
        index = kernel.index(end.shape, row=row, column=column + lane)
        output.store(row * kernel.size(end.shape[-1]) + column + lane, kernel.load(end, index))

    def whole() -> None:
        with kernel.vectorized(lanes) as lane:
            store(lane)

    if width % lanes == 0:
        whole()
        return
    with T.If(column + lanes <= width):
        with T.Then():
            whole()
        with T.Else(), kernel.serial(width - column) as lane:
            store(lane)
            kernel.forget()
