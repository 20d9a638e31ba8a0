"""Which products have a constant weight that may be stored in few bits, and what it is now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.contract import PassContext
from graphopt.edit import Edit, GraphEditor
from graphopt.low_bit.spelling import DEQUANTIZE, TURNS, Unread, is_spelled, read
from graphopt.low_bit.weight import LowBitWeight
from graphopt.matcher import argument
from graphopt.passes.merge_linears import count_readers
from graphopt.passes.quantize.placement import is_dequantized
from graphopt.passes.scale_folding import PRODUCTS, Product
from graphopt.program import Program

TARGETS: Mapping[Any, Product] = {target: item for target, item in PRODUCTS.items() if item.channels == -1}


class Refused(Exception):
    """Why a product stays as it is."""


@dataclass(frozen=True)
class Layer:
    """y = x w^T + bias: `held` is a float weight as the graph has it, `low` one in few bits already."""

    node: Node
    x: Node
    bias: Node | None
    held: Tensor | None = None
    low: LowBitWeight | None = None

    def floats(self) -> Tensor:
        """The float weight as [N, K]."""
        assert self.held is not None
        value = self.held.detach()
        return value.t() if TARGETS[self.node.target].inputs == 0 else value

    @property
    def rows(self) -> int | None:
        """How many rows x has, None where that is open."""
        count = 1
        for size in self.x.meta["val"].shape[:-1]:
            if not isinstance(size, int):
                return None
            count *= size
        return count


@dataclass(frozen=True)
class Found:
    """Layers by full name in order of execution, and why others are none."""

    layers: Mapping[str, Layer]
    refused: Mapping[str, str]
    sources: Mapping[str, str]  # what each layer reads, by full name


def find_layers(program: Program, least: int, ignored: Mapping[str, str]) -> Found:
    """Every product of a program; `least` counts weights, `ignored` says why some are left alone."""
    layers: dict[str, Layer] = {}
    refused: dict[str, str] = {}
    sources: dict[str, str] = {}
    for editor in Edit(program, PassContext(), "lut-matmul").graphs():
        for node in editor.nodes():
            if node.target not in TARGETS:
                continue
            name = editor.full_name(node)
            try:
                if name in ignored:
                    raise Refused(ignored[name])
                layers[name] = find_layer(editor, node, least)
                sources[name] = editor.full_name(layers[name].x)
            except Refused as why:
                refused[name] = str(why)
    _refuse_shared(program, layers, refused)
    return Found(layers, refused, sources)


def _refuse_shared(program: Program, layers: dict[str, Layer], refused: dict[str, str]) -> None:
    """Leave weights alone that stay in float32 all the same."""
    readers = count_readers(program)
    for layer in layers.values():
        if layer.held is not None:
            readers[_address(layer.held)] -= 1
    for name, layer in list(layers.items()):
        if layer.held is not None and (others := readers[_address(layer.held)]) > 0:
            refused[name] = f"its weight is read {others} times more, by others, so that it would stay beside its codes"
            del layers[name]


def _address(weight: Tensor) -> int:
    return weight.untyped_storage().data_ptr()


def find_layer(editor: GraphEditor, node: Node, least: int) -> Layer:
    """The layer that a product is. Raises Refused with a clause where it is none; `least` counts weights."""
    names = TARGETS[node.target]
    x, weight = argument(node, names.input), argument(node, names.weight)
    if editor.constant_value(x) is not None:
        raise Refused("it multiplies a constant from the left")
    if is_dequantized(x) and not _is_built(x):
        raise Refused("its input is quantized: qdq-fusion serves 8-bit codes of both operands")
    if x.meta["val"].dtype != torch.float32:
        raise Refused(f"its input is {x.meta['val'].dtype}, where kernels for low-bit weights take float32")
    held = _held(editor, weight)
    if held is None and not is_spelled(weight):
        raise Refused(f"its weight, {weight.name}, is computed")
    if weight.meta["val"].dim() != 2:
        raise Refused(f"its weight has {weight.meta['val'].dim()} axes, not 2")
    if held is not None and not bool(held.isfinite().all()):
        raise Refused("its weight has infinities or NaN")
    if (count := weight.meta["val"].numel()) < least:
        raise Refused(f"its {count} weights are fewer than min-size={least}")
    bias = _bias(node, names)
    if held is not None:
        return Layer(node, x, bias, held=held)
    try:
        return Layer(node, x, bias, low=read(weight, editor.constant_value, names.inputs))
    except Unread as unread:
        raise Refused(str(unread)) from unread


def _is_built(x: Node) -> bool:
    """Whether x is int8 codes in groups of its last axis, as an ONNX file has what `lut_build` gives."""
    if x.target is not DEQUANTIZE or argument(x, "zero_point") is not None or not argument(x, "block"):
        return False
    codes = x.args[0].meta["val"]  # type: ignore[union-attr]
    return bool(codes.dtype == torch.int8 and argument(x, "axis") == codes.dim() - 1)


def _held(editor: GraphEditor, node: Node) -> Tensor | None:
    """The tensor that a node always gives, itself or by turning its axes."""
    if node.target not in TURNS:
        return editor.constant_value(node)
    inner = _held(editor, node.args[0])  # type: ignore[arg-type]
    return None if inner is None else node.target(inner, *node.args[1:], **node.kwargs)


def _bias(node: Node, names: Product) -> Node | None:
    bias = argument(node, names.bias) if names.bias is not None else None
    if bias is None:
        return None
    if names.bias == "self" and (argument(node, "alpha") != 1 or argument(node, "beta") != 1):
        raise Refused("it scales its operands by alpha or beta")
    if bias.meta["val"].dim() != 1 or bias.meta["val"].shape[0] != node.meta["val"].shape[-1]:
        raise Refused(f"it adds a tensor of {bias.meta['val'].dim()} axes, where a bias of each output has one")
    found: Node = bias
    return found
