"""Low-bit weights in the place of a program's float weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from graphopt.contract import PassContext
from graphopt.edit import Builder, Edit
from graphopt.errors import UnknownNameError, UsageError
from graphopt.low_bit.spelling import spell
from graphopt.low_bit.weight import LowBitWeight
from graphopt.program import Program, full_name


def place_weights(program: Program, weights: Mapping[str, LowBitWeight]) -> Program:
    """A program that reads `weights`, by the name of the parameter that each replaces, as numbers made of codes.

    `lut-matmul` lowers products of them as they are. Names are those of the module's parameters, as
    `graphopt inspect` and `program.graph_module.state_dict()` show them. Raises UnknownNameError for a name that the
    program has no weight of, UsageError for one that is not float32 of the same shape.
    """
    edit = Edit(program, PassContext(), "low-bit")
    known: set[str] = set()
    placed: set[str] = set()
    for editor in list(edit.graphs()):
        for node in editor.nodes():
            if node.op != "get_attr" or editor.constant_value(node) is None:
                continue
            name = full_name(editor.path, str(node.target))
            known.add(name)
            if name in weights:
                _check(name, node, weights[name])
                placed.add(name)

                def build(builder: Builder, name: str = name) -> list[Node]:
                    return [spell(builder, weights[name])]

                editor.replace("low-bit", [node], build)
    for name in weights:
        if name not in placed:
            raise UnknownNameError("weight", name, known)
    return edit.finish().program


def _check(name: str, node: Node, weight: LowBitWeight) -> None:
    value = node.meta["val"]
    wanted = (weight.rows, weight.columns)
    if value.dtype != torch.float32 or tuple(value.shape) != wanted:
        raise UsageError(
            f"weight {name!r} is {value.dtype}{list(value.shape)}, and the low-bit one stands for "
            f"torch.float32{list(wanted)}"
        )
