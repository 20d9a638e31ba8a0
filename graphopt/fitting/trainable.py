"""Which weights are trained, and the copy of the graph that they are trained in."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx import GraphModule, Node
from torch.utils import _pytree

from graphopt.errors import UnknownNameError, UsageError
from graphopt.program import Program, full_name, get_attribute, set_attribute

Estimators = Mapping[str, Callable[..., Tensor]]

_aten = torch.ops.aten
_FLAT = frozenset(  # the slope is zero wherever there is one
    {
        _aten.round.default,
        _aten.round.decimals,
        _aten.floor.default,
        _aten.ceil.default,
        _aten.trunc.default,
        _aten.fix.default,
        _aten.sign.default,
        _aten.sgn.default,
        _aten.heaviside.default,
        _aten.detach.default,
    }
)
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Weight:
    """A tensor that is trained: all its names in the program (one, unless layers share it) and its first value."""

    names: tuple[str, ...]
    initial: Tensor

    @property
    def name(self) -> str:
        return self.names[0]

    def master(self) -> Tensor:
        """What the optimizer changes: a copy, in float32 where the weight has fewer bits."""
        dtype = torch.float32 if self.initial.dtype in _HALF else self.initial.dtype
        return self.initial.detach().to(dtype, copy=True).requires_grad_()


def choose_weights(program: Program, train: Sequence[str]) -> tuple[Weight, ...]:
    """The weights that names and patterns mean, in the program's order.

    A pattern (`*`, `?`, `[...]`) means parameters; a buffer is trained only under its own name. Raises UsageError and
    UnknownNameError.
    """
    if isinstance(train, str):
        raise UsageError(f"train={train!r} must be a sequence of names or patterns: train=[{train!r}]")
    tensors = dict(_named_tensors(program))
    parameters = [name for name, value in tensors.items() if isinstance(value, torch.nn.Parameter)]
    chosen: set[str] = set()
    for entry in train:
        found = [entry] if entry in tensors else fnmatch.filter(parameters, entry)
        if not found:
            raise UnknownNameError("weight", entry, tensors)
        chosen.update(found)
    if not chosen:
        raise UsageError("train is empty; name the weights to train, such as train=['*.weight']")
    groups: dict[int, list[str]] = {}
    for name, value in tensors.items():
        groups.setdefault(id(value), []).append(name)
    weights = [Weight(tuple(names), tensors[names[0]]) for names in groups.values() if chosen & set(names)]
    for weight in weights:
        if not weight.initial.is_floating_point():
            raise UsageError(
                f"weight {weight.name!r} is {weight.initial.dtype}; only floating-point weights are trained"
            )
    return tuple(weights)


def _named_tensors(program: Program) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that some graph reads, by its name from the program's module."""
    for path, module in program.graphs():
        for target in dict.fromkeys(str(node.target) for node in module.graph.find_nodes(op="get_attr")):
            value = get_attribute(module, target)
            if isinstance(value, Tensor):
                yield full_name(path, target), value


class TrainingGraph:
    """A private copy of a program's graph whose weights are arguments; gradients flow through every branch taken."""

    def __init__(self, program: Program, weights: tuple[Weight, ...], estimators: Estimators) -> None:
        self.program = program
        self.weights = weights
        copy = program.copy()
        self.module = copy.graph_module
        self.has_branches = False
        for _, module in copy.graphs():
            for node in module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
                node.target = _take_branch
                self.has_branches = True
        _put_estimators(copy, estimators)
        for _, module in copy.graphs():
            module.recompile()
        self.state = tuple(item.initial for item in program.state)

    def run(self, masters: Sequence[Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs from the initial state."""
        values = {
            name: master.to(weight.initial.dtype)
            for weight, master in zip(self.weights, masters, strict=True)
            for name in weight.names
        }
        results: tuple[Tensor, ...] = functional_call(self.module, values, (*inputs, *self.state))
        return tuple(results)[: len(self.program.outputs)]


def _take_branch(predicate: Any, when_true: GraphModule, when_false: GraphModule, operands: Sequence[Any]) -> Any:
    """What `torch.cond` computes, without tracing both branches for every run."""
    return (when_true if bool(predicate) else when_false)(*operands)


def _put_estimators(program: Program, estimators: Estimators) -> None:
    nodes = {
        full_name(path, node.name): node
        for path, module in program.graphs()
        for node in module.graph.nodes
        if node.op == "call_function"
    }
    for name, estimator in estimators.items():
        if name not in nodes:
            raise UnknownNameError("node", name, nodes)
        nodes[name].target = _named(estimator)


def _named(estimator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The estimator as a function of its own: fx writes a call by the function's name, and partials have none."""

    def estimate(*args: Any, **kwargs: Any) -> Tensor:
        return estimator(*args, **kwargs)

    return estimate


def with_weights(program: Program, weights: tuple[Weight, ...], values: Sequence[Tensor]) -> Program:
    """A program with new values for `weights`; everything else is shared."""
    result = program.copy()
    for weight, value in zip(weights, values, strict=True):
        tensor: Tensor = value.detach().to(weight.initial.dtype, copy=True)
        if isinstance(weight.initial, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor, requires_grad=weight.initial.requires_grad)
        for name in weight.names:
            set_attribute(result.graph_module, name, tensor)
    return result


def check_reach(program: Program, weights: tuple[Weight, ...], estimators: Estimators) -> None:
    """Raises UsageError for a weight whose gradient is zero whatever the data: nothing with a slope leads from it."""
    for weight in weights:
        stops: dict[str, None] = {}
        if not any(_reaches_output(path, node, estimators, stops) for path, node in _reads(program, weight)):
            reason = f"stopped by {', '.join(stops)}; give an estimator for it" if stops else "no output depends on it"
            raise UsageError(f"weight {weight.name!r} gets no gradient: {reason}")


def _reads(program: Program, weight: Weight) -> Iterator[tuple[str, Node]]:
    for path, module in program.graphs():
        for node in module.graph.find_nodes(op="get_attr"):
            if full_name(path, str(node.target)) in weight.names:
                yield path, node


def _reaches_output(path: str, start: Node, estimators: Estimators, stops: dict[str, None]) -> bool:
    pending, seen = [start], {start}
    while pending:
        for user in pending.pop().users:
            if user.op == "output":
                return True
            if user in seen:
                continue
            seen.add(user)
            name = full_name(path, user.name)
            if name in estimators or (_is_float(user) and user.target not in _FLAT):
                pending.append(user)
            else:
                stops[f"{name} ({user.target})"] = None
    return False


def _is_float(node: Node) -> bool:
    leaves = _pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
