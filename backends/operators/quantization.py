"""graphopt::quantize and graphopt::dequantize as element-wise expressions, which fuse with what is around them.

Codes that are constants are dequantized when the program is compiled: their products then are those of float weights.
Softmax and norms over the last axis read codes and write codes in their own kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import convert, dtype_of, element_wise, like, operand
from graphopt.backends.operators.integer_products import rounded_between
from graphopt.backends.operators.views import reshape
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Index, Lazy, View, preferred_order
from graphopt.operators.quantization import computed_in

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
QUANTIZE, DEQUANTIZE = torch.ops.graphopt.quantize.default, torch.ops.graphopt.dequantize.default
_OVER_ROWS = frozenset(
    {
        *(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default),
        *(aten.layer_norm.default, aten.rms_norm.default),
    }
)


def _quantize(lowering: Lowering, node: Node) -> Lazy:
    """NaN becomes qmin: it is not above it. LLVM's `tirx.round` rounds halves to even, a whole vector at once."""
    x, scale, zero, axis, block, qmin, qmax, dtype, reciprocal = arguments(node).values()
    compute, bytes_ = DTYPES[computed_in(x.meta["val"].dtype)], dtype in (torch.uint8, torch.int8)

    def expression(value: Any, step: Any, *zeros: Any) -> Any:
        number = value * (like(step, 1) / step) if reciprocal else value / step
        if bytes_ and all(isinstance(origin, tirx.FloatImm) for origin in zeros):
            origin = int(zeros[0].value) if zeros else 0
            return rounded_between(number, qmin - origin, qmax - origin) + tirx.const(origin, "int32")
        whole = tirx.round(number)
        whole = whole + zeros[0] if zeros else whole
        least, most = like(whole, qmin), like(whole, qmax)
        whole = tirx.Select(whole > least, whole, least)
        return tirx.Select(whole < most, whole, most)

    given = [x, *(_spread(lowering, part, x, axis, block) for part in (scale, zero) if part is not None)]
    return element_wise(lowering, node, given, expression, compute)


def _dequantize(lowering: Lowering, node: Node) -> Any:
    x, scale, zero, axis, block, _, _, dtype = arguments(node).values()
    held = [lowering.value(part) for part in (x, scale, zero)]
    if all(part is None or isinstance(part, torch.Tensor) for part in held):
        with torch.no_grad():
            return node.target(*held, **node.kwargs)  # type: ignore[operator]
    compute = DTYPES[computed_in(dtype)]
    types = [DTYPES[x.meta["val"].dtype], compute]
    if zero is not None:
        floating = zero.meta["val"].dtype.is_floating_point
        types = [compute if floating else "int32", compute, compute if floating else "int32"]

    def expression(code: Any, step: Any, *zeros: Any) -> Any:
        return convert(code - zeros[0] if zeros else code, compute) * step

    given = [x, *(_spread(lowering, part, x, axis, block) for part in (scale, zero) if part is not None)]
    return element_wise(lowering, node, given, expression, types)


def makes_codes(node: Node) -> bool:
    """Whether its result is 8-bit codes, or may be."""
    return node.meta["val"].dtype in (torch.uint8, torch.int8)


def is_left_to_rows(node: Node) -> bool:
    """Whether only kernels over rows read what it dequantizes, so that the kernel before it stores codes."""
    if node.target is not DEQUANTIZE or arguments(node)["axis"] is not None or not node.users:
        return False
    return node.meta["val"].dtype is torch.float32 and all(_is_over_rows(user, node) for user in node.users)


def _is_over_rows(node: Node, source: Node) -> bool:
    """Whether it is a softmax or a norm of `source` over its last axis."""
    if node.target not in _OVER_ROWS or node.args[0] is not source or source in node.all_input_nodes[1:]:
        return False
    over, last = node.args[1], source.meta["val"].dim() - 1
    return over in (-1, last) if isinstance(over, int) else len(over) == 1  # type: ignore[arg-type]


def rows_into_codes(lowering: Lowering, node: Node, x: Node) -> View | Lazy | None:
    """The operand of a float32 softmax or norm over the last axis that is read as codes or whose result becomes such.

    In memory, or as a function of codes, whichever is stored.
    """
    values = x.meta["val"], node.meta["val"]
    if any(not isinstance(value, torch.Tensor) or value.dtype is not torch.float32 for value in values):
        return None
    value = lowering.tensor(x)
    if is_left_to_rows(x) and isinstance(value, Lazy) and preferred_order(value) == tuple(range(len(value.shape))):
        return value
    becomes = any(user.target is QUANTIZE for user in node.users)
    return lowering.contiguous(value) if becomes and len(value.shape) else None


def _spread(lowering: Lowering, parameter: Node, x: Node, axis: int | None, block: int) -> Any:
    """A scale or zero point as an operand that broadcasts against x."""
    value = operand(lowering, parameter)
    if axis is None or not isinstance(value, (View, Lazy)):
        return value
    shape = shape_of(x.meta["val"])
    if not block:
        return reshape(lowering, value, tuple(value.shape) + (1,) * (len(shape) - axis - 1))

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(len(shape))]
        axes[axis] = tirx.truncdiv(axes[axis], tirx.const(block, dtype_of(axes[axis])))
        return kernel.load(value, Index(value.shape, kernel.sizes, axes=tuple(axes)))

    return Lazy(shape, value.dtype, (value,), element)


TABLE: dict[Any, Callable[..., Any]] = {
    QUANTIZE: _quantize,
    DEQUANTIZE: _dequantize,
}
