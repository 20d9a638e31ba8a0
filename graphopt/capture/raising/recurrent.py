"""Recurrent layers as graphopt:: operators whose weights are tensors of the program and whose initial states are not
zeros that the graph makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from graphopt.capture.normal_form import remove_dead
from graphopt.capture.recurrent import OVERLOADS, PACKED, PACKED_REFUSED, layers
from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Builder, Edit, keep_read_attributes
from graphopt.errors import CaptureError
from graphopt.matcher import parameter_names
from graphopt.program import Program, get_attribute, set_attribute
from graphopt.propagate import fake_constant, find_mode

aten = torch.ops.aten
_LAYERS = frozenset(getattr(torch.ops.graphopt, kind).default for kind in ("rnn", "gru", "lstm"))
_WEIGHTS, _STATES = ("w", "r", "b", "p"), ("initial_h", "initial_c")
_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
_FULL = (aten.full.default, aten.full_like.default, aten.new_full.default)
_PARTS = (aten.slice.Tensor, aten.select.int, aten.expand.default, aten.view.default, aten.clone.default)


@dataclass(frozen=True)
class RaiseRecurrent(Pass):
    """ATen's recurrent layers, which programs exported elsewhere have."""

    name: ClassVar[str] = "raising"

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Edit(program, context, self.name)
        for editor in edit.graphs():
            for node in editor.nodes():
                if node.target in PACKED:
                    raise CaptureError(PACKED_REFUSED)
                if node.target not in OVERLOADS:
                    continue
                items: dict[Any, Node] = {item.args[1]: item for item in node.users}

                def build(builder: Builder, node: Node = node, places: tuple[Any, ...] = tuple(items)) -> list[Any]:
                    results = layers(OVERLOADS[node.target], *map(builder.proxy_of, node.args))
                    return [results[place] for place in places]

                editor.replace("recurrent", list(items.values()), build, inner=(node,), at=node)
        return edit.finish()


def settled(program: Program) -> Program:
    """The program with weights of recurrent layers that are computed from others held instead, and without zero states.

    A weight that is put together has the name of the first one in it, where nothing else reads that.
    """
    if not any(node.target in _LAYERS for node in program.nodes()):
        return program
    program = program.copy()
    held: dict[Node, torch.Tensor] = {}
    for _, module in program.graphs():
        for node in module.graph.nodes:
            if node.target in _LAYERS:
                _without_zeros(module, node)
                held.update(_hold_weights(module, node))
        remove_dead(module.graph)
        _name(module, held)
    keep_read_attributes(program.graph_module)
    for _, module in program.graphs():
        module.graph.lint()
        module.recompile()
    return program


def _arguments(node: Node, names: tuple[str, ...]) -> Iterator[tuple[int, Node]]:
    for place, name in enumerate(parameter_names(node.target)):  # type: ignore[arg-type]
        if name in names and place < len(node.args) and isinstance(node.args[place], Node):
            yield place, node.args[place]  # type: ignore[misc]


def _without_zeros(module: GraphModule, node: Node) -> None:
    for place, state in list(_arguments(node, _STATES)):
        if _is_zero(module, state):
            node.update_arg(place, None)


def _is_zero(module: GraphModule, node: Any) -> bool:
    if not isinstance(node, Node):
        return False
    if node.op == "get_attr":
        value = get_attribute(module, str(node.target))
        return not isinstance(value, torch.nn.Parameter) and not bool(value.any())
    if node.target in _FULL:
        return bool(node.args[-1] == 0)
    return node.target in _ZEROS or (node.target in _PARTS and _is_zero(module, node.args[0]))


def _hold_weights(module: GraphModule, layer: Node) -> Mapping[Node, torch.Tensor]:
    """Reads of new attributes in place of weights that are computed from attributes alone, with their values."""
    found: dict[Node, torch.Tensor] = {}
    for place, weight in list(_arguments(layer, _WEIGHTS)):
        leaves: list[Node] = []
        if weight.op == "get_attr" or not _constant(weight, leaves):
            continue
        with torch.no_grad():
            value = _value(module, weight).contiguous().clone()
        trainable = any(isinstance(get_attribute(module, str(leaf.target)), torch.nn.Parameter) for leaf in leaves)
        with module.graph.inserting_before(layer):
            read = module.graph.create_node("get_attr", str(leaves[0].target), name=leaves[0].name)
        read.meta = {**leaves[0].meta, "val": fake_constant(find_mode(module), value)}
        layer.update_arg(place, read)
        found[read] = torch.nn.Parameter(value, requires_grad=False) if trainable else value
    return found


def _constant(node: Node, leaves: list[Node]) -> bool:
    """Whether it is computed from attributes alone, which are added to `leaves`."""
    if node.op == "get_attr":
        leaves.append(node)
        return True
    is_call = node.op == "call_function" and bool(node.all_input_nodes)
    return is_call and all(_constant(source, leaves) for source in node.all_input_nodes)


def _value(module: GraphModule, node: Node) -> Any:
    if node.op == "get_attr":
        return get_attribute(module, str(node.target))
    args, kwargs = map_arg((node.args, node.kwargs), lambda source: _value(module, source))
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _name(module: GraphModule, held: Mapping[Node, torch.Tensor]) -> None:
    """Make the values attributes, in the place of those that nothing reads any more."""
    reads = module.graph.find_nodes(op="get_attr")
    taken = {str(node.target) for node in reads if node not in held}
    for node in [node for node in reads if node in held]:
        name = str(node.target)
        while name in taken:
            name += "_"
        taken.add(name)
        node.target = name
        set_attribute(module, name, held[node])
