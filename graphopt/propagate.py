"""Fake values of nodes: evaluate new nodes, then only those users whose value really changes.

All evaluation happens under the FakeTensorMode that made the program's own values, so symbolic sizes keep their
names. Two values are the same when dtype, device, sizes and strides are; the stride of an axis of size 1 is ignored.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree

from graphopt.errors import PropagationError


def find_mode(module: GraphModule) -> FakeTensorMode:
    """The mode that the values in `module` belong to; a new one for a graph without tensors."""
    for node in module.graph.nodes:
        for leaf in _pytree.tree_leaves(node.meta.get("val")):
            if isinstance(leaf, FakeTensor):
                return leaf.fake_mode
    return FakeTensorMode()


def fake_constant(mode: FakeTensorMode, tensor: torch.Tensor) -> FakeTensor:
    """The fake of a weight."""
    if _is_plain(tensor):
        # what `from_tensor` comes to for a plain tensor, at a tenth of its time
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(mode, meta, tensor.device)
    return mode.from_tensor(tensor.detach(), static_shapes=True)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether dtype, sizes, strides and device say all about a tensor but its values."""
    special = tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.layout is not torch.strided
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not special


def size_key(size: Any) -> Any:
    """A size as an integer or a symbolic expression: comparing two keys adds no guard."""
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        expression = size.node.expr
        return int(expression) if getattr(expression, "is_integer", False) and expression.is_number else expression
    return size


def shape_key(value: torch.Tensor) -> tuple[Any, ...]:
    """All sizes of a tensor, as keys."""
    return tuple(size_key(size) for size in value.shape)


def value_key(value: Any) -> Any:
    """Equal for two values exactly when no user can tell their types and layouts apart."""
    if isinstance(value, torch.Tensor):
        shape = shape_key(value)
        strides = tuple(0 if size == 1 else size_key(step) for size, step in zip(shape, value.stride(), strict=True))
        return value.dtype, value.device, shape, strides
    if isinstance(value, (tuple, list)):
        return tuple(value_key(item) for item in value)
    return size_key(value)


def evaluate(node: Node, mode: FakeTensorMode, changed: Mapping[Node, Any] | None = None) -> Any:
    """The fake value of a `call_function` node, with the arguments in `changed` in place of those in meta."""
    known = changed or {}

    def value(argument: Node) -> Any:
        return known[argument] if argument in known else argument.meta["val"]

    args, kwargs = map_arg((node.args, node.kwargs), value)
    try:
        with mode, torch.no_grad(), enable_python_dispatcher():  # without it, padding makes numbers of open sizes
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:  # fake kernels raise anything: the caller turns this one into a refusal
        reason = next(iter(str(error).strip().splitlines()), repr(error)).strip("'")
        raise PropagationError(f"{node.name} ({node.target}) cannot take it: {reason}") from error


class Evaluations:
    """What `evaluate` gave under one mode: a call whose operator and arguments were seen before takes that value."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._values: dict[Any, tuple[Any, Any]] = {}

    def of(self, node: Node) -> Any:
        """The fake value of a `call_function` node."""
        if isinstance(node.target, HigherOrderOperator):
            return evaluate(node, self.mode)
        key = (node.target, _call_key(node.args), _call_key(node.kwargs))
        if key not in self._values:
            # The key names fakes by their identity, which is theirs only as long as they live.
            read = [argument.meta["val"] for argument in node.all_input_nodes]
            self._values[key] = (evaluate(node, self.mode), read)
        return self._values[key][0]


def _call_key(argument: Any) -> Any:
    if isinstance(argument, Node):
        value = argument.meta["val"]
        return id(value) if isinstance(value, torch.Tensor) else ("size", value_key(value))
    if isinstance(argument, (list, tuple)):
        return tuple(_call_key(item) for item in argument)
    if isinstance(argument, dict):
        return tuple((name, _call_key(item)) for name, item in argument.items())
    return type(argument), argument if isinstance(argument, Hashable) else repr(argument)


def changes_downstream(mode: FakeTensorMode, replaced: Mapping[Node, Any]) -> dict[Node, Any]:
    """New values of all nodes that see a change when the nodes in `replaced` take the given values.

    Nothing is written; the replaced nodes themselves are left out of the answer. Raises PropagationError where a
    user cannot take its new argument.
    """
    values = {node: value for node, value in replaced.items() if _differs(node, value)}
    queue: list[Node] = []
    queued: set[Node] = set()

    def push(users: Iterator[Node]) -> None:
        for user in users:
            if user not in queued:
                queued.add(user)
                heapq.heappush(queue, user)

    for node in values:
        push(iter(node.users))
    while queue:
        node = heapq.heappop(queue)
        if node.op == "output" or node in replaced:
            continue
        if isinstance(node.target, HigherOrderOperator):
            raise PropagationError(f"{node.name} ({node.target}) would be given another layout, shape or type")
        value = evaluate(node, mode, values)
        if _differs(node, value):
            values[node] = value
            push(iter(node.users))
    return {node: value for node, value in values.items() if node not in replaced}


def _differs(node: Node, value: Any) -> bool:
    return "val" not in node.meta or bool(value_key(node.meta["val"]) != value_key(value))
