"""ONNX operators on known arrays: Python arithmetic on numbers and symbolic sizes, never a guard.

Whatever would force a symbolic size to a number gives None, and the operator runs on tensors instead.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.capture.onnx.carriers import CARRIERS
from graphopt.capture.onnx.narrow import NARROW
from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import shape_operator
from graphopt.capture.onnx.tensors import FLOAT8, dtype_of
from graphopt.capture.onnx.values import MOST_KNOWN, SYMBOLIC, Known, exact, known


class _Undecided(Exception):
    """Only a tensor can express this."""


def _decide(condition: Any) -> bool:
    """A comparison of sizes whose answer holds for all of them."""
    if not isinstance(condition, torch.SymBool):
        return bool(condition)
    if statically_known_true(condition):
        return True
    if statically_known_true(torch.sym_not(condition)):
        return False
    raise _Undecided


def _divide(left: Any, right: Any) -> Any:
    if isinstance(left, (float, torch.SymFloat)):
        if isinstance(right, float) and right == 0:
            raise _Undecided
        return left / right
    if isinstance(right, int) and right == 0:
        raise _Undecided
    if _decide(left * right >= 0):
        return left // right
    return -(abs(left) // abs(right))


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, SYMBOLIC) or isinstance(exponent, SYMBOLIC) or base < 0 or exponent < 0:
        raise _Undecided
    if isinstance(base, int) and base > 1 and exponent > 64:
        raise _Undecided
    return type(base)(base**exponent)


def _root(value: Any) -> Any:
    if not isinstance(value, SYMBOLIC) and value < 0:
        raise _Undecided
    return torch.sym_sqrt(value)


def _whole(function: Callable[[float], int], item: Any) -> float:
    if isinstance(item, SYMBOLIC) or not math.isfinite(item):
        raise _Undecided
    return float(function(item))


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, float) or (isinstance(right, int) and right == 0):
        raise _Undecided
    return left % right


def _elementwise(function: Callable[..., Any], dtype: torch.dtype | None = None) -> Callable[..., Known | None]:
    def run(op: Operation, *inputs: Known) -> Known | None:
        if op.attributes.integer("fmod"):  # the sign of the dividend: % has that of the divisor
            return None
        if op.name == "Pow" and inputs[0].dtype != inputs[1].dtype:
            return None
        if math.prod(np.broadcast_shapes(*(value.shape for value in inputs))) > MOST_KNOWN:
            return None
        arrays, types = np.broadcast_arrays(*(value.array for value in inputs)), [value.dtype for value in inputs]
        try:
            items = [function(*map(exact, row, types)) for row in zip(*(array.flat for array in arrays), strict=True)]
        except (_Undecided, OverflowError):
            return None
        return known(items, dtype or inputs[-1].dtype, arrays[0].shape)

    return run


_FUNCTIONS: dict[str, tuple[Callable[..., Any], torch.dtype | None]] = {
    "Add": (operator.add, None),
    "Sub": (operator.sub, None),
    "Mul": (operator.mul, None),
    "Div": (_divide, None),
    "Mod": (_modulo, None),
    "Max": (lambda *items: _fold(torch.sym_max, items), None),
    "Min": (lambda *items: _fold(torch.sym_min, items), None),
    "Neg": (operator.neg, None),
    "Abs": (lambda item: item if _decide(item >= 0) else -item, None),
    "Sqrt": (_root, None),
    "Pow": (_power, None),
    "Floor": (lambda item: _whole(math.floor, item), None),
    "Ceil": (lambda item: _whole(math.ceil, item), None),
    "Equal": (lambda left, right: _decide(left == right), torch.bool),
    "Less": (lambda left, right: _decide(left < right), torch.bool),
    "LessOrEqual": (lambda left, right: _decide(left <= right), torch.bool),
    "Greater": (lambda left, right: _decide(left > right), torch.bool),
    "GreaterOrEqual": (lambda left, right: _decide(left >= right), torch.bool),
    "And": (lambda left, right: left and right, torch.bool),
    "Or": (lambda left, right: left or right, torch.bool),
    "Not": (operator.not_, torch.bool),
    "Where": (lambda condition, left, right: left if condition else right, None),
    "Identity": (lambda item: item, None),
}


def _fold(function: Callable[[Any, Any], Any], items: tuple[Any, ...]) -> Any:
    result = items[0]
    for item in items[1:]:
        if any(isinstance(number, float) and math.isnan(number) for number in (result, item)):
            raise _Undecided
        result = function(result, item)
    return result


for _name, (_function, _dtype) in _FUNCTIONS.items():
    shape_operator(_name)(_elementwise(_function, _dtype))


@shape_operator("Cast")
def cast(op: Operation, value: Known) -> Known | None:
    code = op.attributes.integer("to")
    dtype = dtype_of(code, "the result of Cast")
    op.attributes.ignore("saturate", "round_mode")
    if (
        code in NARROW
        or dtype in CARRIERS
        or dtype in FLOAT8.values()
        or any(isinstance(item, (torch.SymFloat, torch.SymBool)) for item in value.items())
    ):
        return None
    if dtype.is_floating_point:
        convert: Callable[[Any], Any] = torch.sym_float
    elif dtype == torch.bool:
        convert = _nonzero
    elif value.dtype.is_floating_point and not all(math.isfinite(item) for item in value.items()):
        return None
    else:
        convert = _integer
    try:
        return known([convert(exact(item, value.dtype)) for item in value.items()], dtype, value.shape)
    except _Undecided:
        return None


def _nonzero(item: Any) -> bool:
    return _decide(item != 0)


def _integer(item: Any) -> Any:
    return item if isinstance(item, SYMBOLIC) else int(item)


@shape_operator("Concat")
def concat(op: Operation, *values: Known) -> Known | None:
    if sum(value.array.size for value in values) > MOST_KNOWN:
        return None
    axis = op.axis(op.attributes.integer("axis"), values[0].ndim)
    return Known(np.concatenate([value.array for value in values], axis), values[0].dtype)


@shape_operator("Gather")
def gather(op: Operation, value: Known, index: Known) -> Known | None:
    axis = op.axis(op.attributes.integer("axis"), value.ndim)
    if index.symbolic:
        return None
    taken = np.take(value.array, index.array.astype(np.int64), axis)
    return Known(taken, value.dtype) if isinstance(taken, np.ndarray) else known(taken, value.dtype)


@shape_operator("Slice")
def slice_(op: Operation, value: Known, *bounds: Known | None) -> Known | None:
    if op.opset < 10 or any(bound is not None and bound.symbolic for bound in bounds):
        return None
    starts, ends, axes, steps = (
        *(None if item is None else op.integers(item, "Slice") for item in bounds),
        None,
        None,
    )[:4]
    assert starts is not None and ends is not None
    index = [slice(None)] * value.ndim
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = op.axis(axes[place] if axes else place, value.ndim)
        step = steps[place] if steps else 1
        index[axis] = slice(start, None if step < 0 and end <= -value.shape[axis] - 1 else end, step)
    return Known(value.array[tuple(index)], value.dtype)


@shape_operator("Split")
def split(op: Operation, value: Known, sizes: Known | None = None) -> tuple[Known, ...] | None:
    axis, length = op.axis(op.attributes.integer("axis"), value.ndim), value.shape[op.attributes.integer("axis")]
    given = op.attributes.integers("split") if sizes is None else op.integers(sizes, "the sizes of Split")
    most = -(-length // op.attributes.integer("num_outputs", op.outputs))
    ends = np.cumsum(given) if given is not None else np.arange(most, length + most, most)
    if given is not None and sum(given) != length:
        raise op.refuse(f"it splits {length} elements into parts of {given}")
    return tuple(Known(part, value.dtype) for part in np.split(value.array, ends[:-1], axis))


@shape_operator("Squeeze")
def squeeze(op: Operation, value: Known, axes: Known | None = None) -> Known:
    chosen = op.axes(axes, value.ndim)
    if chosen is None:
        chosen = [axis for axis, size in enumerate(value.shape) if size == 1]
    return Known(value.array.reshape([s for axis, s in enumerate(value.shape) if axis not in chosen]), value.dtype)


@shape_operator("Unsqueeze")
def unsqueeze(op: Operation, value: Known, axes: Known | None = None) -> Known:
    given = op.attributes.integers("axes") if axes is None else op.integers(axes, "axes")
    return Known(np.expand_dims(value.array, tuple(given or ())), value.dtype)


@shape_operator("Reshape")
def reshape(op: Operation, value: Known, shape: Known) -> Known | None:
    zero = op.attributes.integer("allowzero")
    if shape.symbolic:
        return None
    sizes = op.integers(shape, "the new shape")
    return Known(
        value.array.reshape([s if s or zero else value.shape[axis] for axis, s in enumerate(sizes)]), value.dtype
    )


@shape_operator("Transpose")
def transpose(op: Operation, value: Known) -> Known:
    return Known(value.array.transpose(op.attributes.integers("perm")), value.dtype)


@shape_operator("Expand")
def expand(op: Operation, value: Known, shape: Known) -> Known | None:
    if shape.symbolic or math.prod(op.integers(shape, "the new shape")) > 64:
        return None
    sizes = np.broadcast_shapes(value.shape, tuple(op.integers(shape, "the new shape")))
    return Known(np.broadcast_to(value.array, sizes), value.dtype)


@shape_operator("ReduceProd")
def product(op: Operation, value: Known, axes: Known | None = None) -> Known | None:
    keep = op.attributes.integer("keepdims", 1)
    nothing = bool(op.attributes.integer("noop_with_empty_axes"))
    if value.ndim != 1:
        return None
    chosen = op.axes(axes, 1)
    if not chosen and nothing:
        return value
    if chosen not in (None, [0]):
        return None
    return known([math.prod(value.items())], value.dtype, (1,) if keep else ())
