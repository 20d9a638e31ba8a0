"""Values that stand for codes: what a dequantize reads, and what a quantize makes, with constant parameters.

Rules here take one scale and zero point for a whole activation, of float32 arithmetic: in bfloat16 a pair of quantize
and dequantize does not give back every code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Builder, GraphEditor
from graphopt.matcher import argument
from graphopt.operators import quantization  # noqa: F401

QUANTIZE = torch.ops.graphopt.quantize.default
DEQUANTIZE = torch.ops.graphopt.dequantize.default
BYTES = (torch.uint8, torch.int8)


@dataclass(frozen=True, eq=False)
class Codes:
    """Codes, uint8 or int8, that stand for (node - zero) * scale."""

    node: Node
    scale: Tensor
    zero: int

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.node.meta["val"].dtype
        return dtype

    @property
    def bounds(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return (0, 255) if self.dtype == torch.uint8 else (-128, 127)

    @property
    def largest(self) -> int:
        """The largest absolute value of code - zero."""
        low, high = self.bounds
        return max(high - self.zero, self.zero - low)


@dataclass(frozen=True, eq=False)
class Into:
    """What a quantize makes: codes of `dtype` from `low` to `high`; `reciprocal` is its rounding."""

    scale: Tensor
    zero: int
    low: int
    high: int
    dtype: torch.dtype
    reciprocal: bool

    def equals(self, codes: Codes) -> bool:
        """Whether codes of these parameters stay as they are: all of them lie between the bounds."""
        same = bool(self.scale == codes.scale) and self.zero == codes.zero and self.dtype == codes.dtype
        return same and (self.low, self.high) == codes.bounds

    def of(self, numbers: Tensor) -> Tensor:
        """The codes of numbers, computed now."""
        zero = torch.tensor(self.zero, dtype=self.dtype)
        options = {"qmin": self.low, "qmax": self.high, "dtype": self.dtype, "reciprocal": self.reciprocal}
        result: Tensor = QUANTIZE(numbers, self.scale, zero, **options)
        return result

    def clipped(self, low: float | None, high: float | None) -> Into:
        """With the numbers clipped before they are rounded: rounding keeps order, so codes may be clipped instead."""
        ends = [self.low, self.high]
        for place, bound in enumerate((low, high)):
            if bound is not None:
                code = int(torch.round(self._in_steps(torch.tensor(bound)).clamp(-1e6, 1e6))) + self.zero
                ends[place] = min(max(code, self.low), self.high)
        return Into(self.scale, self.zero, ends[0], ends[1], self.dtype, self.reciprocal)

    def _in_steps(self, number: Tensor) -> Tensor:
        return number * self.scale.reciprocal() if self.reciprocal else number / self.scale


@dataclass
class Constants:
    """Small constants of new nodes, each once in the program."""

    made: dict[Any, Tensor] = field(default_factory=dict)

    def scale(self, builder: Builder, scale: Tensor) -> Node:
        return builder.constant(self.made.setdefault(("scale", float(scale)), scale))

    def zero(self, builder: Builder, zero: int, dtype: torch.dtype) -> Node | None:
        if zero == 0:
            return None
        return builder.constant(self.made.setdefault((zero, dtype), torch.tensor(zero, dtype=dtype)))

    def of(self, builder: Builder, codes: Codes) -> tuple[Node, Node, Node | None]:
        """The codes with their scale and zero point, as operators take them."""
        return codes.node, self.scale(builder, codes.scale), self.zero(builder, codes.zero, codes.dtype)

    def parameters(self, builder: Builder, into: Into) -> tuple[Node, Node | None]:
        return self.scale(builder, into.scale), self.zero(builder, into.zero, into.dtype)


def codes_of(editor: GraphEditor, node: Any) -> Codes | None:
    """The codes that `node` dequantizes; None where it does not, where they are constant, or not of this kind."""
    if not isinstance(node, Node) or node.target is not DEQUANTIZE or argument(node, "dtype") != torch.float32:
        return None
    codes, parameters = node.args[0], _parameters(editor, node)
    if parameters is None or not isinstance(codes, Node) or codes.meta["val"].dtype not in BYTES:
        return None
    return None if editor.constant_value(codes) is not None else Codes(codes, *parameters)


def into_of(editor: GraphEditor, node: Node) -> Into | None:
    """What a quantize with one scale makes; None for any other node."""
    if node.target is not QUANTIZE or node.args[0].meta["val"].dtype != torch.float32:  # type: ignore[union-attr]
        return None
    parameters, dtype = _parameters(editor, node), argument(node, "dtype")
    if parameters is None or dtype not in BYTES:
        return None
    low, high = argument(node, "qmin"), argument(node, "qmax")
    return Into(*parameters, low, high, dtype, argument(node, "reciprocal"))


def constant_number(editor: GraphEditor, node: Any) -> Tensor | None:
    """The numbers of a constant, stored as such or as codes."""
    value = editor.constant_value(node)
    if value is not None or not isinstance(node, Node) or node.target is not DEQUANTIZE:
        return value
    given = [argument(node, name) for name in ("x", "scale", "zero_point")]
    held = [None if each is None else editor.constant_value(each) for each in given]
    if any(each is not None and value is None for each, value in zip(given, held, strict=True)):
        return None
    with torch.no_grad():
        result: Tensor = DEQUANTIZE(*held, **node.kwargs)
    return result


def _parameters(editor: GraphEditor, node: Node) -> tuple[Tensor, int] | None:
    """Scale and zero point where both are constants of one element."""
    scale, zero = editor.constant_value(argument(node, "scale")), argument(node, "zero_point")
    if argument(node, "axis") is not None or scale is None or scale.dtype != torch.float32:
        return None
    if not bool(scale > 0):
        return None
    if zero is None:
        return scale.detach(), 0
    held = editor.constant_value(zero)
    return None if held is None or held.is_floating_point() else (scale.detach(), int(held))


def only_user(node: Node, wanted: Callable[[Node], bool] = lambda node: True) -> Node | None:
    """The one node that reads `node`, where there is just one and it is wanted."""
    users = list(node.users)
    return users[0] if len(users) == 1 and wanted(users[0]) else None
