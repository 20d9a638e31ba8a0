"""Arguments of a node as the ATen schema names them."""

from __future__ import annotations

from typing import Any

from torch.fx import Node


def arguments(node: Node) -> dict[str, Any]:
    """Every argument of the operator by name, in the schema's order, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {**dict(zip((argument.name for argument in schema), node.args, strict=False)), **node.kwargs}
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}
