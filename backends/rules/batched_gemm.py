"""Products of two computed tensors: [batch, M, K] x [batch, K, N], float32, operands with any strides.

A task copies one panel of the right operand into scratch, K x columns as a packed weight has it, and runs register
tiles down it for all rows: of M multiply-adds an element the copy costs one load and one store, by vectors where
columns or depth lie beside each other. What is broadcast over the batch is read in place; a right side without a batch
is copied once for the rows of all. Sums run over k from first to last, whatever the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.choice import UNUSUAL, Choice, epilogue_parameters, size_parameter
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.operations import operations
from graphopt.backends.rules.lanes import span, transposed, vector_type
from graphopt.backends.rules.register_tile import RegisterTile, Tile, choose_tile, tile_cost, tiles
from graphopt.backends.sizes import Shape, Size, product
from graphopt.backends.target import Target
from graphopt.backends.tuner.record import Workload
from graphopt.backends.values import Product, View, fused_name

RULE = "batched-gemm"
_MANY_COLUMNS = 960  # what choosing a tile takes a number of columns known at run time for


@dataclass(frozen=True)
class Configuration:
    """What may be chosen for one product; results do not depend on it."""

    tile: Tile
    row_shares: int  # shares of the rows of each batch between threads, each with its own copy of the panel


def configure(
    target: Target, batch: Size, rows: Size, columns: Size, depth: Size, temporaries: int = 0
) -> Configuration:
    """The default: rows are shared out only where batches and panels are fewer than threads."""
    wide = columns if isinstance(columns, int) else _MANY_COLUMNS
    tile = choose_tile(target, rows, wide, depth if isinstance(depth, int) else 256, temporaries=temporaries)
    tasks = batch * -(-wide // (tile.vectors * target.lanes)) if isinstance(batch, int) else target.threads
    return Configuration(tile, 1 if tasks >= target.threads else target.threads)


def worth_timing(
    target: Target, batch: Size, rows: Size, columns: Size, depth: Size, temporaries: int = 0
) -> list[Configuration]:
    """Every tile, with rows shared out or not, the least expected time first."""
    usual = configure(target, batch, rows, columns, depth).row_shares
    many = rows if isinstance(rows, int) else _MANY_COLUMNS
    wide = columns if isinstance(columns, int) else _MANY_COLUMNS
    k = depth if isinstance(depth, int) else 256
    costs = {
        Configuration(tile, shares): tile_cost(target, tile, many, wide, k) * (1 if shares == usual else UNUSUAL)
        for tile in tiles(target, temporaries=temporaries)
        for shares in dict.fromkeys((1, target.threads))
    }
    return sorted(costs, key=lambda choice: costs[choice])


def offer(a: View, b: View, result: Product, end: Any, name: str, target: Target) -> Choice[Configuration]:
    """What may be chosen for the kernel that `batched_gemm` writes."""
    left, other, shape = merged(a, b, result)
    sizes = (product(shape[:-2]), shape[-2], shape[-1], left.shape[-1])
    parameters = {
        **dict(zip(("batch", "rows", "n", "k"), map(size_parameter, sizes), strict=True)),
        "dtype": a.dtype if a.dtype == b.dtype else f"{a.dtype} {b.dtype}",
        "a_beside": beside(left, "rows", "depth"),
        "b_beside": beside(other, "depth", "columns"),
    }
    return Choice(
        Workload.of(RULE, {**parameters, **epilogue_parameters(end)}),
        configure(target, *sizes),
        lambda: worth_timing(target, *sizes),
        lambda choice: batched_gemm(a, b, result, end, name, target, choice),
    )


def beside(view: View, down: str, across: str) -> str:
    """Along which axis of a matrix elements lie beside each other."""
    return across if view.strides[-1] == 1 else down if view.strides[-2] == 1 else "neither"


def merged(a: View, b: View, result: Product) -> tuple[View, View, Shape]:
    """The operands and the shape of the product; a right side without a batch makes it one matrix."""
    if product(b.shape[:-2]) != 1 or not a.contiguous:
        return a, b, result.shape
    a = View(a.storage, (product(a.shape[:-1]), a.shape[-1]), (a.shape[-1], 1))
    b = View(b.storage, b.shape[-2:], b.strides[-2:], b.offset)
    return a, b, (*a.shape[:-1], b.shape[-1])


def batched_gemm(a: View, b: View, result: Product, end: Any, name: str, target: Target, choice: Configuration) -> Code:
    """C[..., m, n] = sum over k of A[..., m, k] B[..., k, n], then the element-wise tree `end` over `result`.

    float32; leading axes broadcast to those of the result.
    """
    a, b, shape = merged(a, b, result)
    depth = a.shape[-1]

    def body(kernel: Kernel, outputs: list[Output]) -> None:
        Batched(kernel, a, b, shape, choice).write(result, end, outputs[0])

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
            "row_shares": choice.row_shares,
        },
        flops=2 * product(shape) * depth + operations([end], target),
        extra_shapes=[shape],
    )


class Batched:
    """The loops of one kernel: panels and tiles; how panels are made and multiplied depends on the operands' type."""

    def __init__(self, kernel: Kernel, a: View, b: View, shape: Shape, choice: Configuration) -> None:
        self.kernel, self.a, self.b, self.choice = kernel, a, b, choice
        self.batch, self.width = shape[:-2], shape[-1]
        self.lanes = kernel.target.lanes
        self.columns = choice.tile.vectors * self.lanes
        self.rows, self.n, self.k = (kernel.size(size) for size in (shape[-2], shape[-1], a.shape[-1]))
        self.depth = a.shape[-1] if isinstance(a.shape[-1], int) else self.k

    def write(self, result: Product, end: Any, output: Output) -> None:
        kernel, tile, shares = self.kernel, self.choice.tile, self.choice.row_shares
        panels = tirx.floordiv(self.n + (self.columns - 1), int64(self.columns))
        tiles = tirx.floordiv(self.rows + (tile.rows - 1), int64(tile.rows))
        tasks = kernel.size(product(self.batch)) * panels * shares
        left, right = kernel.flat(self.a.storage), kernel.flat(self.b.storage)
        with kernel.parallel(tasks) as task:
            share = tirx.truncmod(task, int64(shares))
            panel = tirx.truncmod(tirx.truncdiv(task, int64(shares)), panels)
            batch = T.bind(tirx.truncdiv(task, panels * shares))
            first = T.bind(panel * self.columns)
            copy = self.panel()
            self.copy_panel(copy, right, self.start(self.b, batch), first)
            origin = T.bind(self.start(self.a, batch))
            first_tile = T.bind(tirx.truncdiv(share * tiles, int64(shares)))
            with kernel.serial(tirx.truncdiv((share + 1) * tiles, int64(shares)) - first_tile) as number:
                first_row = T.bind((first_tile + number) * tile.rows)
                self.multiply(copy, left, origin, first_row).write(
                    result,
                    end,
                    output,
                    rows=self.rows - first_row,
                    position=lambda r: batch * self.rows + first_row + r,
                    first=first,
                    width=self.width,
                )

    def multiply(self, copy: Any, left: Any, origin: Any, first_row: Any) -> RegisterTile:
        kernel, tile = self.kernel, self.choice.tile
        down, across = (kernel.size(stride) for stride in self.a.strides[-2:])
        starts = [T.bind(origin + tirx.min(first_row + r, self.rows - 1) * down) for r in range(tile.rows)]
        registers = RegisterTile(kernel, tile)
        registers.zero()
        registers.multiply(
            self.depth,
            lambda r, k: left[starts[r] + k * across],
            lambda k, c, lane: copy[k * self.columns + c * self.lanes + lane],
        )
        return registers

    def start(self, view: View, batch: Any) -> Any:
        """Where the matrix of this batch lies in `view`."""
        kernel, position = self.kernel, self.kernel.size(view.offset)
        index = kernel.index(self.batch, linear=batch)
        skip = len(self.batch) - (len(view.shape) - 2)
        for number, (size, stride) in enumerate(zip(view.shape[:-2], view.strides[:-2], strict=True)):
            if size != 1 and stride != 0:
                position = position + index.axis(skip + number) * kernel.size(stride)
        return position

    def panel(self) -> Any:
        """Where a task keeps its panel."""
        return self.kernel.scratch(self.k * self.columns)

    # The right operand ------------------------------------------------------------------------------------------------
    def copy_panel(self, copy: Any, right: Any, start: Any, first: Any) -> None:
        """copy[k, c] = B[k, first + c]; past the last column that one is read again, and its sums are not stored."""
        kernel = self.kernel
        down, across = self.b.strides[-2:]
        start, stride, step = T.bind(start), kernel.size(down), kernel.size(across)

        def copy_one(k: Any, c: Any) -> None:
            column = tirx.min(first + c, self.n - 1)
            value = right[start + k * stride + column * step].astype("float32")
            T.buffer_store(copy, value, [k * self.columns + c])

        whole = first + self.columns <= self.n
        if across == 1:
            with T.If(whole):
                with T.Then(), kernel.serial(self.k) as k:
                    for c in range(self.choice.tile.vectors):
                        with kernel.vectorized(self.lanes) as lane:
                            at = c * self.lanes + lane
                            value = right[start + k * stride + first + at].astype("float32")
                            T.buffer_store(copy, value, [k * self.columns + at])
                with T.Else(), kernel.serial(self.k) as k, kernel.serial(self.columns) as c:
                    copy_one(k, c)
            return
        blocks = tirx.truncdiv(self.k, int64(self.lanes)) if down == 1 else int64(0)
        if down == 1:
            with kernel.serial(blocks) as block:
                for c in range(self.choice.tile.vectors):
                    self.transpose(copy, right, start + block * self.lanes, first + c * self.lanes, block, c, step)
        with kernel.serial(self.k - blocks * self.lanes) as rest, kernel.serial(self.columns) as c:
            copy_one(blocks * self.lanes + rest, c)

    def transpose(self, copy: Any, right: Any, start: Any, first: Any, block: Any, c: int, step: Any) -> None:
        """A square of lanes x lanes: columns that lie along k, stored along columns."""
        lanes = self.lanes
        columns = [tirx.min(first + number, self.n - 1) for number in range(lanes)]
        vectors = [T.bind(right[span(start + column * step, lanes)]) for column in columns]
        for number, vector in enumerate(transposed(vectors)):
            place = (block * lanes + number) * self.columns + c * lanes
            T.buffer_store(copy, vector.astype(vector_type("float32", lanes)), [span(place, lanes)])
