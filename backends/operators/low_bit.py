"""graphopt::lut_build, lut_gemv and wq_gemm: weights are packed to their bits, and one kernel serves any rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from tvm import tirx

from graphopt.backends.kernel import Code, int64
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import like
from graphopt.backends.operators.integer_products import constants
from graphopt.backends.rules import low_bit_build, low_bit_gemv
from graphopt.backends.rules.low_bit_codes import Operands
from graphopt.backends.rules.low_bit_gemv import Configuration
from graphopt.backends.rules.low_bit_layout import Layout
from graphopt.backends.rules.low_bit_tiles import FEWEST_ROWS
from graphopt.backends.sizes import product
from graphopt.backends.values import Index, Lazy, Product, View
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

_CONSTANTS = ("weight", "weight_scale", "weight_zero", "codebook", "bias", "tag")
_UNSIGNED = 128  # added to numbers of codebooks where instructions multiply bytes without a sign
_SMALL_BOOK, _BOOK = 16, 256  # entries that instructions look up


def _build(lowering: Lowering, node: Node) -> tuple[View, ...]:
    given = arguments(node)
    x = lowering.contiguous(given["x"])
    return tuple(lowering.call(low_bit_build.build(x, given["group"], given["table"], lowering.target)))


def _product(lowering: Lowering, node: Node) -> View:
    given, held = arguments(node), constants(lowering, node, _CONSTANTS)
    if given["table"] != "exact":
        raise CompileError(f"{node.name} multiplies tables of int8, which has no lowering; use table='exact'")
    weight, bits, target = held["weight"], given["bits"], lowering.target
    n, k = (int(size) for size in weight.shape)
    codes, scale, sums = (lowering.contiguous(given[name]) for name in ("codes", "scale", "sums"))
    book = held["codebook"]
    if book is not None and book.numel() > _BOOK:
        raise CompileError(
            f"{node.name} chooses between {book.shape[0]} codebooks of {2**bits} numbers, and kernels look up {_BOOK} "
            f"numbers; give at most {_BOOK >> bits}"
        )
    bias = None if held["bias"] is None else lowering.weight(held["bias"])
    fewest = _fewest_rows(lowering, node, given["kernel"])
    masked = low_bit_gemv.masks(target, bits, book is not None)
    rows = product(scale.shape[:-1])

    def layout_of(vectors: int) -> Layout:
        return Layout(n, k, bits, given["group"], target.lanes, vectors)

    padded = _padded(lowering, codes, layout_of(2))

    def build(result: Product, end: Any) -> Code:
        def write(choice: Configuration) -> Code:
            operands = _operands(lowering, layout_of(choice.vectors), (padded, scale, sums), held)
            return low_bit_gemv.gemv(operands, result, end, f"low_bit_{bits}_{n}x{k}", target, choice, fewest)

        return lowering.choose(low_bit_gemv.offer(target, rows, layout_of, end, masked, write))

    return lowering.anchored(node, build, _with_bias(bias))


def _fewest_rows(lowering: Lowering, node: Node, kernel: str) -> int | None:
    """From how many rows on tiles multiply; None where none do."""
    if kernel == "lut":
        raise CompileError(f"{node.name} asks for kernel='lut', which has no lowering; use 'auto' or 'unpack'")
    if kernel == "amx" and not lowering.target.amx:
        raise CompileError(f"{node.name} asks for kernel='amx', and {lowering.target.name} has no tiles; use 'auto'")
    if kernel == "unpack" or not lowering.target.amx:
        return None
    return 1 if kernel == "amx" else FEWEST_ROWS


def _with_bias(bias: View | None) -> Callable[[Any], Any]:
    def begin(result: Any) -> Any:
        if bias is None:
            return result

        def element(kernel: Kernel, index: Index) -> Any:
            return kernel.load(result, index) + kernel.flat(bias.storage)[index.axis(len(result.shape) - 1)]

        return Lazy(result.shape, "float32", (result, bias), element, name="add")

    return begin


def _operands(
    lowering: Lowering, layout: Layout, activations: tuple[View, View, View], held: dict[str, Any]
) -> Operands:
    key = f"bits{layout.bits}x{layout.outputs}x{layout.group}"
    zero, book, tag = held["weight_zero"], held["codebook"], held["tag"]
    unsigned = lowering.target.quads == "uint8"
    offset = (_UNSIGNED if unsigned else 0) if book is not None else (0 if unsigned or layout.bits < 8 else -_UNSIGNED)
    return Operands(
        layout,
        *activations,
        lowering.weight(held["weight"], key, layout.pack),
        lowering.weight(held["weight_scale"], key, lambda numbers: _narrow(layout.pack_groups(numbers))),
        _zero(lowering, layout, key, zero),
        None if book is None else lowering.weight(book, f"book{offset}", lambda numbers: _book(numbers, offset)),
        None if tag is None else lowering.weight(tag, key, layout.pack_groups),
        offset,
    )


def _zero(lowering: Lowering, layout: Layout, key: str, zero: Tensor | None) -> View | float | None:
    """A number where all groups have the same one."""
    if zero is None:
        return None
    first = float(zero.flatten()[0])
    if bool((zero == first).all()):
        return first if first else None
    return lowering.weight(zero, key, lambda numbers: _narrow(layout.pack_groups(numbers), np.uint8))


def _narrow(numbers: np.ndarray, *narrower: type[np.generic]) -> np.ndarray:
    """The same numbers in the narrowest type that has all of them, float16 before float32."""
    with np.errstate(all="ignore"):
        for dtype in (*narrower, np.float16):
            narrow: np.ndarray = numbers.astype(dtype)
            if np.array_equal(narrow.astype(numbers.dtype), numbers):
                return narrow
    return numbers


def _book(numbers: np.ndarray, offset: int) -> np.ndarray:
    """All codebooks one after the other, as bytes with `offset` added."""
    flat = (numbers.astype(np.int16).reshape(-1) + offset).astype(np.uint8)
    return np.pad(flat, (0, (_SMALL_BOOK if len(flat) <= _SMALL_BOOK else _BOOK) - len(flat)))


def _padded(lowering: Lowering, codes: View, layout: Layout) -> View:
    """Rows in which each group fills its steps, with zeros."""
    if layout.packed_k == layout.k:
        return codes
    group, depth, last = layout.group, layout.depth, len(codes.shape) - 1

    def element(kernel: Kernel, index: Index) -> Any:
        at = index.axis(last)
        inside = tirx.truncmod(at, int64(depth))
        source = tirx.truncdiv(at, int64(depth)) * min(group, layout.k) + inside
        axes = tuple(index.axis(number) for number in range(last))
        read = Index(codes.shape, kernel.sizes, axes=(*axes, tirx.min(source, int64(layout.k - 1))))
        code = kernel.load(codes, read)
        return tirx.Select(tirx.all(inside < min(group, layout.k), source < layout.k), code, like(code, 0))

    return lowering.store(Lazy((*codes.shape[:-1], layout.packed_k), "int8", (codes,), element, name="pad"))


TABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.graphopt.lut_build.default: _build,
    torch.ops.graphopt.lut_gemv.default: _product,
    torch.ops.graphopt.wq_gemm.default: _product,
}
