"""Weights that no int8 holds: 8-bit codes less a zero point, as int8 and a number for each output that is missing.

With weight = codes + shift[output] the sums of (x - zero) * weight are those of (x - zero) * codes and shift[output]
times the sum of x - zero alone, which is the same for all outputs of a row, or of a window in a group of channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.backends.operators.element_wise import like
from graphopt.backends.operators.reduction import reduce
from graphopt.backends.operators.windows import quotient
from graphopt.backends.rules import pooling
from graphopt.backends.rules.windows import Window
from graphopt.backends.sizes import Shape
from graphopt.backends.values import Index, Lazy, Product, Value, View, permuted

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering


@dataclass(frozen=True, eq=False)
class Shifted:
    """A weight [N, ...] as int8 codes, and int32 [N] that is missing in them, None where nothing is."""

    codes: Tensor
    shift: Tensor | None

    @staticmethod
    def of(weight: Tensor) -> Shifted:
        if weight.dtype == torch.int8:
            return Shifted(weight, None)
        whole = weight.to(torch.int32)
        low, high = whole.flatten(1).aminmax(dim=1)
        shift = torch.minimum(torch.maximum(torch.zeros_like(low), high - 127), low + 128)
        codes = whole - shift.reshape([-1, *(1 for _ in weight.shape[1:])])
        return Shifted(codes.to(torch.int8), shift if bool(shift.any()) else None)


@dataclass(frozen=True, eq=False)
class Missing:
    """What is added to int32 sums: shift[output] * sums[at], where `sums` has one element for `outputs_each` outputs.

    `axis` is that of the outputs.
    """

    shift: View
    sums: View
    axis: int
    outputs_each: int

    def at(self, kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(len(self.sums.shape))]
        output = axes[self.axis]
        axes[self.axis] = quotient(output, self.outputs_each)
        total = kernel.load(self.sums, Index(self.sums.shape, kernel.sizes, axes=tuple(axes)))
        return total * kernel.flat(self.shift.storage)[output]


def missing_of_rows(lowering: Lowering, shift: Tensor, value: Value, zero: int) -> Missing:
    """Of products with rows of `value` [..., K]."""
    last = len(value.shape) - 1
    sums = reduce(lowering, _centered(value, zero), [last], "int32", "sum")
    return Missing(lowering.weight(shift), sums, last, int(shift.numel()))


def missing_of_windows(
    lowering: Lowering, shift: Tensor, x: View, zero: int, channels: int, groups: int, window: Window, outputs: Shape
) -> Missing:
    """Of convolutions [N, O, OH, OW] of x [N, H, W, C] with `channels` first ones that count; padding stands for 0."""
    batch, height, width, _ = x.shape
    inner = channels // groups
    steps = (*x.strides[:3], x.strides[3] * inner, x.strides[3])
    each = View(x.storage, (batch, height, width, groups, inner), steps, x.offset)
    found = reduce(lowering, _centered(each, zero), [4], "int32", "sum")
    sums = View(found.storage, (batch, height, width, groups), found.strides[:4], found.offset)
    same = (batch, height, width) == (outputs[0], *outputs[2:]) and not any(window.pads)
    if not same or window.taps != (1, 1) or window.strides != (1, 1):
        result = Product((outputs[0], *outputs[2:], groups), "int32")
        code = pooling.pool(sums, result, result, window, "sum", "window_sums", lowering.target)
        sums = lowering.call(code)[0]
    return Missing(lowering.weight(shift), permuted(sums, (0, 3, 1, 2)), 1, int(outputs[1]) // groups)


def _centered(value: Value, zero: int) -> Lazy:
    def element(kernel: Kernel, index: Index) -> Any:
        code = kernel.load(value, index).astype("int32")
        return code - like(code, zero) if zero else code

    return Lazy(value.shape, "int32", (value,), element, flat=True, name="center")
