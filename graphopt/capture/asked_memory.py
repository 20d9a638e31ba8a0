"""Refuses models that ask for more memory than allowed in a few bytes: filled constants, and inputs to be drawn."""

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


def refuse_large_constants(module: GraphModule, limits: Limits) -> None:
    """Raise CaptureError where a value computed from no input is over `Limits.max_constant_bytes`.

    Views, such as an expanded number, take no memory of their own.
    """
    for graph in (child for child in module.modules() if isinstance(child, GraphModule)):
        constant: set[Node] = set()
        for node in graph.graph.nodes:
            if node.op not in ("get_attr", "call_function") or not constant.issuperset(node.all_input_nodes):
                continue
            constant.add(node)
            if node.op == "call_function" and not is_view(node) and (size := _bytes(node)) > limits.max_constant_bytes:
                raise CaptureError(
                    f"{node.name} ({node.target}) fills {size} bytes from no input, over the limit of "
                    f"{limits.max_constant_bytes}; raise Limits.max_constant_bytes"
                )


def _bytes(node: Node) -> int:
    """Bytes of the tensors in a node's value whose sizes are known."""
    tensors = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
    known = [tensor for tensor in tensors if all(isinstance(size, int) for size in tensor.shape)]
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in known)


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
