"""Program: a torch.fx graph in normal form, with named inputs and outputs, sizes, state and provenance.

Normal form is what `torch.export.export(m).run_decompositions({})` gives, unlifted: functional ATen calls, composite
operators kept whole, one attribute per storage, sub-graphs of `torch.cond` as child modules. Placeholders are the
inputs, then the state; the output node holds one flat tuple, the outputs, then the new state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.fx import Graph, GraphModule, Node

from graphopt.errors import FeedError

PROVENANCE = "graphopt"


@dataclass(frozen=True)
class Domain:
    """Which values an input takes: `any`, `mask` (0 and 1), or `ids` (integers from `low` to `high`, both included)."""

    kind: Literal["any", "mask", "ids"] = "any"
    low: int = 0
    high: int = 1


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: its sizes are integers or expressions over the names in `Program.sizes`, such as "seq"."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    domain: Domain = Domain()


@dataclass(frozen=True)
class SizeRange:
    """Bounds of a symbolic size, both included; `high` is None where the model sets no limit."""

    low: int = 1
    high: int | None = None


@dataclass(frozen=True)
class State:
    """A tensor that lives from call to call: `spec.name` is also its placeholder's name; `initial` is never written."""

    spec: TensorSpec
    initial: torch.Tensor


@dataclass(frozen=True)
class Program:
    """One graph that runs in PyTorch at every moment; values are immutable, rewriting starts from `copy()`."""

    graph_module: GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    examples: tuple[torch.Tensor, ...]
    state: tuple[State, ...] = ()
    sizes: Mapping[str, SizeRange] = field(default_factory=dict)
    symbols: Mapping[str, str] = field(default_factory=dict)  # name inside the ShapeEnv ("s43") -> name in `sizes`
    name: str = "model"

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run from the initial state without gradients; returns the outputs, not the new state."""
        return self.step(inputs)[0]

    def step(
        self, inputs: tuple[torch.Tensor, ...], state: tuple[torch.Tensor, ...] | None = None
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Run once from `state` (default: the initial one); returns (outputs, new state)."""
        if len(inputs) != len(self.inputs):
            names = ", ".join(spec.name for spec in self.inputs)
            raise FeedError(f"{self.name} takes {len(self.inputs)} inputs ({names}), got {len(inputs)}")
        state = tuple(item.initial for item in self.state) if state is None else state
        with torch.no_grad():
            results = tuple(self.graph_module(*inputs, *state))
        count = len(self.outputs)
        return results[:count], results[count:]

    def graphs(self) -> Iterator[tuple[str, GraphModule]]:
        """The main graph ("") and every sub-graph by its dotted path; passes, checks and counts walk all of them."""
        for path, module in self.graph_module.named_modules():
            if isinstance(module, GraphModule):
                yield path, module

    def nodes(self) -> Iterator[Node]:
        """Every node of every graph, in order of execution within each."""
        for _, module in self.graphs():
            yield from module.graph.nodes

    def count_operators(self) -> int:
        """Nodes that compute something: neither inputs, outputs nor reads of an attribute."""
        return sum(node.op in ("call_function", "call_module", "call_method") for node in self.nodes())

    def copy(self) -> Program:
        """A program whose graphs may be edited; tensors are shared, so edits must never write into one."""
        return replace(self, graph_module=copy_module(self.graph_module))

    def save(self, path: str) -> None:
        """Write a `.pt2` that `capture` and `torch.export.load` read; atomic, provenance included."""
        from graphopt.capture.write import save_program

        save_program(self, path)

    def to_onnx(self, path: str) -> None:
        """Write an `.onnx` with the program's input and output names and its dynamic axes."""
        from graphopt.capture.write import save_onnx

        save_onnx(self, path)


def copy_module(module: GraphModule) -> GraphModule:
    """Copy the graph and those of sub-graphs; tensors and other attributes are shared."""
    graph = Graph()
    values: dict[Node, Node] = {}
    result = graph.graph_copy(module.graph, values)
    output = graph.output(result)
    (original,) = (node for node in module.graph.nodes if node.op == "output")
    output.meta = dict(original.meta)
    copied = GraphModule(module, graph, class_name=type(module).__name__)
    for name, child in module.named_children():
        setattr(copied, name, copy_module(child) if isinstance(child, GraphModule) else child)
    copied.meta = dict(module.meta)
    return copied


def get_attribute(module: torch.nn.Module, target: str) -> Any:
    """The object a `get_attr` node with this dotted target reads."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def provenance(node: Node) -> Mapping[str, Any]:
    """What made the node: {"rule": ..., "from": [names of original nodes]}; empty for captured nodes."""
    custom = node.meta.get("custom") or {}
    value: Mapping[str, Any] = custom.get(PROVENANCE) or {}
    return value
