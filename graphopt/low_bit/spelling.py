"""Low-bit weights in a graph: as calls that make numbers of codes, which any operator may read.

dequantize(codes, scale, zero, axis, block)          codes that are their own values
dequantize_lookup(codes, table, scale, axis, block)  codes of a codebook; of several, tag * 2^bits + code
index_select(..., inverse of the permutation)        where columns have an order of their own
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

import graphopt.operators  # noqa: F401  registers graphopt::
from graphopt.edit import Builder
from graphopt.errors import UsageError
from graphopt.low_bit.weight import MOST_BITS, LowBitWeight
from graphopt.matcher import argument

aten = torch.ops.aten
DEQUANTIZE = torch.ops.graphopt.dequantize.default
LOOKUP = torch.ops.graphopt.dequantize_lookup.default
TURNS = frozenset({aten.t.default, aten.transpose.int, aten.permute.default})
_LARGEST = 127  # of the whole numbers that a table of floats becomes
_CHOSEN = (3, 4)  # bits of codes that have one of several tables a group

Constant = Callable[[Any], Tensor | None]
"""The tensor that a node always gives, or None."""


class Unread(Exception):
    """Why a weight is not read as codes."""


def spell(builder: Builder, weight: LowBitWeight) -> Node:
    """A node that gives `weight.dequantize()`. Raises UsageError for a codebook with a zero, which has no spelling."""
    where = {"axis": 1, "block": weight.group}
    scale = builder.constant(weight.scale)
    if weight.codebook is None:
        zero = None if weight.zero is None else builder.constant(_whole(weight.zero))
        high = (1 << weight.bits) - 1
        parts = (builder.constant(weight.codes), scale, zero)
        node = builder.call(DEQUANTIZE, *parts, **where, qmin=0, qmax=high, dtype=torch.float32)
    else:
        if weight.zero is not None:
            raise UsageError("a weight with a codebook and a zero has no spelling; take the zero off the codebook")
        codes = weight.codes
        if weight.tag is not None:
            codes = codes + weight.spread(weight.tag) * (1 << weight.bits)
        table = builder.constant(weight.codebook.flatten().float())
        node = builder.call(LOOKUP, builder.constant(codes), table, scale, **where)
    if weight.permutation is None:
        return node
    return builder.call(aten.index_select.default, node, 1, builder.constant(weight.permutation.argsort()))


def _whole(zero: Tensor) -> Tensor:
    """Codes of a byte where it is one, as ONNX wants them."""
    as_bytes = zero.clamp(0, 255).to(torch.uint8)
    return as_bytes if torch.equal(as_bytes.float(), zero) else zero


def is_spelled(node: Any) -> bool:
    """Whether a node, maybe turned or reordered, gives numbers of codes."""
    if not isinstance(node, Node):
        return False
    if node.target in TURNS or node.target is aten.index_select.default:
        return is_spelled(node.args[0])
    return node.target in (DEQUANTIZE, LOOKUP)


def read(node: Node, constant: Constant, inputs: int = 1) -> LowBitWeight:
    """The weight [N, K] that `node` gives, whose axis `inputs` is K. Raises Unread with a clause that says why not.

    Tables of floats are rounded to 127ths of their largest magnitude; whole numbers stay as they are.
    """
    if node.target in TURNS:
        _check_turn(node)
        return read(node.args[0], constant, 1 - inputs)  # type: ignore[arg-type]
    if node.target is aten.index_select.default:
        return _reordered(node, constant, inputs)
    codes = constant(node.args[0])
    scale = constant(argument(node, "scale"))
    if codes is None or scale is None:
        raise Unread("the codes of its weight are computed")
    if codes.dim() != 2 or codes.is_floating_point():
        raise Unread(f"the codes of its weight are {codes.dtype} with {codes.dim()} axes")
    if node.meta["val"].dtype != torch.float32:
        raise Unread(f"its weight is {node.meta['val'].dtype}, not float32")
    layout = _Layout(tuple(codes.shape), inputs, argument(node, "axis"), argument(node, "block"))
    if node.target is LOOKUP:
        return _from_table(node, constant, layout, codes, scale)
    zero_node = argument(node, "zero_point")
    zero = constant(zero_node)
    if zero_node is not None and zero is None:
        raise Unread("the zero point of its weight is computed")
    offset, bits = _narrowest(codes)
    whole = layout.groups(torch.zeros(()) if zero is None else zero) + offset
    unsigned = (codes.to(torch.int32) + offset).to(torch.uint8)
    return LowBitWeight(
        layout.codes(unsigned), layout.groups(scale), bits, layout.group, whole if bool(whole.any()) else None
    )


class _Layout:
    """Where scales lie: of the whole, of each output, or of runs of inputs."""

    def __init__(self, shape: tuple[int, ...], inputs: int, axis: int | None, block: int) -> None:
        self.turned = inputs == 0
        self.rows, self.columns = shape[1 - inputs], shape[inputs]
        self.group = self.columns
        if axis is not None and axis == inputs:
            self.group = min(block or 1, self.columns)
        elif block:
            raise Unread("the blocks of its weight run along the outputs")
        self.count = -(-self.columns // self.group)
        if self.count > 1 and self.group < 16:
            raise Unread(f"its weight has groups of {self.group}, where at least 16 share a scale")

    def codes(self, value: Tensor) -> Tensor:
        return (value.t() if self.turned else value).contiguous()

    def groups(self, parameter: Tensor) -> Tensor:
        """[N, G] in float32 of a scale or zero."""
        value = parameter.detach().float()
        if value.dim() == 2:
            return self.codes(value)
        return value.reshape(-1, 1).expand(self.rows, self.count).contiguous()


def _narrowest(codes: Tensor) -> tuple[int, int]:
    """What makes codes unsigned, and the bits that hold them then."""
    low, high = (int(part) for part in codes.aminmax())
    if low >= 0:
        return 0, _within(max(high.bit_length(), 1))
    bits = max((-low - 1).bit_length(), high.bit_length()) + 1
    return 1 << (_within(bits) - 1), bits


def _within(bits: int) -> int:
    if bits > MOST_BITS:
        raise Unread(f"the codes of its weight take {bits} bits, over {MOST_BITS}")
    return bits


def _from_table(node: Node, constant: Constant, layout: _Layout, codes: Tensor, scale: Tensor) -> LowBitWeight:
    table = constant(argument(node, "table"))
    if table is None:
        raise Unread("the table of its weight is computed")
    numbers = table.detach().float()
    for bits in _CHOSEN:
        tag = _common(codes >> bits, layout)
        if len(numbers) > 16 and len(numbers) % (1 << bits) == 0 and tag is not None:
            step, books = _as_integers(numbers.reshape(-1, 1 << bits))
            own = layout.codes(codes & ((1 << bits) - 1))
            return LowBitWeight(own, layout.groups(scale) * step, bits, layout.group, codebook=books, tag=tag)
    bits = _within(max(int(codes.max()).bit_length(), 1))
    used = numbers[: 1 << bits]
    step, book = _as_integers(torch.nn.functional.pad(used, (0, (1 << bits) - len(used))))
    return LowBitWeight(layout.codes(codes), layout.groups(scale) * step, bits, layout.group, codebook=book)


def _common(tag: Tensor, layout: _Layout) -> Tensor | None:
    """What all columns of each group have, uint8 [N, G], or None."""
    own = layout.codes(tag)
    first = own[:, :: layout.group].contiguous()
    spread = first.repeat_interleave(layout.group, 1)[:, : layout.columns]
    return first if torch.equal(spread, own) else None


def _as_integers(table: Tensor) -> tuple[float, Tensor]:
    """A step, and the table in steps as int8: as it is where it holds such numbers already."""
    largest = float(table.abs().max())
    exact = torch.equal(table.round(), table) and largest <= _LARGEST
    step = 1.0 if exact or not largest else largest / _LARGEST
    whole = (table / step).round()
    if len(whole.unique()) < len(table.unique()):
        raise Unread(f"the {len(table.unique())} numbers of its table are too close for whole numbers up to {_LARGEST}")
    return step, whole.to(torch.int8)


def _reordered(node: Node, constant: Constant, inputs: int) -> LowBitWeight:
    source, axis, index = (argument(node, name) for name in ("self", "dim", "index"))
    order = constant(index)
    if axis % 2 != inputs or order is None:
        raise Unread("its weight is gathered along its outputs, or by indices that are computed")
    inner = read(source, constant, inputs)
    if inner.permutation is not None or not torch.equal(order.sort().values, torch.arange(inner.columns)):
        raise Unread("its weight is gathered by indices that are no order of its columns")
    permutation = order.argsort()  # column j of the codes is column permutation[j] of what is gathered
    return LowBitWeight(
        inner.codes, inner.scale, inner.bits, inner.group, inner.zero, inner.codebook, inner.tag, permutation
    )


def _check_turn(node: Node) -> None:
    """A transposition of two axes, whatever it is called."""
    axes = [0, 1]
    if node.target is aten.transpose.int:
        axes = sorted(int(argument(node, name)) % 2 for name in ("dim0", "dim1"))
    elif node.target is aten.permute.default:
        axes = [1 - int(axis) % 2 for axis in argument(node, "dims")]
    if axes != [0, 1]:
        raise Unread("its weight is moved about in a way that is no transposition")
