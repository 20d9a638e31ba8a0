"""Fourier transforms and mel filters; a transform of a known length is a product with a matrix of waves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.tensors import dtype_of
from graphopt.capture.onnx.values import Present, Tensor, Value

aten = torch.ops.aten

_LONGEST = 2048  # of a transform: its matrices have the square of it


@operator("DFT")
def transform(op: Operation, value: Present, length: Value = None, axis: Value = None) -> Tensor:
    """value [..., 1] of real or [..., 2] of complex numbers. Before opset 20 the axis is an attribute."""
    value = op.tensor(value)
    if op.opset < 20:
        place = op.attributes.integer("axis", 1)
    else:
        place = -2 if axis is None else op.integers(axis, "the axis of DFT")[0]
    place = op.axis(place, value.ndim)
    if place == value.ndim - 1:
        raise op.refuse("DFT along the last axis, which holds real and imaginary parts, does not exist")
    inverse, half = bool(op.attributes.integer("inverse")), bool(op.attributes.integer("onesided"))
    count: Any = value.shape[place]
    if length is not None:
        count = op.sizes(length, "the length of DFT")[0]
    elif inverse and half:
        count = 2 * (count - 1)
    parts = [_last(op, op.call(aten.select.int, value, -1, part), place) for part in range(int(value.shape[-1]))]
    results = _transformed(op, parts, count, inverse, half)
    turned = [op.call(aten.transpose.int, part, place, part.ndim - 1) for part in results]
    return op.call(aten.stack.default, turned, -1)


def _last(op: Operation, value: Tensor, axis: int) -> Tensor:
    return op.call(aten.transpose.int, value, axis, value.ndim - 1)


def _transformed(op: Operation, parts: list[Tensor], count: Any, inverse: bool, half: bool) -> list[Tensor]:
    """Real and imaginary parts [..., N] transformed along the last axis; only real ones from half a spectrum."""
    given = parts[0].shape[-1]
    if not isinstance(count, int) or not isinstance(given, int):
        raise op.refuse(f"{op.name} over a dynamic size is not imported; give that axis a number")
    if not 0 < count <= _LONGEST:
        raise op.refuse(f"{op.name} of {count} elements is not imported, only of 1 to {_LONGEST}")
    bins = count // 2 + 1
    read = min(given, bins if inverse and half else count)
    made = bins if half and not inverse else count
    angles = 2 * math.pi / count * (np.outer(np.arange(read), np.arange(made)) % count)
    shares = np.full((read, 1), 1.0 / count if inverse else 1.0)
    if inverse and half:  # a bin stands for its mirror image too
        shares[1 : (count + 1) // 2] *= 2
    dtype = parts[0].dtype
    cos, sin = (_held(op, wave(angles) * shares) for wave in (np.cos, np.sin))
    sides = [op.call(aten.slice.Tensor, op.cast(part, torch.float64), part.ndim - 1, 0, read) for part in parts]
    across = [op.call(aten.matmul.default, side, sin) for side in sides]
    along = [op.call(aten.matmul.default, side, cos) for side in sides]
    # (r + i j) (cos -+ sin j)
    minus, plus = aten.sub.Tensor, aten.add.Tensor
    real, imaginary = along[0], across[0] if inverse else op.call(aten.neg.default, across[0])
    if len(parts) == 2:
        real = op.call(minus if inverse else plus, real, across[1])
        imaginary = op.call(plus, imaginary, along[1])
    results = [real] if inverse and half else [real, imaginary]
    return [op.cast(part, dtype) for part in results]


def _held(op: Operation, matrix: Any) -> Tensor:
    """In double precision: a float32 sum of so many waves of opposite sign is not as exact as a fast transform."""
    return op.emitter.attribute(op.emitter.weights.add("waves", torch.from_numpy(matrix), trainable=False))


@operator("STFT")
def short_time_transform(
    op: Operation, signal: Present, step: Present, window: Value = None, length: Value = None
) -> Tensor:
    """signal [B, L, 1 or 2] -> [B, frames, bins, 2]."""
    signal = op.tensor(signal)
    if length is not None:
        size: Any = op.sizes(length, "the frame_length of STFT")[0]
    else:
        size = signal.shape[1] if window is None else window.shape[0]
    hop, half = op.sizes(step, "the frame_step of STFT")[0], bool(op.attributes.integer("onesided", 1))
    frames = []
    for part in range(int(signal.shape[-1])):
        frame = op.call(aten.unfold.default, op.call(aten.select.int, signal, -1, part), 1, size, hop)
        frames.append(frame if window is None else op.call(aten.mul.Tensor, frame, window))
    return op.call(aten.stack.default, _transformed(op, frames, size, False, half), -1)


@operator("MelWeightMatrix")
def mel_weights(
    op: Operation, bands: Present, length: Present, rate: Present, lowest: Present, highest: Present
) -> Tensor:
    """[length / 2 + 1, bands]: triangles of height 1, equally wide on the mel scale."""
    code = op.attributes.integer("output_datatype", 1)
    dtype = dtype_of(code, "the result of MelWeightMatrix")
    count, size, samples = (op.integers(item, "MelWeightMatrix")[0] for item in (bands, length, rate))
    low, high = (float(op.sizes(item, "MelWeightMatrix")[0]) for item in (lowest, highest))
    start, end = (2595 * math.log10(1 + edge / 700) for edge in (low, high))
    mels = np.arange(count + 2) * ((end - start) / (count + 2)) + start
    edges = ((size + 1) * (700 * (10 ** (mels / 2595) - 1)) // samples).astype(int)
    matrix = np.zeros((size // 2 + 1, count))
    for band, (left, middle, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        rows = np.arange(left, middle + 1)
        matrix[rows, band] = (rows - left) / (middle - left) if middle > left else 1.0
        rows = np.arange(middle, right)
        matrix[rows, band] = (right - rows) / max(right - middle, 1)
    return op.emitter.attribute(op.emitter.weights.add("mel", torch.from_numpy(matrix).to(dtype), trainable=False))
