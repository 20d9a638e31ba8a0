"""How each ATen operator becomes values and kernels: one table a family, merged here.

A lowering is `f(lowering, node) -> View | Lazy | tuple of them`. A new operator is one function and one row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from graphopt.backends.operators import (
    activations,
    attention,
    columns,
    control_flow,
    convolution,
    creation,
    distances,
    dynamic_products,
    dynamic_quantization,
    embedding_bags,
    gating,
    grid_sampling,
    indexing,
    integer_convolution,
    integer_elements,
    integer_products,
    integer_sums,
    linear,
    low_bit,
    normalization,
    padding,
    pointwise,
    pooling,
    quantization,
    recurrent,
    reduction,
    resampling,
    scattering,
    sorting,
    views,
)
from graphopt.backends.operators.widening import is_left_to_products

ELEMENT_WISE: dict[Any, Callable[..., Any]] = {
    **pointwise.TABLE,
    **activations.TABLE,
    **quantization.TABLE,
    **integer_elements.TABLE,
    **integer_sums.TABLE,
}

OPERATORS: dict[Any, Callable[..., Any]] = {
    **ELEMENT_WISE,
    **creation.TABLE,
    **views.TABLE,
    **indexing.TABLE,
    **padding.TABLE,
    **scattering.TABLE,
    **sorting.TABLE,
    **linear.TABLE,
    **integer_products.TABLE,
    **low_bit.TABLE,
    **integer_convolution.TABLE,
    **integer_elements.PRODUCTS,
    **attention.TABLE,
    **normalization.TABLE,
    **recurrent.TABLE,
    **reduction.TABLE,
    **convolution.TABLE,
    **pooling.TABLE,
    **integer_sums.POOLS,
    **resampling.TABLE,
    **columns.TABLE,
    **distances.TABLE,
    **grid_sampling.TABLE,
    **embedding_bags.TABLE,
    **gating.TABLE,
    **dynamic_products.TABLE,
    **dynamic_quantization.TABLE,
    **control_flow.TABLE,
}


_aten = torch.ops.aten
STRAIGHT = frozenset(
    overload
    for packet in (
        _aten.add,
        _aten.sub,
        _aten.rsub,
        _aten.mul,
        _aten.div,
        _aten.neg,
        _aten.pow,
        _aten.sqrt,
        _aten.rsqrt,
        _aten.clone,
        _aten.contiguous,
        torch.ops.graphopt.qadd,
        torch.ops.graphopt.qmul,
        torch.ops.graphopt.qdiv,
        torch.ops.graphopt.table256,
    )
    for overload in (getattr(packet, name) for name in packet.overloads())
)
"""Arithmetic that neither compares nor selects."""


def is_branching(node: Node) -> bool:
    """True for element-wise operators whose formula compares or selects.

    TVM's simplifier looks through everything a comparison reads: time doubles and more with each one nested in another.
    """
    return node.target in ELEMENT_WISE and node.target not in STRAIGHT and not _changes_width(node)


def _changes_width(node: Node) -> bool:
    """A cast from one kind of float to another."""
    if node.target is not _aten._to_copy.default or not isinstance(node.args[0], Node):
        return False
    values = node.meta.get("val"), node.args[0].meta.get("val")
    return all(isinstance(value, torch.Tensor) and value.is_floating_point() for value in values)


def fits_epilogue(node: Node) -> bool:
    """True for operators that compute one element from one element at the same rows and columns."""
    left = is_left_to_products(node) or quantization.is_left_to_rows(node)
    return (node.target in ELEMENT_WISE and not left) or views.keeps_rows(node)
