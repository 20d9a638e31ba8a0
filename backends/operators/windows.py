"""What sliding windows share: a number for each spatial axis, a padded copy, an element at a position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvm import tirx

from graphopt.backends.kernel import int64
from graphopt.backends.operators.padding import padded
from graphopt.backends.sizes import Shape
from graphopt.backends.values import Index, Lazy, View, permuted

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering


def each_axis(value: Any, count: int) -> list[int]:
    """One number for all spatial axes, or one for each."""
    items = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return items * count if len(items) == 1 else items


def _extended(view: View, before: Sequence[int], after: Sequence[int]) -> Shape:
    lead = len(view.shape) - len(before)
    grown = [size + b + a for size, b, a in zip(view.shape[lead:], before, after, strict=True)]
    return (*view.shape[:lead], *grown)


def surrounded(lowering: Lowering, x: Any, before: Sequence[int], after: Sequence[int], fill: float = 0.0) -> View:
    """`x` in memory with `fill` around its last axes."""
    view = lowering.view(x)
    if not any(before) and not any(after):
        return view
    pairs = [p for pair in reversed(list(zip(before, after, strict=True))) for p in pair]
    return lowering.store(padded(view, pairs, fill, _extended(view, before, after)))


def channels_last(lowering: Lowering, argument: Any, spatial: int) -> View:
    """[N, C, ...] or [C, ...] as a view [N, ..., C] or [..., C] with channel stride 1; copied where it is not so."""
    value = lowering.tensor(argument) if not isinstance(argument, (View, Lazy)) else argument
    channels = len(value.shape) - spatial - 1
    order = (*range(channels), *range(channels + 1, len(value.shape)), channels)
    view = permuted(value if isinstance(value, View) else lowering.store(value, order), order)
    return view if view.strides[-1] == 1 else lowering.contiguous(view)


def load_at(kernel: Kernel, value: View, axes: tuple[Any, ...]) -> Any:
    return kernel.load(value, Index(value.shape, kernel.sizes, axes=axes))


def quotient(position: Any, by: int) -> Any:
    return position if by == 1 else tirx.truncdiv(position, int64(by))
