"""Products of bfloat16 numbers that a program spells as float32: operands are rounded, then cast back.

`linear(x.bfloat16().float(), w.float())` with a bfloat16 weight is exact products summed in float32, which is what
instructions for bfloat16 compute. Products read such an operand as it lies in memory, so the cast back is left to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.bfloat16 import BFLOAT16
from graphopt.backends.kernel import int64
from graphopt.backends.operators.element_wise import widened
from graphopt.backends.values import Index, Lazy, View

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
PRODUCTS = frozenset(
    {
        *(aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default),
        *(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding),
    }
)


NARROW = (torch.bfloat16, torch.float16)


def is_widening(node: Node) -> bool:
    """Whether it is bfloat16 or float16 in float32."""
    if node.target is not aten._to_copy.default:
        return False
    value, source = node.meta["val"], node.all_input_nodes[0].meta["val"]
    return value.dtype is torch.float32 and source.dtype in NARROW


def is_left_to_products(node: Node) -> bool:
    """Whether a product reads what it widens, so that the kernel before it stores bfloat16."""
    rounded = is_widening(node) and node.all_input_nodes[0].meta["val"].dtype is torch.bfloat16
    return rounded and any(user.target in PRODUCTS for user in node.users)


def pairs_of(lowering: Lowering, argument: Any) -> View | None:
    """The operand in memory as bfloat16 with its last axis contiguous and of even size; None where it is no such."""
    narrow = as_stored(lowering, argument)
    if narrow.dtype != BFLOAT16 or not lowering.target.pairs:
        return None
    if isinstance(narrow.shape[-1], int) and narrow.shape[-1] % 2:
        return lowering.store(_even(narrow))
    view = lowering.view(narrow)
    return view if view.strides[-1] == 1 else lowering.contiguous(view)


def as_stored(lowering: Lowering, argument: Any) -> View | Lazy:
    """The operand before it was widened to float32; as it is where it was not."""
    value = argument if isinstance(argument, (View, Lazy)) else lowering.tensor(argument)
    return value.narrow if isinstance(value, Lazy) and value.narrow is not None else value


def _even(value: Any) -> Lazy:
    """One zero after each row."""
    width = int(value.shape[-1])

    def element(kernel: Kernel, index: Index) -> Any:
        axes = [index.axis(number) for number in range(len(value.shape))]
        column = axes[-1]
        at = Index(value.shape, kernel.sizes, axes=(*axes[:-1], tirx.min(column, int64(width - 1))))
        return tirx.Select(column < width, kernel.load(value, at), tirx.const(0, BFLOAT16))

    return Lazy((*value.shape[:-1], width + 1), BFLOAT16, (value,), element, name="pad")


def numbers_of(lowering: Lowering, argument: Any) -> View:
    """The operand in memory as float32 numbers; what is float64 stays so."""
    return lowering.view(widened(lowering, argument))
