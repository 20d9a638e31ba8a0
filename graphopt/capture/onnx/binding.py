"""Numbers that an operator needs while the graph is read: computed from constants, or those of an input's example.

An input whose value decides a shape, an axis or a count is *bound*: the graph is read again with the example in its
place, and holds for that value only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from graphopt.capture.onnx.values import KNOWN_ELEMENTS, SYMBOLIC, Known, Tensor, known_tensor
from graphopt.errors import CaptureError

if TYPE_CHECKING:
    from graphopt.capture.onnx.emitter import Emitter
    from graphopt.capture.onnx.sizes import Input

MOST_ELEMENTS = 4096  # of an input that is bound, and of every value on the way to a number
_MOST_NODES = 1000
_NUMBERS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class ReadAgain(Exception):
    """Asks for the graph to be read with these inputs bound, and these sizes fixed; `why` is said of each size."""

    def __init__(self, inputs: frozenset[str] = frozenset(), sizes: Mapping[str, int] | None = None, why: str = ""):
        super().__init__(why)
        self.inputs, self.sizes, self.why = inputs, dict(sizes or {}), why


@dataclass(frozen=True)
class Binding:
    """The inputs of the graph by the names of their placeholders, and their examples by their own names."""

    inputs: Mapping[str, Input] = field(default_factory=dict)
    examples: Mapping[str, torch.Tensor] | None = None

    def numbers(self, emitter: Emitter, value: Tensor, what: str, refusal: str | None = None) -> Known:
        """The elements of a tensor that only constants decide; `what` and `refusal` are for the error.

        Raises ReadAgain where examples of inputs decide them, CaptureError where anything else does.
        """
        read = _what_decides(emitter, value.node, MOST_ELEMENTS)
        names = [self._bindable(node) for node in read.placeholders]
        if read.is_small and names and all(names):
            if self.examples is not None:
                raise ReadAgain(frozenset(name for name in names if name))
            listed = " and ".join(f"input {name!r}" for name in names)
            advice = "give example_inputs with it, it will be bound"
            raise CaptureError(f"{what} is computed from the values of {listed} at run time; {advice}")
        if read.is_constant:
            return known_tensor(_evaluated(read.order))
        cannot = "which graphopt cannot express; make it depend on shapes only"
        raise CaptureError(refusal or f"{what} is computed from values at run time, {cannot}")

    def _bindable(self, placeholder: Node) -> str | None:
        """The input's name where it is likely to hold settings: whole numbers, or a short list of floats."""
        item = self.inputs[str(placeholder.target)]
        if item.narrow is not None:
            return None
        example = None if self.examples is None else self.examples[item.name]
        shape = item.shape if example is None else tuple(example.shape)
        if math.prod(size for size in shape if isinstance(size, int)) > MOST_ELEMENTS:
            return None
        if item.dtype in _NUMBERS:
            is_list = len(item.shape) < 2 and all(isinstance(size, int) for size in item.shape)
            is_finite = example is None or bool(example.isfinite().all())
            return item.name if is_list and is_finite else None
        return None if item.dtype.is_floating_point or item.dtype.is_complex else item.name


def bound_input(emitter: Emitter, value: torch.Tensor) -> Known | Tensor:
    """What the name of a bound input stands for."""
    if value.numel() <= KNOWN_ELEMENTS:
        return known_tensor(value)
    return emitter.attribute(emitter.weights.constant(value))


@dataclass
class _Read:
    """What a node's value is computed from: `order` has every node on the way, a node after those that it reads."""

    order: list[tuple[Emitter, Node]] = field(default_factory=list)
    placeholders: dict[Node, None] = field(default_factory=dict)
    is_open: bool = False  # to sizes and branches that no value decides
    is_small: bool = True

    @property
    def is_constant(self) -> bool:
        return self.is_small and not self.is_open and not self.placeholders


def constant(emitter: Emitter, node: Node, most: int) -> Known | None:
    """The elements of what only weights decide, where no value on the way has more than `most` elements."""
    read = _what_decides(emitter, node, most)
    return known_tensor(_evaluated(read.order)) if read.is_constant else None


def _what_decides(emitter: Emitter, node: Node, most: int) -> _Read:
    found = _Read()
    done: set[Node] = set()
    pending: list[tuple[Emitter, Node, bool]] = [(emitter, node, False)]
    while pending and found.is_small:
        owner, current, is_read = pending.pop()
        if is_read:
            found.order.append((owner, current))
            continue
        if current in done:
            continue
        done.add(current)
        found.is_small = len(done) <= _MOST_NODES and _is_small(current, most)
        outside = owner.outside(current)
        if isinstance(current.meta.get("val"), SYMBOLIC):
            found.is_open = True
        elif outside is not None:
            pending += [(owner, current, True), (*outside, False)]
        elif current.op == "placeholder":
            found.placeholders[current] = None
        else:
            found.is_open |= current.target is torch.ops.higher_order.cond
            pending.append((owner, current, True))
            pending += [(owner, source, False) for source in current.all_input_nodes]
    return found


def _is_small(node: Node, most: int) -> bool:
    """Symbolic sizes are taken for small: they are numbers once what they belong to is bound."""
    value = node.meta.get("val")
    tensors = value if isinstance(value, (tuple, list)) else [value]
    counts = [tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return all(not isinstance(count, int) or count <= most for count in counts)


def _evaluated(order: list[tuple[Emitter, Node]]) -> torch.Tensor:
    """The value of the last node."""
    real: dict[Node, Any] = {}
    with torch.no_grad():
        for owner, node in order:
            outside = owner.outside(node)
            if outside is not None:
                real[node] = real[outside[1]]
                continue
            real[node] = owner.held(node)
            if real[node] is None:
                args, kwargs = map_arg((node.args, node.kwargs), lambda source: real[source])
                real[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    result: torch.Tensor = real[order[-1][1]]
    return result
