"""What only compares numbers compares their codes: a dequantize with a positive scale keeps order, and a quantize too.

- position: argmax(dequantize(x)) = argmax(x), where no two codes stand for one number; topk, stable sorts, and the
  extremes along an axis with their positions, whose values are dequantized behind them.
- extreme: quantize(maximum(dequantize(x), dequantize(y))) = maximum(x, y), each in the result's parameters.

Both are exact, ties included. A sort that is not stable may put equal codes in another order than equal numbers, and
stays where its positions are read.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from graphopt.edit import Builder, GraphEditor
from graphopt.matcher import argument
from graphopt.passes.qdq_fusion.codes import Constants, codes_of, constant_number, into_of, only_user
from graphopt.passes.qdq_fusion.elements import constant_codes, dequantized, numbers_of, requantized
from graphopt.passes.qdq_fusion.products import Refused

aten = torch.ops.aten
_POSITIONS = frozenset({aten.argmax.default, aten.argmin.default, aten.argsort.stable})
_PARTS = frozenset({aten.topk.default, aten.sort.stable, aten.sort.default, aten.max.dim, aten.min.dim})
_EXTREMES = frozenset({aten.maximum.default, aten.minimum.default, aten.max.other, aten.min.other})


def fuse_position(editor: GraphEditor, node: Node, rule: str, constants: Constants) -> bool:
    """Positions of codes, and the codes there; False for any other node. Raises Refused with a reason."""
    if node.target not in _POSITIONS and node.target not in _PARTS:
        return False
    source = argument(node, "self")
    codes = codes_of(editor, source)
    if codes is None:
        return False
    numbers = numbers_of(codes)
    if not bool((numbers[1:] > numbers[:-1]).all()) or not bool(torch.isfinite(numbers).all()):
        raise Refused("some of its codes stand for one number")
    if node.target in _POSITIONS:
        return editor.replace(rule, [node], lambda builder: [builder.repeat(node, {source: codes.node})])
    parts = [user for user in node.users if user.target is operator.getitem]
    if not parts or len(parts) < len(node.users):
        return False
    if node.target is aten.sort.default and any(part.args[1] == 1 for part in parts):
        raise Refused("it is not stable: equal codes might come in another order than equal numbers")

    def build(builder: Builder) -> list[Node]:
        whole = builder.repeat(node, {source: codes.node})
        found = [builder.call(operator.getitem, whole, part.args[1]) for part in parts]
        return [
            dequantized(builder, each, codes, constants) if part.args[1] == 0 else each
            for part, each in zip(parts, found, strict=True)
        ]

    return editor.replace(rule, parts, build, inner=[node], anchor=node)


def fuse_extreme(editor: GraphEditor, node: Node, rule: str) -> bool:
    """The quantize `node` of the larger or smaller of two, each of them codes or a constant."""
    into, source = into_of(editor, node), node.args[0]
    if into is None or not isinstance(source, Node) or source.target not in _EXTREMES or only_user(source) is None:
        return False
    operands: tuple[Any, ...] = source.args[:2]
    codes = [codes_of(editor, each) or constant_codes(editor, each) for each in operands]
    numbers = [constant_number(editor, each) for each in operands]
    for code, number in zip(codes, numbers, strict=True):
        if code is None and (number is None or bool(number.isnan().any())):
            return False

    def build(builder: Builder) -> list[Node]:
        given = []
        for code, number in zip(codes, numbers, strict=True):
            if code is not None:
                given.append(requantized(editor, builder, code, into))
            else:
                assert number is not None
                given.append(builder.constant(into.of(number.detach().float())))
        return [builder.repeat(source, dict(zip(operands, given, strict=True)))]

    return editor.replace(rule, [node], build, inner=[source])
