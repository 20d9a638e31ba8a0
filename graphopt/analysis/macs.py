"""How many multiply-accumulates and element-wise operations one call does: a table by operator.

Multiply-accumulates are counted for products of matrices, convolutions, attention and recurrent layers; biases count
nothing, zero padding, masked positions and gated blocks count as if they were computed, and an einsum over more than
two tensors as if it were one loop nest. Everything else that gives floating-point numbers counts one operation for each
element of the largest tensor it reads or gives, operators that the table does not know included; what only moves
numbers counts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from graphopt.aliasing import is_view
from graphopt.analysis.view import tensors
from graphopt.matcher import argument

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """A call with its sizes as integers; `shape_of` gives those of a tensor."""

    node: Node
    shape_of: Callable[[torch.Tensor], Shape]

    def output(self) -> Shape:
        """The shape of the first tensor that the call gives."""
        return self.shape_of(tensors(self.node)[0])

    def shape(self, name: str) -> Shape:
        """The shape of an argument by its name in the schema."""
        return self.shapes(argument(self.node, name))[0]

    def shapes(self, value: Any) -> list[Shape]:
        """The shapes of the nodes in one argument."""
        nodes = value if isinstance(value, (list, tuple)) else [value]
        return [self.shape_of(tensors(node)[0]) for node in nodes]


def _product(inner: str) -> Callable[[Call], int]:
    """Every element of the result is a sum over the last axis of the argument `inner`."""
    return lambda call: prod(call.output()) * call.shape(inner)[-1]


def _convolution(call: Call) -> int:
    transposed = call.node.target is torch.ops.aten.convolution.default and argument(call.node, "transposed")
    return (_transposed if transposed else _direct)(call)


def _direct(call: Call) -> int:
    return prod(call.output()) * prod(call.shape("weight")[1:])


def _transposed(call: Call) -> int:
    return prod(call.shape("input")) * prod(call.shape("weight")[1:])


def _attention(call: Call) -> int:
    *batch, rows, width = call.shape("query")
    columns, value_width = call.shape("value")[-2:]
    return prod(batch) * rows * columns * (width + value_width)


def _einsum(call: Call) -> int:
    inputs = str(argument(call.node, "equation")).replace(" ", "").partition("->")[0].split(",")
    sizes: dict[Any, int] = {}
    for labels, shape in zip(inputs, call.shapes(argument(call.node, "tensors")), strict=True):
        head, _, tail = labels.partition("...")
        unnamed = range(len(head) + len(tail) - len(shape), 0)  # axes under the dots, counted from the last of them
        for label, size in zip([*head, *unnamed, *tail], shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return prod(sizes.values())


def _bilinear(call: Call) -> int:
    return prod(call.output()) * prod(call.shape("weight")[1:])


def _recurrent(call: Call) -> int:
    """Both products of every gate, for each step of each row."""
    return prod(call.shape("x")[:-1]) * (prod(call.shape("w")) + prod(call.shape("r")))


def _cell(call: Call) -> int:
    return call.shape("input")[0] * (prod(call.shape("w_ih")) + prod(call.shape("w_hh")))


MACS: Mapping[str, Callable[[Call], int]] = {
    "linear": _product("input"),
    "mm": _product("self"),
    "bmm": _product("self"),
    "mv": _product("self"),
    "dot": _product("self"),
    "vdot": _product("self"),
    "matmul": _product("self"),
    "addmm": _product("mat1"),
    "addmv": _product("mat"),
    "addbmm": lambda call: prod(call.output()) * call.shape("batch1")[-1] * call.shape("batch1")[0],
    "baddbmm": _product("batch1"),
    "convolution": _convolution,
    **{f"conv{axes}d": _direct for axes in (1, 2, 3)},
    **{f"conv_transpose{axes}d": _transposed for axes in (1, 2, 3)},
    "gated_convolution": _direct,
    "gated_linear": _product("x"),
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    "bilinear": _bilinear,
    **dict.fromkeys(("lstm", "gru", "rnn"), _recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _cell),
}
LOOKUPS = frozenset({"embedding", "index", "index_select", "gather", "take", "take_along_dim"})
MOVES = LOOKUPS | {
    *("clone", "copy", "contiguous", "_to_copy", "lift_fresh_copy", "cat", "stack", "flip", "roll", "repeat", "tile"),
    *("repeat_interleave", "pad", "constant_pad_nd", "where", "masked_fill", "masked_select", "index_put", "scatter"),
    *("slice_scatter", "select_scatter", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "im2col"),
    *(
        "arange",
        "full",
        "zeros",
        "ones",
        "empty",
        "scalar_tensor",
        "full_like",
        "zeros_like",
        "ones_like",
        "empty_like",
    ),
    *("new_full", "new_zeros", "new_ones", "new_empty", "tril", "triu", "sort", "topk"),
}


def operator_name(node: Node) -> str:
    """The operator without namespace and overload, "linear"; "" for what is no operator of torch."""
    return node.target._schema.name.rpartition("::")[2] if isinstance(node.target, OpOverload) else ""


def count_macs(call: Call) -> int:
    """Multiply-accumulates of a call."""
    rule = MACS.get(operator_name(call.node))
    return rule(call) if rule else 0


def count_elementwise(call: Call) -> int:
    """Operations on single floating-point numbers of a call that has no multiply-accumulates."""
    name = operator_name(call.node)
    if not name or name in MACS or name in MOVES or is_view(call.node):
        return 0
    given: Sequence[torch.Tensor] = [value for value in tensors(call.node) if value.is_floating_point()]
    read = [value for node in call.node.all_input_nodes for value in tensors(node) if value.is_floating_point()]
    return max((prod(call.shape_of(value)) for value in (*given, *read)), default=0) if given else 0
