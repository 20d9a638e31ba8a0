"""Which values an input may take, read from how the graph uses it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graphopt.program import Domain, get_attribute

aten = torch.ops.aten
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Operators whose result holds the same values in another shape or type.
_SAME_VALUES = {
    "_to_copy", "to", "view", "reshape", "unsqueeze", "squeeze", "expand", "clone", "slice", "select", "transpose", "t",
    "permute", "alias", "contiguous", "flatten", "detach", "type_as", "_unsafe_view", "repeat", "index", "cat",
    "expand_as", "lift_fresh_copy",
}  # fmt: skip
_DIVISIONS = {"div", "floor_divide", "remainder", "fmod"}
_DIVISORS = 7  # the largest that is drawn
_COMPARISONS = {"eq", "ne"}
_BOOLEAN = {"logical_not", "bitwise_not", "logical_and", "bitwise_and", "where", "__and__", "any", "all"}


def infer_domains(module: GraphModule) -> list[Domain]:
    """One domain for each placeholder: `ids` for rows of a table and divisors, `mask` for what counts as 0 or not."""
    return [_domain(node, module) for node in module.graph.find_nodes(op="placeholder")]


def _domain(placeholder: Node, module: GraphModule) -> Domain:
    dtype = placeholder.meta["val"].dtype
    if dtype == torch.bool:
        return Domain("mask")
    if dtype.is_complex:
        return Domain()
    uses = _uses(placeholder, module)
    if not dtype.is_floating_point and any(_is_divisor(node, origin) for node, origin, _ in uses):
        return Domain("ids", 1, _DIVISORS)
    if dtype in _INTEGERS:
        rows = [r for node, origin, _ in uses if (r := _table_rows(node, origin)) is not None]
        if rows and min(rows) > 0:
            return Domain("ids", 0, min(rows) - 1)
    return Domain("mask") if any(_as_mask(node, origin, dtype) for node, origin, _ in uses) else Domain()


def _uses(start: Node, module: GraphModule) -> list[tuple[Node, Node, GraphModule]]:
    """Uses of the values of a node, through casts, views and into branches: (user, what it uses, graph's module)."""
    found: list[tuple[Node, Node, GraphModule]] = []
    seen: set[Node] = set()
    pending = [(start, module)]
    while pending:
        node, owner = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            found.append((user, node, owner))
            if operator_name(user) in _SAME_VALUES and user.args and _carries(user, node):
                pending.append((user, owner))
            elif user.target is torch.ops.higher_order.cond:
                pending += _inside(user, node, owner)
    return found


def _carries(user: Node, node: Node) -> bool:
    first = user.args[0]
    return first is node or (isinstance(first, (list, tuple)) and node in first)


def _inside(user: Node, node: Node, owner: GraphModule) -> list[tuple[Node, GraphModule]]:
    entries = []
    operands: Any = user.args[3]
    for branch in user.args[1:3]:
        child = get_attribute(owner, str(branch.target))  # type: ignore[union-attr]
        inner = child.graph.find_nodes(op="placeholder")
        entries += [(place, child) for place, operand in zip(inner, operands, strict=True) if operand is node]
    return entries


def operator_name(node: Node) -> str:
    """ "add" for aten.add.Tensor; the function's own name for anything else that is called."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def _table_rows(user: Node, index: Node) -> int | None:
    """Size of the axis that `user` looks `index` up along; None where it looks nothing up or the size may vary."""
    arguments: Any = user.args
    match operator_name(user):
        case "embedding" if arguments[1] is index:
            axis = 0
        case "index_select" | "gather" if arguments[2] is index:
            axis = arguments[1]
        case "index" if index in arguments[1]:
            axis = arguments[1].index(index)
        case _:
            return None
    shape = arguments[0].meta["val"].shape
    size = shape[axis] if shape else None
    return size if isinstance(size, int) else None


def _is_divisor(user: Node, value: Node) -> bool:
    """Of whole numbers, which cannot be divided by 0."""
    whole = value.meta["val"].dtype in _INTEGERS
    return whole and operator_name(user) in _DIVISIONS and user.args[1] is value


def _as_mask(user: Node, value: Node, dtype: torch.dtype) -> bool:
    name = operator_name(user)
    if dtype in _INTEGERS:
        if name in ("_to_copy", "to") and user.meta["val"].dtype == torch.bool:
            return True
        if name in _COMPARISONS and value is user.args[0] and user.args[1] in (0, 1):
            return True
        if name in _BOOLEAN and value.meta["val"].dtype == torch.bool:
            return True
    return _inverted_mask(user, value)


def _inverted_mask(user: Node, value: Node) -> bool:
    """(1 - mask) * large negative number, the additive attention mask."""
    name = operator_name(user)
    one_minus = (name == "rsub" and user.args[0] is value and user.args[1] == 1) or (
        name == "sub" and user.args[0] == 1 and user.args[1] is value
    )
    if not one_minus:
        return False
    return any(
        operator_name(later) == "mul" and _is_large_negative(other)
        for later in user.users
        for other in later.args
        if other is not user
    ) or any(operator_name(later) in ("_to_copy", "masked_fill") for later in user.users)


def _is_large_negative(value: Any) -> bool:
    if isinstance(value, Node) and value.target is operator.neg:
        return False
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value <= -1e3
