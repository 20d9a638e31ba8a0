"""graphopt::lut_build, lut_gemv and wq_gemm: weights are packed to their bits, and one kernel serves any rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from graphopt.backends.rules.low_bit_gemv import Configuration, Means
from graphopt.backends.rules.low_bit_layout import QUAD, TURNED, Layout
from graphopt.backends.rules.low_bit_lut import MOST_ROWS, looks_up
from graphopt.backends.rules.low_bit_nibbles import Nibbles, instructions
from graphopt.backends.rules.low_bit_tiles import FEWEST_ROWS
from graphopt.backends.sizes import Size, product
from graphopt.backends.values import Index, Lazy, Product, View
from graphopt.errors import CompileError
from graphopt.operators.low_bit import MOST_LOOKED_UP

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

Write = Callable[..., Code]
_CONSTANTS = ("weight", "weight_scale", "weight_zero", "codebook", "bias", "tag")
_UNSIGNED = 128  # added to numbers of codebooks where instructions multiply bytes without a sign
_SMALL_BOOK, _BOOK = 16, 256  # entries that instructions look up
_CACHED = 32 << 20  # bytes of packed weights that stay in the caches of most machines from call to call
_FEW, _MANY = torch.ops.graphopt.lut_gemv.default, torch.ops.graphopt.wq_gemm.default
_PLANES, _NIBBLES = "planes", "nibbles"  # what keys of weights packed for look-ups begin with
_WORTH = 1.1  # times as many instructions as look-ups take: their order of a weight serves nothing else
_ASKED = "kernel={} asks for it"


def _build(lowering: Lowering, node: Node) -> tuple[View, ...]:
    given = arguments(node)
    x = lowering.contiguous(given["x"])
    return tuple(lowering.call(low_bit_build.build(x, given["group"], given["table"], lowering.target)))


def _product(lowering: Lowering, node: Node) -> View:
    return product_by(lowering, node)


def product_by(lowering: Lowering, node: Node, own: Write | None = None) -> View:
    """Lower a product of low-bit codes, by `own` where a target has a kernel of its own for exact sums.

    That gets layouts by lanes and vectors, operands by layout, the bare result and the end of its epilogue.
    """
    given, held = arguments(node), constants(lowering, node, _CONSTANTS)
    weight, bits, target = held["weight"], given["bits"], lowering.target
    tables = given["table"] == "int8"
    n, k = (int(size) for size in weight.shape)
    codes, scale, sums = (lowering.contiguous(given[name]) for name in ("codes", "scale", "sums"))
    book = held["codebook"]
    if book is not None and book.numel() > _BOOK:
        raise CompileError(
            f"{node.name} chooses between {book.shape[0]} codebooks of {2**bits} numbers, and kernels look up {_BOOK} "
            f"numbers; give at most {_BOOK >> bits}"
        )
    bias = None if held["bias"] is None else lowering.weight(held["bias"])
    if own is not None:
        return lowering.anchored(node, _by(own, lowering, node, (codes, scale, sums), held), _with_bias(bias))
    rows = product(scale.shape[:-1])
    means = _means(lowering, node, held, rows)
    kinds = {"masked": low_bit_gemv.masks(target, bits, book is not None), "tables": tables, "book": book is not None}
    planes = looks_up(target) and (tables or _is_packed(lowering, weight, _PLANES))

    def layout_of(looked_up: bool, vectors: int) -> Layout:
        if looked_up and not looks_up(target):
            return Nibbles(n, k, bits, given["group"], target.lanes, vectors)
        return Layout(n, k, bits, given["group"], target.lanes, vectors, planes)

    def packed(layout: Layout) -> tuple[int, ...]:
        begin, end = _key_parts(layout)
        keys = lowering.weights.packings(weight)
        return tuple(int(key[len(begin) : -len(end)]) for key in keys if key.startswith(begin) and key.endswith(end))

    padded = _padded(lowering, codes, layout_of(means.looking_up[0], 2), tables)
    cached = _packed_bytes(lowering) <= _CACHED

    def build(result: Product, end: Any) -> Code:
        def write(choice: Configuration) -> Code:
            layout = layout_of(choice.looks_up, choice.vectors)
            operands = _operands(lowering, layout, (padded, scale, sums), held, tables)
            return low_bit_gemv.gemv(operands, result, end, f"low_bit_{bits}_{n}x{k}", target, choice, means)

        return lowering.choose(low_bit_gemv.offer(target, rows, layout_of, end, kinds, means, cached, write, packed))

    return lowering.anchored(node, build, _with_bias(bias))


def _by(
    own: Write, lowering: Lowering, node: Node, activations: tuple[View, View, View], held: dict[str, Any]
) -> Callable[[Product, Any], Code]:
    given = arguments(node)
    if given["table"] == "int8":
        raise CompileError(f"{node.name} multiplies tables of int8, which {lowering.target.name} has no kernel for")
    n, k = (int(size) for size in held["weight"].shape)

    def layout_of(lanes: int, vectors: int) -> Layout:
        return Layout(n, k, given["bits"], given["group"], lanes, vectors)

    codes, scale, sums = activations
    padded = _padded(lowering, codes, layout_of(1, 2), False)

    def operands_of(layout: Layout) -> Operands:
        return _operands(lowering, layout, (padded, scale, sums), held, False)

    return lambda result, end: own(lowering, node, layout_of, operands_of, result, end)


def name_of(layout: Layout) -> str:
    return f"low_bit_{layout.bits}_{layout.n}x{layout.k}"


def is_looked_up(node: Node) -> bool:
    """Whether a node is a product that is asked to look sums up."""
    if node.target is not _FEW:
        return False
    given = arguments(node)
    return given["table"] == "int8" or given["kernel"] == "lut"


def _packed_bytes(lowering: Lowering) -> int:
    """Of the weights that the graph multiplies, which is what is read before the same ones are again."""
    sizes = {}
    for node in lowering.order:
        if node.target in (_FEW, _MANY):
            given = arguments(node)
            sizes[given["weight"]] = given["weight"].meta["val"].numel() * given["bits"] // 8
    return sum(sizes.values())


def _is_packed(lowering: Lowering, weight: Tensor, kind: str) -> bool:
    """Whether another product has packed the weight like this, so that one copy may serve both."""
    return any(key.startswith(kind) for key in lowering.weights.packings(weight))


def _means(lowering: Lowering, node: Node, held: Mapping[str, Any], rows: Size) -> Means:
    """What the product may be made of. Raises CompileError for a kernel that cannot be what is asked for."""
    given, target, name = arguments(node), lowering.target, node.name
    kernel, bits, tables = given["kernel"], given["bits"], given["table"] == "int8"
    exact = held["codebook"] is None and bits <= MOST_LOOKED_UP
    if kernel == "amx" and not target.amx:
        raise CompileError(f"{name} asks for kernel='amx', and {target.name} has no tiles; use 'auto'")
    tiled = None if kernel == "unpack" or not target.amx else 1 if kernel == "amx" else FEWEST_ROWS
    if tables or kernel == "lut":
        reason = "table=int8 has tables alone" if tables else _ASKED.format(kernel)
        if not tables and looks_up(target) and _over(rows, MOST_ROWS):
            reason = f"kernel=lut is for up to {MOST_ROWS} rows"
        return Means((True,), MOST_ROWS, tiled, reason)
    if kernel != "auto":
        return Means(tiled=tiled, reason=_ASKED.format(kernel))
    if not exact:
        reason = f"{bits} bits are over the {MOST_LOOKED_UP} whose exact sums are looked up"
        return Means(
            tiled=tiled, reason="numbers of codebooks have no tables" if held["codebook"] is not None else reason
        )
    if looks_up(target):
        reason = "looking up may gain only in the caches"
        if bits == 1:
            reason = "looking one bit up takes fewest instructions for one row"
        if _over(rows, 1):
            reason = "several rows share what is taken apart"
        return Means((True, False) if bits == 1 else (False, True), 1, tiled, reason)
    looked_up, apart = instructions(target, bits, rows)
    reason = f"{looked_up:.1f} instructions a vector of weights looked up, {apart:.1f} taken apart"
    few = isinstance(rows, int) and rows <= MOST_ROWS
    if few and _is_packed(lowering, held["weight"], _NIBBLES):
        looked_up, reason = 0.0, "another product has packed the weight for look-ups"
    return Means((True, False) if looked_up * _WORTH < apart else (False, True), tiled=tiled, reason=reason)


def _over(rows: Size, most: int) -> bool:
    return isinstance(rows, int) and rows > most


def _with_bias(bias: View | None) -> Callable[[Any], Any]:
    def begin(result: Any) -> Any:
        if bias is None:
            return result

        def element(kernel: Kernel, index: Index) -> Any:
            return kernel.load(result, index) + kernel.flat(bias.storage)[index.axis(len(result.shape) - 1)]

        return Lazy(result.shape, "float32", (result, bias), element, name="add")

    return begin


def _key_parts(layout: Layout) -> tuple[str, str]:
    """What the keys of packed weights have before and after the outputs of a panel; a longer group is the whole row."""
    kind = _NIBBLES if isinstance(layout, Nibbles) else _PLANES if layout.planes else "bits"
    return f"{kind}{layout.bits}x", f"x{min(layout.group, layout.k)}"


def _operands(
    lowering: Lowering, layout: Layout, activations: tuple[View, View, View], held: dict[str, Any], tables: bool
) -> Operands:
    begin, end = _key_parts(layout)
    key = f"{begin}{layout.outputs}{end}"
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
        tables,
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


def _padded(lowering: Lowering, codes: View, layout: Layout, tables: bool) -> View:
    """Rows in which each group fills its steps, with zeros, in the order of the layout's quads; the same of tables."""
    if layout.packed_k == layout.k and (tables or not layout.planes):
        return codes
    each = QUAD if tables else 1  # numbers that an element along the axis stands for
    axis, turned = len(codes.shape) - 1 - tables, layout.planes and not tables
    width, depth, size = int(codes.shape[axis]), layout.depth // each, -(-min(layout.group, layout.k) // each)

    def element(kernel: Kernel, index: Index) -> Any:
        at = index.axis(axis)
        if turned:
            number = tirx.truncmod(at, int64(TURNED))
            at = at - number + tirx.truncmod(number, int64(QUAD)) * QUAD + tirx.truncdiv(number, int64(QUAD))
        inside = tirx.truncmod(at, int64(depth))
        source = tirx.truncdiv(at, int64(depth)) * size + inside
        axes = [index.axis(number) for number in range(len(codes.shape))]
        axes[axis] = tirx.min(source, int64(width - 1))
        code = kernel.load(codes, Index(codes.shape, kernel.sizes, axes=tuple(axes)))
        return tirx.Select(tirx.all(inside < size, source < width), code, like(code, 0))

    shape = (*codes.shape[:axis], layout.groups * depth, *codes.shape[axis + 1 :])
    return lowering.store(Lazy(shape, "int8", (codes,), element, name="pad"))


TABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.graphopt.lut_build.default: _build,
    _FEW: _product,
    _MANY: _product,
}
