"""Operators that have kernels of their own on a GPU; all others are lowered as for a CPU, a task a thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from graphopt.backends.cuda import low_bit
from graphopt.backends.kernel import Code
from graphopt.backends.lowering import Lowering
from graphopt.backends.operators import OPERATORS as COMMON
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.low_bit import name_of, product_by
from graphopt.backends.rules import pointwise
from graphopt.backends.rules.low_bit_codes import Operands
from graphopt.backends.rules.low_bit_layout import Layout
from graphopt.backends.values import Product, View
from graphopt.errors import CompileError


def _low_bit(lowering: Lowering, node: Node) -> View:
    return product_by(lowering, node, _gemv)


def _gemv(
    lowering: Lowering,
    node: Node,
    layout_of: Callable[[int, int], Layout],
    operands_of: Callable[[Layout], Operands],
    result: Product,
    end: Any,
) -> Code:
    if (asked := arguments(node)["kernel"]) not in ("auto", "unpack"):
        raise CompileError(f"{node.name} asks for kernel={asked!r}, which {lowering.target.name} lacks; use 'auto'")
    layout = layout_of(low_bit.WARP, layout_of(low_bit.WARP, 1).together)
    return low_bit.gemv(operands_of(layout), result, end, name_of(layout), lowering.target)


OWN: dict[Any, Callable[..., Any]] = {
    torch.ops.graphopt.lut_gemv.default: _low_bit,
    torch.ops.graphopt.wq_gemm.default: _low_bit,
}
NATIVE = (low_bit.RULE, pointwise.RULE)  # rules whose kernels are a GPU's
OPERATORS = {**COMMON, **OWN}
