"""Transposed convolutions of codes as convolutions with one output for each place between two codes, then shuffled.

Before: conv_transpose2d(dequantize(x), dequantize(w), b, stride=s)
After:  pixel_shuffle(qconv(x, filters, b), s), less the rows and columns behind the result

Output s i + r along an axis reads x[i + (r + padding - dilation k) / s] by tap k, where that is whole: each r has a
filter of its own, padded with zeros to what all of them reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Builder, GraphEditor
from graphopt.matcher import argument
from graphopt.passes.qdq_fusion.codes import Constants, codes_of
from graphopt.passes.qdq_fusion.products import (
    Refused,
    Weight,
    bias_and_steps,
    fitting,
    result_options,
    tail_of,
    whole_codes,
)

aten = torch.ops.aten
TRANSPOSED = frozenset({aten.conv_transpose2d.input})


@dataclass(frozen=True)
class _Axis:
    """How outputs along one axis come about: (phase, tap, place in the filter), and zeros before and behind x."""

    taps: tuple[tuple[int, int, int], ...]
    length: int
    before: int
    behind: int
    cropped: int

    @staticmethod
    def of(stride: int, padding: int, dilation: int, count: int, more: int) -> _Axis:
        reads = [
            (phase, tap, (phase + padding - dilation * tap) // stride)
            for phase in range(stride)
            for tap in range(count)
            if (phase + padding - dilation * tap) % stride == 0
        ]
        longer = dilation * (count - 1) + more + 1 - 2 * padding - stride  # of the result than stride times x
        steps = -(-longer // stride)
        low = min(0, *(place for *_, place in reads))
        high = max(0, -steps, *(place for *_, place in reads))
        taps = tuple((phase, tap, place - low) for phase, tap, place in reads)
        return _Axis(taps, high - low + 1, -low, steps + high, stride * steps - longer)


def fuse_transposed(editor: GraphEditor, node: Node, rule: str, constants: Constants) -> bool:
    """Rewrite a transposed convolution with what follows it; False for any other node. Raises Refused with a reason."""
    if node.target not in TRANSPOSED:
        return False
    if (x := codes_of(editor, argument(node, "input"))) is None:
        raise Refused("its input is not dequantized from 8-bit codes with one constant scale")
    if node.meta["val"].dim() != 4:
        raise Refused("its images have no batch axis")
    names = ("stride", "padding", "dilation", "output_padding")
    strides, *others = ([int(n) for n in argument(node, name)] for name in names)
    strides, *others = (given * 2 if len(given) == 1 else given for given in (strides, *others))
    if strides[0] != strides[1]:
        raise Refused("its strides along both axes differ")
    stride, groups = strides[0], int(argument(node, "groups"))
    weight = _weight(editor, node, groups)
    counts = [int(count) for count in weight.codes.shape[2:]]
    rows, columns = (
        _Axis.of(stride, padding, dilation, count, more)
        for padding, dilation, more, count in zip(*others, counts, strict=True)
    )
    bias, steps = bias_and_steps(editor, node, x, weight)
    tail = tail_of(editor, node, residuals=False)
    filters, scale = _phases(weight.codes, rows, columns, stride), _each(weight.scale, stride)
    added = None if bias is None else _each(bias if steps is None else steps, stride)
    padding = [rows.before, columns.before, rows.behind, columns.behind]
    options = {"stride": [1, 1], "padding": padding, "dilation": [1, 1], "groups": groups, **result_options(tail)}

    def build(builder: Builder) -> list[Node]:
        given: list[Any] = [*constants.of(builder, x), builder.constant(filters), builder.constant(scale)]
        given.append(None if added is None else builder.constant(added))
        given += (None, None) if tail.into is None else constants.parameters(builder, tail.into)
        found = builder.call(torch.ops.graphopt.qconv.default, *given, None, None, None, **options)
        found = builder.call(aten.pixel_shuffle.default, found, stride) if stride > 1 else found
        for axis, each in ((2, rows), (3, columns)):
            if each.cropped:
                found = builder.call(aten.slice.Tensor, found, axis, 0, -each.cropped)
        return [found]

    every = (node, *tail.nodes)
    return editor.replace(rule, [every[-1]], build, inner=every[:-1])


def _weight(editor: GraphEditor, node: Node, groups: int) -> Weight:
    """Codes [O, C / groups, KH, KW] of what is stored as [C, O / groups, KH, KW]."""
    whole, scale = whole_codes(editor, argument(node, "weight"), 1)
    inputs, outputs, *taps = whole.shape
    whole = whole.reshape(groups, inputs // groups, outputs, *taps).transpose(1, 2).flatten(0, 1).contiguous()
    return fitting(whole, scale.repeat(groups) if scale.ndim else scale)


def _phases(codes: Tensor, rows: _Axis, columns: _Axis, stride: int) -> Tensor:
    """[O, C, KH, KW] as [O * stride * stride, C, ...], phases of an output beside each other."""
    outputs, inputs, *_ = codes.shape
    found = codes.new_zeros(outputs, stride, stride, inputs, rows.length, columns.length)
    for row, tap, place in rows.taps:
        for column, other, at in columns.taps:
            found[:, row, column, :, place, at] = codes[:, :, tap, other]
    return found.flatten(0, 2).contiguous()


def _each(values: Tensor, stride: int) -> Tensor:
    """A number for each output, for each phase of it."""
    return values.repeat_interleave(stride * stride) if values.ndim else values
