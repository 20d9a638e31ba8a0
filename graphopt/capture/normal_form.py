"""From a decomposed ExportedProgram to a graph in normal form; the ExportedProgram is only read."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, SymIntArgument, TensorArgument
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError
from graphopt.program import get_attribute, has_attribute, placeholder_name, set_attribute

NAME = "graphopt_name"  # in the custom metadata of a file's nodes, which reading renames
KEPT_META = ("val", "custom", "stack_trace", "nn_module_stack")
_GUARD = re.compile(r"_assert_|sym_constrain_range|_assert$|_check")
_SPELLINGS: dict[Any, Any] = {torch.ops.aten._unsafe_view.default: torch.ops.aten.view.default}  # where nothing trains
_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)


@dataclass(frozen=True)
class Flat:
    """A graph in normal form; `outputs` and `state` name its output values in order."""

    graph_module: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    state: Mapping[str, torch.Tensor]


def flatten(exported: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str]) -> Flat:
    """Unlift a decomposed program: weights become attributes, mutated buffers become state, guards go.

    `input_names` names every user input (constants included), `output_names` every user output.
    """
    return _Flattener(exported).run(input_names, output_names)


class _Flattener:
    def __init__(self, exported: ExportedProgram) -> None:
        self.exported = exported
        self.signature = exported.graph_signature
        self.root = torch.nn.Module()
        self.graph = Graph()
        self.values: dict[Node, Node] = {}
        self.targets: dict[tuple[Any, ...], str] = {}  # storage, offset, sizes, strides -> attribute
        self.placeholders = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
        self.nodes = {n.name: n for n in exported.graph.nodes}

    def run(self, input_names: Sequence[str], output_names: Sequence[str]) -> Flat:
        inputs = self._inputs(input_names)
        state = self._state(inputs)
        self._weights()
        for node in self.exported.graph.nodes:
            if node.op == "get_attr":
                self._attribute(node)
            elif node.op == "call_function" and not is_guard(node):
                self.values[node] = copy_node(self.graph, node, self.values)
        results, outputs = self._results(output_names)
        node = self.graph.output((*results, *self._new_state()))
        node.meta["val"] = tuple(result.meta["val"] for result in node.args[0])
        remove_dead(self.graph)
        module = GraphModule(self.root, self.graph, class_name="Model")
        for target in {n.target for n in self.graph.nodes if n.op == "get_attr"}:
            child = get_attribute(self.root, target)
            if isinstance(child, GraphModule):
                set_attribute(module, target, child)
        return Flat(module, tuple(inputs), tuple(outputs), state)

    def _inputs(self, names: Sequence[str]) -> list[str]:
        specs = [spec for spec in self.signature.input_specs if spec.kind == InputKind.USER_INPUT]
        if len(specs) != len(names):
            raise CaptureError(f"the exported program names {len(names)} inputs but its graph has {len(specs)}")
        kept = []
        for spec, name in zip(specs, names, strict=True):
            node = self.placeholders[spec.arg.name]
            if isinstance(spec.arg, SymIntArgument):
                raise CaptureError(f"input {name!r} is a dynamic integer; pass it as a tensor of shape ()")
            if isinstance(spec.arg, ConstantArgument):
                if node.users:
                    raise CaptureError(f"input {name!r} is no tensor but its value is used; pass it as a tensor")
                continue
            self.values[node] = self._placeholder(name, node)
            kept.append(name)
        duplicates = sorted(name for name, count in Counter(kept).items() if count > 1)
        if duplicates:
            raise CaptureError(f"two inputs are called {duplicates[0]!r}; give forward's arguments different names")
        return kept

    def _placeholder(self, name: str, source: Node) -> Node:
        node = self.graph.placeholder(placeholder_name(name))
        node.meta = kept_meta(source)
        return node

    def _state(self, inputs: Sequence[str]) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = {}
        mutated = self._mutated()
        taken = set(map(placeholder_name, inputs))
        for spec in self.signature.input_specs:
            if spec.kind in _WEIGHTS and spec.target in mutated:
                name = placeholder_name(str(spec.target))
                while name in taken or name in state:
                    name += "_state"
                state[name] = self._tensor(str(spec.target)).detach().clone()
                node = self.placeholders[spec.arg.name]
                self.values[node] = self._placeholder(name, node)
        return state

    def _mutated(self) -> set[str]:
        return {str(spec.target) for spec in self.signature.output_specs if spec.kind in _MUTATIONS}

    def _tensor(self, target: str) -> torch.Tensor:
        found = self.exported.state_dict.get(target)
        value: Any = self.exported.constants.get(target) if found is None else found
        if not isinstance(value, torch.Tensor):
            raise CaptureError(f"{target!r} is a {type(value).__name__}; only tensors can be part of a model")
        return value

    def _weights(self) -> None:
        mutated = self._mutated()
        written = {self._tensor(name).untyped_storage()._cdata for name in mutated}
        for spec in self.signature.input_specs:
            if spec.kind in (InputKind.CUSTOM_OBJ, InputKind.TOKEN):
                name = spec.target or spec.arg.name
                raise CaptureError(f"the model holds a custom object ({name}); use tensors only")
            if spec.kind not in _WEIGHTS or spec.target in mutated:
                continue
            node = self.placeholders[spec.arg.name]
            value = self._tensor(str(spec.target))
            self.targets.setdefault(
                same_storage_view(value), str(spec.target)
            )  # the first of several names is the one used
            if not node.users:
                continue
            if value.untyped_storage()._cdata in written:
                raise CaptureError(
                    f"{spec.target!r} shares memory with a buffer that forward writes to; make it a copy (clone())"
                )
            self.values[node] = self._weight(value, node)

    def _weight(self, value: torch.Tensor, source: Node) -> Node:
        target = self.targets[same_storage_view(value)]
        plain = value.detach()
        if isinstance(value, torch.nn.Parameter):
            plain = torch.nn.Parameter(plain, requires_grad=False)
        if not has_attribute(self.root, target):
            set_attribute(self.root, target, plain)
        node = self.graph.create_node("get_attr", target, name=placeholder_name(target))
        node.meta = kept_meta(source)
        return node

    def _attribute(self, node: Node) -> None:
        target = str(node.target)
        value = get_attribute(self.exported.graph_module, target)
        if isinstance(value, GraphModule):
            value = copy_subgraph(value)
        set_attribute(self.root, target, value)
        self.values[node] = copy_node(self.graph, node, self.values)

    def _results(self, names: Sequence[str]) -> tuple[list[Node], list[str]]:
        specs = [spec for spec in self.signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
        if len(specs) != len(names):
            raise CaptureError(f"the exported program names {len(names)} outputs but its graph has {len(specs)}")
        results, kept = [], []
        for spec, name in zip(specs, names, strict=True):
            node = self._result(spec.arg, name)
            if node is not None:
                results.append(node)
                kept.append(name)
        if not results:
            raise CaptureError("the model returns no tensor; return a tensor, or a tuple, list or dict of tensors")
        return results, kept

    def _result(self, argument: Any, name: str) -> Node | None:
        if isinstance(argument, TensorArgument):
            return self.values[self.nodes[argument.name]]
        if isinstance(argument, SymIntArgument):
            size = self.values[self.nodes[argument.name]]
            node = self.graph.call_function(torch.ops.aten.scalar_tensor.default, (size,), {"dtype": torch.int64})
            with _fake_mode(self.exported):
                node.meta["val"] = torch.empty((), dtype=torch.int64)
            return node
        value = getattr(argument, "value", argument)
        if value is None:
            return None
        if not isinstance(value, (bool, int, float)):
            raise CaptureError(f"output {name!r} is a {type(value).__name__}; return tensors and numbers only")
        target = f"constant_{placeholder_name(name)}"
        set_attribute(self.root, target, torch.tensor(value))
        node = self.graph.create_node("get_attr", target)
        with _fake_mode(self.exported):
            node.meta["val"] = torch.empty((), dtype=torch.tensor(value).dtype)
        return node

    def _new_state(self) -> list[Node]:
        written = {
            str(spec.target): self.values[self.nodes[spec.arg.name]]
            for spec in self.signature.output_specs
            if spec.kind in _MUTATIONS
        }
        order = [str(s.target) for s in self.signature.input_specs if s.kind in _WEIGHTS and s.target in written]
        return [written[target] for target in order]


def same_storage_view(value: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same view of the same storage."""
    storage = value.untyped_storage()._cdata
    return storage, value.storage_offset(), tuple(value.shape), value.stride(), value.dtype


def copy_node(graph: Graph, node: Node, values: Mapping[Node, Node]) -> Node:
    """Copy a node into `graph` with the metadata that programs keep, and the name that a file says it had."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda argument: values[argument])
    target = _SPELLINGS.get(node.target, node.target)
    copied = graph.create_node(node.op, target, args, kwargs, noted_name(node) or node.name, node.type)
    copied.meta = kept_meta(node)
    if copied.op == "get_attr":
        copied.meta.pop("val", None)
    return copied


def note_names(module: GraphModule) -> None:
    """Write the name of every call into its metadata: reading a file traces it anew, and gives other names.

    Tracing gives an item of a result the metadata of the call, so the names of items are noted there too.
    """
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            items = {str(user.args[1]): user.name for user in node.users if user.target is operator.getitem}
            note = {"name": node.name, "operator": str(node.target), "items": items}
            node.meta["custom"] = {**(node.meta.get("custom") or {}), NAME: note}


def noted_name(node: Node) -> str | None:
    """What `note_names` wrote of this node, as far as it is a name."""
    is_item = node.target is operator.getitem
    note = ((node.args[0] if is_item else node).meta.get("custom") or {}).get(NAME)  # type: ignore[union-attr]
    if not isinstance(note, dict):
        return None
    if is_item:
        items = note.get("items")
        name = items.get(str(node.args[1])) if isinstance(items, dict) else None
    else:
        name = note.get("name") if note.get("operator") == str(node.target) else None
    return name if isinstance(name, str) and name.isidentifier() else None


def kept_meta(node: Node) -> dict[str, Any]:
    """The metadata of a node that programs keep, its fake tensors detached from any gradient."""
    meta = {key: node.meta[key] for key in KEPT_META if node.meta.get(key) is not None}
    if "val" in meta:
        meta["val"] = pytree.tree_map_only(torch.Tensor, _without_gradient, meta["val"])
    if NAME in meta.get("custom", ()):
        meta["custom"] = {key: value for key, value in meta["custom"].items() if key != NAME}
        if not meta["custom"]:
            del meta["custom"]
    return meta


def _without_gradient(value: Any) -> Any:
    if not value.requires_grad:
        return value
    with torch.no_grad(), value.fake_mode:
        return value.detach()


def copy_subgraph(module: GraphModule) -> GraphModule:
    """A sub-graph in normal form: guards and dead code gone, a flat call, children copied likewise."""
    root, graph = torch.nn.Module(), Graph()
    values: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if is_guard(node):
            continue
        if node.op == "get_attr":
            value = get_attribute(module, str(node.target))
            set_attribute(root, str(node.target), copy_subgraph(value) if isinstance(value, GraphModule) else value)
        values[node] = copy_node(graph, node, values)
    output = next(iter(reversed(graph.nodes)))
    output.meta["val"] = pytree.tree_map_only(Node, lambda node: node.meta["val"], output.args[0])
    remove_dead(graph)
    copied = GraphModule(root, graph, class_name="Branch")
    for node in graph.find_nodes(op="get_attr"):
        child = get_attribute(root, str(node.target))
        if isinstance(child, GraphModule):
            set_attribute(copied, str(node.target), child)
    return copied


def is_guard(node: Node) -> bool:
    """Whether a node only checks sizes or metadata; nothing can use its result."""
    if node.op != "call_function" or node.users:
        return False
    packet = getattr(node.target, "overloadpacket", node.target)
    return _GUARD.search(getattr(packet, "__name__", str(packet))) is not None


def remove_dead(graph: Graph) -> None:
    """Remove nodes without users; normal form has no operator with a side effect."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _fake_mode(exported: ExportedProgram) -> Any:
    return fake_mode(exported.graph_module)


def fake_mode(module: GraphModule) -> Any:
    """The one FakeTensorMode under which the values of all nodes were made."""
    for node in module.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, torch._subclasses.FakeTensor):
                return value.fake_mode
    raise CaptureError("the graph has no tensors")
