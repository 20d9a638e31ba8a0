"""How graphopt::gated_convolution and graphopt::gated_linear are written in ONNX: the plain product between masks.

Standard operators compute everything and put zeros where nothing takes part: the numbers are the same, the time is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18 as op


def _convolution(
    x: Any, weight: Any, bias: Any = None, active_inputs: Any = None, active_outputs: Any = None,
    stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1),
    groups: int = 1, block: int = 16,
) -> Any:  # fmt: skip
    given = _masked(x, active_inputs, block, 1)
    options = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
    operands = (given, weight) if bias is None else (given, weight, bias)
    return _masked(op.Conv(*operands, **options), active_outputs, block, 1, int(weight.shape[0]), 4)


def _linear(
    x: Any, weight: Any, bias: Any = None, active_inputs: Any = None, active_outputs: Any = None, block: int = 16
) -> Any:
    rank = len(x.shape)
    result = op.MatMul(_masked(x, active_inputs, block, rank - 1), op.Transpose(weight, perm=[1, 0]))
    result = result if bias is None else op.Add(result, bias)
    return _masked(result, active_outputs, block, rank - 1, int(weight.shape[0]), rank)


def _masked(
    value: Any, active: Any, block: int, axis: int, channels: int | None = None, rank: int | None = None
) -> Any:
    """`value` with zeros in the channels along `axis` whose block is not active."""
    if active is None:
        return value
    count = int(value.shape[axis]) if channels is None else channels
    rank = len(value.shape) if rank is None else rank
    blocks = op.Constant(value_ints=[channel // block for channel in range(count)])
    shape = op.Constant(value_ints=[0, *(count if number == axis else 1 for number in range(1, rank))])
    mask = op.Reshape(op.Gather(active, blocks, axis=1), shape)
    return op.Where(mask, value, op.CastLike(op.Constant(value_float=0.0), value))


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.graphopt.gated_convolution.default: _convolution,
    torch.ops.graphopt.gated_linear.default: _linear,
}
