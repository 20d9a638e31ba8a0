"""Shapes and layout: what moves values without changing them."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import SYMBOLIC, Present, Tensor, Value, known

aten = torch.ops.aten

_END = 2**31 - 1  # exporters write this or more for "to the end"


@operator("Reshape")
def reshape(op: Operation, value: Present, shape: Present) -> Tensor:
    zero = op.attributes.integer("allowzero")
    value = op.tensor(value)
    sizes = op.sizes(shape, "the new shape")
    for axis, size in enumerate(sizes):
        if isinstance(size, int) and size == 0 and not zero:
            if axis >= value.ndim:
                raise op.refuse(f"the new shape {sizes} copies axis {axis}, which its input does not have")
            sizes[axis] = value.shape[axis]
    return op.reshape(value, sizes)


@operator("Flatten")
def flatten(op: Operation, value: Present) -> Tensor:
    axis = op.attributes.integer("axis", 1)
    axis += value.ndim if axis < 0 else 0
    return op.reshape(value, [math.prod(value.shape[:axis]), math.prod(value.shape[axis:])])


@operator("Transpose")
def transpose(op: Operation, value: Present) -> Tensor:
    order = op.attributes.integers("perm") or list(reversed(range(value.ndim)))
    moved = [axis for axis, source in enumerate(order) if axis != source]
    if len(moved) == 2 and value.ndim > 2:
        return op.call(aten.transpose.int, value, *moved)
    return op.call(aten.permute.default, value, order)


@operator("Squeeze")
def squeeze(op: Operation, value: Present, axes: Value = None) -> Tensor:
    chosen = op.axes(axes, value.ndim)
    if chosen is None:
        if any(isinstance(size, SYMBOLIC) for size in value.shape):
            raise op.refuse("Squeeze without axes over a dynamic size has no fixed number of axes; give it axes")
        chosen = [axis for axis, size in enumerate(value.shape) if size == 1]
    return op.call(aten.squeeze.dims, value, chosen)


@operator("Unsqueeze")
def unsqueeze(op: Operation, value: Present, axes: Value = None) -> Tensor:
    given = op.attributes.integers("axes") if axes is None else op.integers(axes, "axes")
    result = op.tensor(value)
    rank = result.ndim + len(given or ())
    for axis in sorted(op.axis(item, rank) for item in given or ()):
        result = op.call(aten.unsqueeze.default, result, axis)
    return result


@operator("Concat")
def concat(op: Operation, *values: Present) -> Tensor:
    return op.call(aten.cat.default, list(values), op.attributes.integer("axis"))


@operator("Split")
def split(op: Operation, value: Present, sizes: Value = None) -> Any:
    axis = op.axis(op.attributes.integer("axis"), value.ndim)
    given = op.attributes.integers("split") if sizes is None else op.sizes(sizes, "the sizes of Split")
    parts = op.attributes.integer("num_outputs", op.outputs)
    length = value.shape[axis]
    if given is None and isinstance(length, int) and not -(-length // parts) * (parts - 1) < length:
        most = -(-length // parts)
        given = [max(min(most, length - most * place), 0) for place in range(parts)]
    if given is None:
        if not isinstance(length, int) and not statically_known_true(length % parts == 0):
            raise op.refuse("a dynamic size is split into equal parts; give the sizes of the parts")
        return op.parts(aten.split.Tensor, op.tensor(value), -(-length // parts), axis)
    if given and given[0] and all(isinstance(size, int) and size == given[0] for size in given):
        return op.parts(aten.split.Tensor, op.tensor(value), given[0], axis)
    return op.parts(aten.split_with_sizes.default, op.tensor(value), given, axis)


@operator("Slice")
def slice_(
    op: Operation, value: Present, starts: Value = None, ends: Value = None, axes: Value = None, steps: Value = None
) -> Tensor:
    """Before opset 10 the bounds are attributes."""
    if op.opset < 10:
        named = (op.attributes.integers(name) for name in ("starts", "ends", "axes"))
        starts, ends, axes = (None if items is None else known(items) for items in named)
    first, last = op.sizes(starts, "the start of a Slice"), op.sizes(ends, "the end of a Slice")
    chosen = list(range(len(first))) if axes is None else op.integers(axes, "axes")
    by = [1] * len(first) if steps is None else op.integers(steps, "the step of a Slice")
    result = op.tensor(value)
    for start, end, axis, step in zip(first, last, chosen, by, strict=True):
        result = _slice_axis(op, result, op.axis(axis, result.ndim), start, end, step)
    return result


def _slice_axis(op: Operation, value: Tensor, axis: int, start: Any, end: Any, step: int) -> Tensor:
    open_end = isinstance(end, int) and end >= _END
    if step > 0:
        if isinstance(start, int) and start == 0 and step == 1 and open_end:
            return value
        last = sys.maxsize if open_end else end
        return op.call(aten.slice.Tensor, value, axis, start, last, *([] if step == 1 else [step]))
    whole = isinstance(start, int) and (start == -1 or start >= _END) and isinstance(end, int) and end < -(2**30)
    if step == -1 and whole:
        return op.call(aten.flip.default, value, [axis])
    size = value.shape[axis]
    if not all(isinstance(item, int) for item in (size, start, end)):
        raise op.refuse("a Slice with a negative step over a dynamic size is only imported as a whole reversal")
    rows = list(range(size))[slice(start, None if end < -size else end, step)]
    return op.call(aten.index_select.default, value, axis, known(rows))


@operator("Expand")
def expand(op: Operation, value: Present, shape: Present) -> Tensor:
    """Both sides broadcast; an axis that is not certainly 1 keeps its size, which the other must be or be 1."""
    value = op.tensor(value)
    sizes = op.sizes(shape, "the shape of Expand")
    rank = max(len(sizes), value.ndim)
    wanted = [1] * (rank - len(sizes)) + sizes
    own = [1] * (rank - value.ndim) + list(value.shape)
    for a, b in zip(own, wanted, strict=True):
        if isinstance(a, SYMBOLIC) and isinstance(b, int) and b > 1 and a != b:
            raise op.refuse(f"a dynamic size is expanded to {b}")
    result = [b if statically_known_true(a == 1) else a for a, b in zip(own, wanted, strict=True)]
    if rank == value.ndim and all(statically_known_true(a == b) for a, b in zip(own, result, strict=True)):
        return value
    return op.call(aten.expand.default, value, result)


@operator("Tile")
def tile(op: Operation, value: Present, repeats: Present) -> Tensor:
    return op.call(aten.repeat.default, value, op.sizes(repeats, "the repeats of Tile"))


@operator("Pad")
def pad(op: Operation, value: Present, pads: Value = None, fill: Value = None, axes: Value = None) -> Tensor:
    """Before opset 11 amounts and value are attributes."""
    if op.opset < 11:
        pads, fill = known(op.attributes.integers("pads") or []), known(op.attributes.number("value", 0.0), value.dtype)
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    mode = op.attributes.text("mode", "constant")
    if mode not in modes:
        raise op.refuse(f"mode {mode!r} of Pad is not imported")
    value = op.tensor(value)
    amounts = op.sizes(pads, "the amounts of Pad")
    chosen = list(range(value.ndim)) if axes is None else op.axes(axes, value.ndim) or []
    count = len(chosen)
    before, after = (dict(zip(chosen, amounts[at : at + count], strict=True)) for at in (0, count))
    padded = [a for a in chosen if not (statically_known_true(before[a] == 0) and statically_known_true(after[a] == 0))]
    if not padded:
        return value
    flat = [item for a in range(value.ndim - 1, min(padded) - 1, -1) for item in (before.get(a, 0), after.get(a, 0))]
    if mode != "constant":
        return op.call(aten.pad.default, value, flat, modes[mode])
    refusal = "the value of Pad is computed at run time; make it a constant"
    number = 0.0 if fill is None else op.number(fill, "the value of Pad", refusal)
    if number is None:
        raise op.refuse(refusal)
    if isinstance(number, int) and int(float(number)) != number:
        return op.call(aten.constant_pad_nd.default, value, flat, number)
    return op.call(aten.pad.default, value, flat, "constant", float(number))


@operator("DepthToSpace")
def depth_to_space(op: Operation, value: Present) -> Tensor:
    block, mode = op.attributes.integer("blocksize"), _block_mode(op)
    if mode == "CRD":
        return op.call(aten.pixel_shuffle.default, value, block)
    batch, channels, height, width = value.shape
    split = op.reshape(value, [batch, block, block, channels // block**2, height, width])
    moved = op.call(aten.permute.default, split, [0, 3, 4, 1, 5, 2])
    return op.reshape(moved, [batch, channels // block**2, height * block, width * block])


@operator("SpaceToDepth")
def space_to_depth(op: Operation, value: Present) -> Tensor:
    block, mode = op.attributes.integer("blocksize"), _block_mode(op)
    batch, channels, height, width = value.shape
    split = op.reshape(value, [batch, channels, height // block, block, width // block, block])
    moved = op.call(aten.permute.default, split, [0, 1, 3, 5, 2, 4] if mode == "CRD" else [0, 3, 5, 1, 2, 4])
    return op.reshape(moved, [batch, channels * block**2, height // block, width // block])


def _block_mode(op: Operation) -> str:
    """Whether channels are those of a block's column and row, or a block's those of a channel."""
    mode = op.attributes.text("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        raise op.refuse(f"mode {mode!r} of {op.name} is neither DCR nor CRD")
    return mode


@operator("Trilu")
def trilu(op: Operation, value: Present, diagonal: Value = None) -> Tensor:
    target = aten.triu.default if op.attributes.integer("upper", 1) else aten.tril.default
    return op.call(target, value, 0 if diagonal is None else op.integers(diagonal, "the diagonal of Trilu")[0])
