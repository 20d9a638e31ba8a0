"""PyTorch's quantized_decomposed operators, which PT2E and torchao write, as graphopt::quantize and dequantize.

They round x * (1 / scale), not x / scale, and keep codes between bounds that may be narrower than their type. Scales
are numbers or float64 there and float32 here, as observers compute them.

Source: torch/ao/quantization/fx/_decomposed.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.capture.raising.dynamic_quantization import raise_dynamic
from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Builder, Edit, GraphEditor
from graphopt.matcher import argument
from graphopt.operators import quantization  # noqa: F401
from graphopt.program import Program

_NAMESPACE = "quantized_decomposed"
_QUANTIZE = torch.ops.graphopt.quantize.default
_DEQUANTIZE = torch.ops.graphopt.dequantize.default
_CODES = (torch.uint8, torch.int8, torch.int16)
_HELD = (*_CODES, torch.int32)


@dataclass(frozen=True)
class RaiseDecomposedQuantization(Pass):
    """quantize_per_tensor, quantize_per_channel and what undoes them, where their parameters are constants or, for a
    whole tensor, chosen from its range."""

    name: ClassVar[str] = "raising"
    preserves = "exact"

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Edit(program, context, self.name)
        for editor in edit.graphs():
            for node in editor.nodes():
                if getattr(node.target, "namespace", None) != _NAMESPACE:
                    continue
                if not raise_dynamic(editor, node, f"{self.name}/dynamic-quantization"):
                    _raise(editor, node, f"{self.name}/quantization")
        return edit.finish()


def _raise(editor: GraphEditor, node: Node, rule: str) -> bool:
    operator = str(node.target).removeprefix(f"{_NAMESPACE}.").partition(".")[0]
    undo = operator.removeprefix("de") in _SCALES and operator.startswith("de")
    kind = operator.removeprefix("de") if undo else operator
    if kind not in _SCALES or argument(node, "dtype") not in (_HELD if undo else _CODES):
        return False
    found = _SCALES[kind](editor, node)
    result = node.meta["val"].dtype
    if found is None or (undo and not result.is_floating_point):
        return False
    scale, zero, axis = found

    def build(builder: Builder) -> list[Node]:
        given = [builder.constant(scale), None if zero is None else builder.constant(zero)]
        bounds = {"qmin": int(argument(node, "quant_min")), "qmax": int(argument(node, "quant_max"))}
        options: dict[str, Any] = {} if axis is None else {"axis": axis}
        if undo:
            return [builder.call(_DEQUANTIZE, node.args[0], *given, **options, **bounds, dtype=result)]
        options |= {"dtype": argument(node, "dtype"), "reciprocal": True}
        return [builder.call(_QUANTIZE, node.args[0], *given, **options, **bounds)]

    return editor.replace(rule, [node], build)


def _of_tensor(editor: GraphEditor, node: Node) -> tuple[Tensor, Tensor | None, int | None] | None:
    scale, zero = (_held(editor, argument(node, name)) for name in ("scale", "zero_point"))
    if scale is None or zero is None or scale.numel() != 1 or zero.numel() != 1:
        return None
    return scale.float().reshape(()), _zero(zero.reshape(()), argument(node, "dtype")), None


def _of_channels(editor: GraphEditor, node: Node) -> tuple[Tensor, Tensor | None, int | None] | None:
    scale, given = _held(editor, argument(node, "scales")), argument(node, "zero_points")
    zero = None if given is None else _held(editor, given)
    if scale is None or (given is not None and (zero is None or zero.is_floating_point())):
        return None
    axis = int(argument(node, "axis")) % node.args[0].meta["val"].ndim  # type: ignore[union-attr]
    return scale.float(), None if zero is None else _zero(zero, argument(node, "dtype")), axis


_SCALES: dict[str, Callable[[GraphEditor, Node], tuple[Tensor, Tensor | None, int | None] | None]] = {
    "quantize_per_tensor": _of_tensor,
    "quantize_per_channel": _of_channels,
}


def _held(editor: GraphEditor, value: Any) -> Tensor | None:
    if isinstance(value, Node):
        held = editor.constant_value(value)
        return None if held is None else held.detach()
    return torch.tensor(value)


def _zero(zero: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Of the codes' type, None for zeros."""
    return zero.to(dtype) if bool(zero.any()) else None
