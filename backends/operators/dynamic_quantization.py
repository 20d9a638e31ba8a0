"""graphopt::dynamic_quantize by two reductions and an expression; graphopt::dequantize_lookup of constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import convert, like
from graphopt.backends.operators.reduction import reduce
from graphopt.backends.operators.views import reshape
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Index, Lazy
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering


def _dynamic_quantize(lowering: Lowering, node: Node) -> tuple[Any, Any, Any]:
    """Codes, scale and zero point; the latter two are stored, since every element reads them."""
    x, axis = arguments(node).values()
    value = lowering.view(x)
    axes = list(range(len(value.shape))) if axis is None else [axis]
    low, high = (reduce(lowering, value, axes, value.dtype, combine) for combine in ("min", "max"))

    def step(kernel: Kernel, index: Index) -> Any:
        least, most = kernel.load(low, index), kernel.load(high, index)
        width = tirx.Select(most > like(most, 0), most, like(most, 0))
        width = width - tirx.Select(least < like(least, 0), least, like(least, 0))
        return tirx.Select(width > like(width, 0), width / like(width, 255), like(width, 1))

    scale = lowering.store(Lazy(low.shape, value.dtype, (low, high), step))

    def shift(kernel: Kernel, index: Index) -> Any:
        least = kernel.load(low, index)
        least = tirx.Select(least < like(least, 0), like(least, 0) - least, like(least, 0))
        return convert(tirx.nearbyint(_clamped(least / kernel.load(scale, index))), "uint8")

    zero = lowering.store(Lazy(low.shape, "uint8", (low, scale), shift))

    def code(kernel: Kernel, index: Index) -> Any:
        whole = tirx.nearbyint(kernel.load(value, index) / kernel.load(scale, index))
        return convert(_clamped(whole + convert(kernel.load(zero, index), value.dtype)), "uint8")

    codes = Lazy(value.shape, "uint8", (value, scale, zero), code)
    shapes = [shape_of(part) for part in node.meta["val"]]
    return codes, reshape(lowering, scale, shapes[1]), reshape(lowering, zero, shapes[2])


def _clamped(x: Any) -> Any:
    """Between 0 and 255; NaN becomes 0."""
    x = tirx.Select(x > like(x, 0), x, like(x, 0))
    return tirx.Select(x < like(x, 255), x, like(x, 255))


def _dequantize_lookup(lowering: Lowering, node: Node) -> torch.Tensor:
    """Weights are widened when the program is compiled."""
    codes, table, scale, *_ = arguments(node).values()
    held = [lowering.value(part) for part in (codes, table, scale)]
    if not all(isinstance(part, torch.Tensor) for part in held):
        raise CompileError(f"{node.name} looks up codes that are computed, which has no lowering; use int8")
    with torch.no_grad():
        found: torch.Tensor = node.target(*held, **node.kwargs)  # type: ignore[operator]
    return found


TABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.graphopt.dynamic_quantize.default: _dynamic_quantize,
    torch.ops.graphopt.dequantize_lookup.default: _dequantize_lookup,
}
