"""The table of what a well-formed program is, checked after every pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node
from torch.utils import _pytree

from graphopt.checking.exactness import same
from graphopt.program import Program, State, get_attribute, placeholder_name

Graphs = tuple[tuple[str, GraphModule], ...]


def find_defect(before: Program, after: Program) -> str | None:
    """The first sentence of the table that `after` breaks, or None."""
    return next((defect for check in STRUCTURE for defect in check(before, after)), None)


def same_interface(before: Program, after: Program) -> Iterator[str]:
    """Inputs, outputs, state and sizes are what callers hold on to: no pass changes them, but for adding exits."""
    outputs = "outputs" if before.exits == after.exits else "answers"
    for part in ("inputs", outputs, "sizes", "symbols"):
        if getattr(before, part) != getattr(after, part):
            yield f"its {part} are {getattr(after, part)} instead of {getattr(before, part)}"
    if _elements(before) != _elements(after):
        yield "its bound inputs have changed"
    if [item.spec for item in before.state] != [item.spec for item in after.state]:
        yield "its state has changed"
    elif not all(_identical(*pair) for pair in zip(before.state, after.state, strict=True)):
        yield "the initial value of its state has changed"


def _elements(program: Program) -> dict[str, object]:
    return {name: value.tolist() for name, value in program.bound.items()}


def _identical(before: State, after: State) -> bool:
    old, new = before.initial, after.initial
    return old is new or ((old.dtype, old.shape) == (new.dtype, new.shape) and same(old, new))


def placeholders_are_inputs(before: Program, after: Program) -> Iterator[str]:
    """Placeholders have the names of the inputs, then of the state, in order."""
    specs = [*after.inputs, *(item.spec for item in after.state)]
    wanted = [placeholder_name(spec.name) for spec in specs]
    found = [str(node.target) for node in after.graph_module.graph.nodes if node.op == "placeholder"]
    if wanted != found:
        yield f"its placeholders are {found} instead of {wanted}"


def output_is_flat(before: Program, after: Program) -> Iterator[str]:
    """The output node holds one flat tuple of nodes, as long as outputs and state together."""
    (output,) = (node for node in after.graph_module.graph.nodes if node.op == "output")
    values = output.args[0]
    count = len(after.outputs) + len(after.state)
    if not isinstance(values, (tuple, list)) or not all(isinstance(value, Node) for value in values):
        yield f"its output is no flat tuple of nodes but {values}"
    elif len(values) != count:
        yield f"it returns {len(values)} values instead of {count}"
    else:
        for spec, value in zip(after.outputs, values, strict=False):
            assert isinstance(value, Node)
            fake = value.meta["val"]
            if not isinstance(fake, torch.Tensor):
                yield f"output {spec.name} is {fake}, which is no tensor"
                continue
            dtype, rank = fake.dtype, fake.dim()
            if (dtype, rank) != (spec.dtype, len(spec.shape)):
                yield f"output {spec.name} is {dtype} with {rank} axes instead of {spec.dtype} with {len(spec.shape)}"


def graphs_are_valid(before: Program, after: Program) -> Iterator[str]:
    """fx's own rules: names are unique, values come before their uses."""
    for path, module in after.graphs():
        try:
            module.graph.lint()
        except (RuntimeError, ValueError) as error:
            yield f"graph {path or 'main'} is invalid: {str(error).splitlines()[0]}"


def nodes_have_values(before: Program, after: Program) -> Iterator[str]:
    """Every value has its fake in `meta["val"]`, and a weight's fake has the weight's type and shape."""
    for module, node in _nodes(after):
        if node.op == "output":
            continue
        value = _attribute(module, node) if node.op == "get_attr" else None
        if isinstance(value, GraphModule):
            continue
        fake = node.meta.get("val")
        if fake is None:
            yield f"node {node.name} has no value in its meta"
        elif isinstance(value, torch.Tensor) and (fake.dtype, fake.shape) != (value.dtype, value.shape):
            found, noted = f"{value.dtype}{list(value.shape)}", f"{fake.dtype}{list(fake.shape)}"
            yield f"node {node.name} reads {found} but is {noted} in meta"


def attributes_exist(before: Program, after: Program) -> Iterator[str]:
    """Every `get_attr` reads a tensor or a sub-graph of its module."""
    for module, node in _nodes(after):
        if node.op == "get_attr" and not isinstance(_attribute(module, node), (torch.Tensor, GraphModule)):
            yield f"node {node.name} reads {node.target}, which is no tensor and no sub-graph"


def calls_are_functional(before: Program, after: Program) -> Iterator[str]:
    """Calls are ATen overloads that write to no input, control flow, or Python operators on sizes."""
    for _, node in _nodes(after):
        if node.op in ("call_method", "call_module"):
            yield f"node {node.name} is a {node.op} of {node.target}; write the ATen overload"
        elif node.op == "call_function":
            yield from _defects_of_call(node)


def _defects_of_call(node: Node) -> Iterator[str]:
    if isinstance(node.target, OpOverload):
        if node.target._schema.is_mutable:
            yield f"node {node.name} ({node.target}) writes to its input; write the functional overload"
    elif isinstance(node.target, HigherOrderOperator) or node.target is operator.getitem:
        return
    elif any(isinstance(leaf, torch.Tensor) for leaf in _pytree.tree_leaves(node.meta.get("val"))):
        yield f"node {node.name} calls {node.target} on tensors; write the ATen overload"


STRUCTURE: tuple[Callable[[Program, Program], Iterator[str]], ...] = (
    same_interface,
    placeholders_are_inputs,
    graphs_are_valid,
    attributes_exist,
    nodes_have_values,
    calls_are_functional,
    output_is_flat,
)


def _nodes(program: Program) -> Iterator[tuple[GraphModule, Node]]:
    for _, module in program.graphs():
        for node in module.graph.nodes:
            yield module, node


def _attribute(module: GraphModule, node: Node) -> object:
    try:
        return get_attribute(module, str(node.target))
    except AttributeError:
        return None
