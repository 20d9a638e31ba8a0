"""PyTorch's dynamic quantization of a whole tensor, as PT2E writes it: choose_qparams, quantize, dequantize.

The range becomes ordinary operators, and codes graphopt::quantize and dequantize with a scale and zero point that are
computed. Scales are float64 with one element there, rounded from float32, and float32 with no axes here.

Source: torch/ao/quantization/fx/_decomposed.py and determine_qparams of torch/ao/quantization/utils.py.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from graphopt.edit import Builder, GraphEditor
from graphopt.matcher import argument
from graphopt.operators import quantization  # noqa: F401

aten, graphopt = torch.ops.aten, torch.ops.graphopt
_CODES = (torch.uint8, torch.int8)
_NAMESPACE = "quantized_decomposed"


def raise_dynamic(editor: GraphEditor, node: Node, rule: str) -> bool:
    """Rewrite choose_qparams.tensor with what quantizes and dequantizes by it alone; False for anything else."""
    if _name(node) != "choose_qparams.tensor" or argument(node, "dtype") not in _CODES:
        return False
    x = argument(node, "input")
    if x.meta["val"].dtype != torch.float32 or any(user.target is not operator.getitem for user in node.users):
        return False
    readers = list(dict.fromkeys(reader for part in node.users for reader in part.users))
    if not all(_reads(reader, node, x) for reader in readers):
        return False
    order = {each: number for number, each in enumerate(editor.graph.nodes)}
    readers.sort(key=order.__getitem__)
    if not readers or _name(readers[0]) != "quantize_per_tensor.tensor":
        return False
    low, high = int(argument(node, "quant_min")), int(argument(node, "quant_max"))

    def build(builder: Builder) -> list[Node]:
        call, axes = builder.call, list(range(x.meta["val"].dim()))
        least = call(aten.clamp.default, call(aten.amin.default, x, axes), None, 0.0)
        most = call(aten.clamp.default, call(aten.amax.default, x, axes), 0.0)
        width = call(aten.div.Tensor, call(aten.sub.Tensor, most, least), float(high - low))
        scale = call(aten.clamp.default, width, argument(node, "eps"))
        steps = call(aten.round.default, call(aten.div.Tensor, least, scale))
        shift = call(aten.clamp.default, call(aten.rsub.Scalar, steps, low), low, high)
        zero = call(aten._to_copy.default, shift, dtype=argument(node, "dtype"))
        made: dict[Node, Node] = {}
        for reader in readers:
            bounds: dict[str, Any] = {"qmin": int(argument(reader, "quant_min"))}
            bounds["qmax"] = int(argument(reader, "quant_max"))
            if _name(reader).startswith("quantize"):
                bounds |= {"dtype": argument(reader, "dtype"), "reciprocal": True}
                made[reader] = call(graphopt.quantize.default, x, scale, zero, **bounds)
            else:
                codes = made[argument(reader, "input")]
                made[reader] = call(graphopt.dequantize.default, codes, scale, zero, **bounds, dtype=torch.float32)
        return list(made.values())

    return editor.replace(rule, readers, build, inner=[node, *node.users], anchor=node)


def _name(node: Node) -> str:
    return str(node.target).removeprefix(f"{_NAMESPACE}.")


def _reads(reader: Node, node: Node, x: Node) -> bool:
    """Whether it makes codes of x with this scale and zero point, or numbers of such codes."""
    undo = _name(reader) == "dequantize_per_tensor.tensor"
    if not undo and _name(reader) != "quantize_per_tensor.tensor":
        return False
    for number, name in enumerate(("scale", "zero_point")):
        part = argument(reader, name)
        if not isinstance(part, Node) or part.target is not operator.getitem or part.args != (node, number):
            return False
    if argument(reader, "dtype") != argument(node, "dtype"):
        return False
    source = argument(reader, "input")
    if not undo:
        return source is x
    return _reads(source, node, x) and reader.meta["val"].dtype == torch.float32
