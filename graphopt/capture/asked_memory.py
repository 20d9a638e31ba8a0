"""Refuses models that ask for more memory than allowed in a few bytes: filled constants, repeated
values, and inputs to be drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from graphopt.aliasing import is_view
from graphopt.errors import CaptureError
from graphopt.program import Program, evaluate_size
from graphopt.untrusted.limits import Limits


def refuse_large_values(module: GraphModule, limits: Limits) -> None:
    """Raise CaptureError for a value over `Limits.max_value_bytes`, or over `max_constant_bytes` and of no input.

    Views, such as an expanded number, take no memory of their own.
    """
    for graph in (child for child in module.modules() if isinstance(child, GraphModule)):
        constant: set[Node] = set()
        for node in graph.graph.nodes:
            if node.op not in ("get_attr", "call_function"):
                continue
            if constant.issuperset(node.all_input_nodes):
                constant.add(node)
            if node.op == "call_function" and not is_view(node):
                _refuse_large(node, node in constant, limits)


def _refuse_large(node: Node, constant: bool, limits: Limits) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
    known = [tensor for tensor in tensors if all(isinstance(size, int) for size in tensor.shape)]
    size = sum(map(_bytes, known))
    if constant and size > limits.max_constant_bytes:
        raise CaptureError(
            f"{node.name} ({node.target}) fills {size} bytes from no input, over the limit of "
            f"{limits.max_constant_bytes}; raise Limits.max_constant_bytes"
        )
    if (size := sum(map(_bytes, tensors))) > limits.max_value_bytes:
        raise CaptureError(
            f"{node.name} ({node.target}) takes {size} bytes, over the limit of {limits.max_value_bytes}; "
            "raise Limits.max_value_bytes"
        )


def _bytes(tensor: torch.Tensor) -> int:
    """At the sizes of the examples where some are symbolic."""
    sizes = [(size.node.hint or 0) if isinstance(size, torch.SymInt) else size for size in tensor.shape]
    return math.prod(sizes) * tensor.element_size()


def refuse_large_inputs(program: Program, sizes: Mapping[str, int], limits: Limits) -> None:
    """Raise CaptureError where inputs drawn at these sizes would be over `Limits.max_constant_bytes` together."""
    total = 0
    for spec in program.inputs:
        total += math.prod(evaluate_size(size, sizes) for size in spec.shape) * spec.dtype.itemsize
    if total > limits.max_constant_bytes:
        raise CaptureError(
            f"examples drawn for its inputs would take {total} bytes, over the limit of {limits.max_constant_bytes}; "
            "give example_inputs, or raise Limits.max_constant_bytes"
        )
