"""Program: a torch.fx graph in normal form, with named inputs and outputs, sizes, state and provenance.

Normal form is what `torch.export.export(m).run_decompositions({})` gives, unlifted: functional ATen calls, composite
operators kept whole, one attribute per storage, sub-graphs of `torch.cond` as child modules. Placeholders are the
inputs, then the state; the output node holds one flat tuple, the outputs, then the new state.
"""

from __future__ import annotations

import ast
import keyword
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from graphopt.errors import BoundInputError, FeedError

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
class Exits:
    """That a program may answer before its end.

    `answers` counts its first outputs, those of the model that it was made of; the next output tells which exit each
    sample took (int64 [samples], counted from 0; `len(thresholds)` is the end), and after it come what the form
    `multi-output` adds. An exit is taken where the `policy`'s confidence is at least its threshold. `macs` are
    multiply-accumulates up to each exit and to the end, at the sizes of the examples, and `shares` how many of the
    samples on which the thresholds were chosen went there.
    """

    form: Literal["cond", "staged", "multi-output"]
    policy: str
    thresholds: tuple[float, ...]
    answers: int
    macs: tuple[int, ...]
    shares: tuple[float, ...]


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
    history: tuple[Mapping[str, Any], ...] = ()  # passes run so far: JSON values, name, options and measured effect
    metadata: Mapping[str, str] = field(default_factory=dict)  # what the .onnx it came from says of itself
    bound: Mapping[str, torch.Tensor] = field(default_factory=dict)  # input -> its only value, for which the graph is
    notes: tuple[str, ...] = ()  # what the source fixes or limits, each a sentence
    exits: Exits | None = None

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run from the initial state without gradients; returns the outputs, not the new state.

        Raises FeedError when an input's number, dtype, rank or size does not fit its spec, and its kind BoundInputError
        when a bound input has another value.
        """
        return self.step(inputs)[0]

    def step(
        self, inputs: tuple[torch.Tensor, ...], state: tuple[torch.Tensor, ...] | None = None
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Run once from `state` (default: the initial one); returns (outputs, new state). Raises FeedError."""
        self.bind(inputs)
        state = tuple(item.initial for item in self.state) if state is None else state
        with torch.no_grad():
            results = tuple(self.graph_module(*inputs, *state))
        count = len(self.outputs)
        return results[:count], results[count:]

    def bind(self, inputs: Sequence[torch.Tensor]) -> dict[str, int]:
        """The value of every size that these inputs have.

        Raises FeedError when one does not fit its spec, BoundInputError when it has not the value that it is bound to;
        tensors on the meta device stand for any values.
        """
        if len(inputs) != len(self.inputs):
            names = ", ".join(spec.name for spec in self.inputs)
            raise FeedError(f"{self.name} takes {len(self.inputs)} inputs ({names}), got {len(inputs)}")
        bound: dict[str, int] = {}
        for spec, value in zip(self.inputs, inputs, strict=True):
            _bind_input(spec, value, self.sizes, bound)
        for spec, value in zip(self.inputs, inputs, strict=True):
            _check_derived(spec, value, bound)
            if spec.name in self.bound and not value.is_meta and not torch.equal(self.bound[spec.name], value.cpu()):
                elements = (tensor.reshape(-1).tolist() for tensor in (self.bound[spec.name], value))
                raise BoundInputError.of(spec.name, *elements)
        return bound

    @property
    def answers(self) -> tuple[TensorSpec, ...]:
        """The outputs without what is told of exits."""
        return self.outputs if self.exits is None else self.outputs[: self.exits.answers]

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

    def fix_sizes(self, **sizes: int) -> Program:
        """The program for these values of some of its sizes: `program.fix_sizes(tokens=1)`; tensors are shared.

        Raises UnknownNameError for a size that it has not, UsageError for a value that the size cannot have.
        """
        from graphopt.fixed_sizes import fix_sizes

        return fix_sizes(self, sizes)

    def save(self, path: str) -> None:
        """Write a `.pt2` that `capture` and `torch.export.load` read; atomic, provenance included."""
        from graphopt.capture.write import save_program

        save_program(self, path)

    def to_onnx(self, path: str) -> None:
        """Write an `.onnx` with the program's input and output names and its dynamic axes."""
        from graphopt.capture.write import save_onnx

        save_onnx(self, path)


def _bind_input(spec: TensorSpec, value: torch.Tensor, sizes: Mapping[str, SizeRange], bound: dict[str, int]) -> None:
    if value.dtype != spec.dtype:
        raise FeedError(f"input {spec.name!r} must be {spec.dtype}, got {value.dtype}")
    if value.dim() != len(spec.shape):
        raise FeedError(f"input {spec.name!r} must have {len(spec.shape)} axes {list(spec.shape)}, got {value.dim()}")
    for axis, (wanted, size) in enumerate(zip(spec.shape, value.shape, strict=True)):
        if isinstance(wanted, int):
            if wanted != size:
                raise FeedError(f"axis {axis} of input {spec.name!r} must be {wanted}, got {size}")
        elif wanted in sizes:
            bounds = sizes[wanted]
            if size < bounds.low or (bounds.high is not None and size > bounds.high):
                top = "and up" if bounds.high is None else f"to {bounds.high}"
                raise FeedError(f"axis {axis} of input {spec.name!r} ({wanted}) must be {bounds.low} {top}, got {size}")
            if bound.setdefault(wanted, size) != size:
                raise FeedError(
                    f"axis {axis} of input {spec.name!r} is {size}, but {wanted} is {bound[wanted]} in another input"
                )


def _check_derived(spec: TensorSpec, value: torch.Tensor, bound: Mapping[str, int]) -> None:
    for axis, (wanted, size) in enumerate(zip(spec.shape, value.shape, strict=True)):
        if isinstance(wanted, str) and wanted not in bound and (expected := evaluate_size(wanted, bound)) != size:
            raise FeedError(f"axis {axis} of input {spec.name!r} must be {wanted} = {expected}, got {size}")


_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def evaluate_size(size: int | str, sizes: Mapping[str, int]) -> int:
    """The value of a size expression such as "2*seq + 1" for given sizes; never runs code."""
    return size if isinstance(size, int) else _evaluate(ast.parse(size, mode="eval").body, sizes)


def _evaluate(node: ast.expr, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name) if name in sizes:
            return sizes[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_evaluate(left, sizes), _evaluate(right, sizes))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, sizes)
        case ast.Call(func=ast.Name(id="max" | "min" as function), args=arguments):
            values = [_evaluate(argument, sizes) for argument in arguments]
            return max(values) if function == "max" else min(values)
    raise FeedError(f"size {ast.unparse(node)!r} cannot be computed from {', '.join(sizes) or 'no sizes'}")


def full_name(path: str, name: str) -> str:
    """The name, unique in the program, of a node or attribute of the graph at `path`: "true_graph_0.linear"."""
    return f"{path}.{name}" if path else name


def placeholder_name(name: str) -> str:
    """The name of the graph's placeholder for an input or state of this name ("cache.0" -> "cache_0")."""
    text = re.sub(r"\W", "_", name, flags=re.ASCII)
    usable = text.isidentifier() and not keyword.iskeyword(text) and text != "self"
    return text if usable else f"_{text}"


def copy_module(module: GraphModule) -> GraphModule:
    """Copy the graph and those of sub-graphs; tensors are shared, containers of attributes are not.

    The copy is compiled to Python when it is first called: most copies are edited before that.
    """
    graph = Graph()
    values: dict[Node, Node] = {}
    result = graph.graph_copy(module.graph, values)
    output = graph.output(result)
    (original,) = (node for node in module.graph.nodes if node.op == "output")
    output.meta = dict(original.meta)
    copied = _LazyGraphModule(module, graph, class_name=type(module).__name__)
    for target in {node.target for node in module.graph.nodes if node.op in ("get_attr", "call_module")}:
        child = get_attribute(module, target)
        if isinstance(child, GraphModule):
            set_attribute(copied, target, copy_module(child))
    copied.meta = dict(module.meta)
    return copied


def get_attribute(module: torch.nn.Module, target: str) -> Any:
    """The object a `get_attr` node with this dotted target reads."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def has_attribute(module: torch.nn.Module, target: str) -> bool:
    """Whether `get_attribute` would find something."""
    value: Any = module
    for part in target.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def set_attribute(module: torch.nn.Module, target: str, value: torch.Tensor | torch.nn.Module) -> None:
    """Make `value` what a `get_attr` node with this dotted target reads; containers on the way are created."""
    *path, last = target.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        if last in module._parameters:
            del module._parameters[last]
        module.register_buffer(last, value)
    else:
        setattr(module, last, value)


def provenance(node: Node) -> Mapping[str, Any]:
    """What made the node: {"rule": ..., "from": [names of original nodes]}; empty for captured nodes."""
    custom = node.meta.get("custom") or {}
    value: Mapping[str, Any] = custom.get(PROVENANCE) or {}
    return value
