"""What a node of a graph says about itself in words: operator, type, arguments, module and line of source."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from graphopt.program import get_attribute

LONGEST = 300  # characters of one argument
NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
FRAME = re.compile(r'^\s*File "([^"]+)", line (\d+), in .*(?:\n\s+(\S.*))?', re.MULTILINE)
KINDS = {"placeholder": "input", "output": "output", "call_function": "call", "get_attr": "weight"}


@dataclass(frozen=True)
class Description:
    """`arguments` are (name in the schema, text) pairs; `type` is such as "float32[batch, 384]"; "" is unknown."""

    kind: str
    operator: str
    type: str
    arguments: tuple[tuple[str, str], ...]
    module: str
    source: str


def describe(node: Node, owner: GraphModule, symbols: Mapping[str, str]) -> Description:
    """`symbols` maps names inside the ShapeEnv to those of the program's sizes."""
    kind = KINDS.get(node.op, "call")
    value = node.meta.get("val")
    if node.op == "get_attr":
        held = get_attribute(owner, str(node.target))
        kind = "sub-graph" if isinstance(held, GraphModule) else kind
        value = held if isinstance(held, torch.Tensor) else value
    return Description(
        kind, operator_name(node), type_text(value, symbols), arguments_text(node), module_path(node), source_line(node)
    )


def operator_name(node: Node) -> str:
    """ "aten.linear.default", "getitem"; for what calls nothing its target, "" for inputs and outputs."""
    if node.op in ("placeholder", "output"):
        return ""
    if isinstance(node.target, str | OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def type_text(value: Any, symbols: Mapping[str, str]) -> str:
    """Type and shape with the program's names of its sizes; several values are joined with commas."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(size_text(size, symbols) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, torch.SymInt):
        return f"size {size_text(value, symbols)}"
    if isinstance(value, list | tuple):
        return ", ".join(text for item in value if (text := type_text(item, symbols)))
    return "" if value is None else type(value).__name__


def size_text(size: Any, symbols: Mapping[str, str]) -> str:
    return re.sub(r"[a-z]\w*", lambda found: symbols.get(found[0], found[0]), str(size))


def arguments_text(node: Node) -> tuple[tuple[str, str], ...]:
    if node.op == "output":
        return tuple((str(index), value_text(value)) for index, value in enumerate(node.args[0]))  # type: ignore[arg-type]
    names: list[str] = []
    if isinstance(node.target, OpOverload):
        names = [argument.name for argument in node.target._schema.arguments]
    names += [str(index) for index in range(len(names), len(node.args))]
    given = [*zip(names, node.args, strict=False), *node.kwargs.items()]
    return tuple((name, shorten(value_text(value))) for name, value in given)


def value_text(value: Any) -> str:
    if isinstance(value, Node):
        return value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(value_text, value))}]"
    return str(value).removeprefix("torch.")


def shorten(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def module_path(node: Node) -> str:
    """The innermost module that the node was captured in, "encoder.layer.0.attention"."""
    stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return stack[-1] if stack and stack[-1] != NO_MODULE else ""


def source_line(node: Node) -> str:
    """ "transformers/models/bert/modeling_bert.py:294: `x = self.dense(x)`": the innermost line outside torch."""
    frames = [found for found in FRAME.findall(node.meta.get("stack_trace") or "") if not found[0].startswith("<")]
    outside = [found for found in frames if not re.search(r"(^|/)torch/", found[0])]
    if not frames:
        return ""
    file, line, code = (outside or frames)[-1]
    return f"{file.rpartition('site-packages/')[2]}:{line}" + (f": `{code.strip()}`" if code else "")
