"""Editing one private copy of a program: ask, build, propagate, replace, record.

A pass says what to put in place of which nodes; everything a rewrite owes to the rest of the graph happens here, and
an edit that the users of a value cannot take is undone and recorded as declined.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from graphopt.contract import Declined, NearMiss, PassContext, PassResult, Rewrite
from graphopt.effects import has_effect
from graphopt.errors import PropagationError
from graphopt.instance import Instance, record
from graphopt.program import PROVENANCE, Program, full_name, get_attribute, provenance
from graphopt.propagate import Evaluations, changes_downstream, fake_constant, find_mode

SYMBOL = re.compile(r"\b[su]\d+\b")
INHERITED = ("stack_trace", "nn_module_stack")


class Edit:
    """One run of a pass over a copy of `program`; `finish` returns the original where nothing was rewritten."""

    def __init__(self, program: Program, context: PassContext, name: str) -> None:
        self.original = program
        self.program = program.copy()
        self.context = context
        self.name = name
        self.rewrites: list[Rewrite] = []
        self.declined: list[Declined] = []
        self.near_misses: list[NearMiss] = []
        self.instances: list[Instance] = []
        self.notes: list[str] = []
        self.mode = find_mode(self.program.graph_module)
        self.evaluations = Evaluations(self.mode)
        self.sizes = size_names(program)
        self.callers = _conditions(self.program)

    def graphs(self) -> Iterator[GraphEditor]:
        """An editor for the main graph and for each sub-graph."""
        for path, module in self.program.graphs():
            yield GraphEditor(self, path, module)

    def finish(self) -> PassResult:
        """Drop attributes nobody reads, lint and recompile."""
        program = self.original
        if self.rewrites:
            program = self.program
            keep_read_attributes(program.graph_module)
            for _, module in program.graphs():
                _refresh_output(module)
                module.graph.lint()
                module.recompile()
        return PassResult(
            program,
            tuple(self.rewrites),
            tuple(self.declined),
            tuple(self.notes),
            tuple(self.near_misses),
            tuple(self.instances),
        )


class Builder(GraphAppendingTracer):
    """Appends nodes at the place of a rewrite and evaluates each at once; real tensors become attributes."""

    def __init__(self, editor: GraphEditor) -> None:
        super().__init__(editor.module.graph)
        self.editor = editor
        self.nodes: list[Node] = []
        self.added: list[str] = []

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A new call of an ATen overload."""
        return self.create_proxy("call_function", target, args, kwargs).node

    def repeat(self, node: Node, values: Mapping[Node, Node]) -> Node:
        """The same call as `node`, with other values in the place of those that it reads."""
        assert callable(node.target)
        args, kwargs = map_arg((node.args, node.kwargs), lambda item: values.get(item, item))
        return self.call(node.target, *args, **kwargs)

    def proxy_of(self, value: Any) -> Any:
        """`value` with its nodes as proxies, so that a rewrite may call ATen overloads on them."""
        if isinstance(value, Node):
            return Proxy(value, self)
        if isinstance(value, (list, tuple)):
            return type(value)(self.proxy_of(item) for item in value)
        return value

    def constant(self, tensor: torch.Tensor) -> Node:
        """What gives `tensor` here: an operand of the graph, or a read of what is made an attribute of its module."""
        if (operand := self.editor.operand_holding(tensor)) is not None:
            return operand
        name, is_new = self.editor.attribute_for(tensor)
        if is_new:
            self.added.append(name)
        node = self.graph.get_attr(name)
        node.meta["val"] = fake_constant(self.editor.edit.mode, get_attribute(self.editor.module, name))
        self.nodes.append(node)
        return node

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        self.nodes.append(node)
        node.meta["val"] = self.editor.edit.evaluations.of(node)
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            return self.constant(a)
        if isinstance(a, Node):
            return a
        return super().create_arg(a)

    def undo(self) -> None:
        """Take every new node and attribute out again."""
        for node in reversed(self.nodes):
            self.graph.erase_node(node)
        for name in self.added:
            self.editor.remove_attribute(name)


Build = Callable[[Builder], Sequence[Any]]


class GraphEditor:
    """Edits one graph of a program; nodes of a sub-graph are named "path.node" in ids and reports."""

    def __init__(self, edit: Edit, path: str, module: GraphModule) -> None:
        self.edit = edit
        self.path = path
        self.module = module
        self.graph = module.graph
        self._erased: set[Node] = set()
        self._attributes: dict[Any, str] | None = None
        self._storages: set[int] = set()
        self._number = 0

    def nodes(self) -> Iterator[Node]:
        """The nodes there were at the start, in order, leaving out those erased meanwhile."""
        return (node for node in list(self.graph.nodes) if node not in self._erased)

    def full_name(self, node: Node) -> str:
        """The node's name, unique in the program."""
        return full_name(self.path, node.name)

    def constant_value(self, node: Any) -> torch.Tensor | None:
        """The tensor that a `get_attr` node reads, here or as an operand of a branch; None for anything else."""
        return _constant_value(self.edit, self.module, node)

    def operand_holding(self, tensor: torch.Tensor) -> Node | None:
        """The placeholder of a branch that always is exactly this tensor."""
        if self.module not in self.edit.callers:
            return None
        key = _memory_key(tensor)
        operands: list[Node] = self.graph.find_nodes(op="placeholder")
        values = ((node, self.constant_value(node)) for node in operands)
        return next((node for node, value in values if value is not None and _memory_key(value) == key), None)

    def decline(self, rule: str, node: Node, reason: str) -> None:
        """Record that `rule` matched at `node` and left it alone."""
        self.edit.declined.append(Declined(rule, self.full_name(node), self._with_size_names(reason)))

    def near_miss(self, rule: str, node: Node, reason: str, matched: int, total: int) -> None:
        """Record that only a part of what `rule` looks for was found at `node`."""
        reason = self._with_size_names(reason)
        self.edit.near_misses.append(NearMiss(rule, self.full_name(node), reason, matched, total))

    def _with_size_names(self, reason: str) -> str:
        return SYMBOL.sub(lambda found: self.edit.sizes.get(found[0], found[0]), reason) if self.edit.sizes else reason

    def replace(
        self,
        rule: str,
        outputs: Sequence[Node],
        build: Build,
        *,
        inner: Sequence[Node] = (),
        at: Node | None = None,
        anchor: Node | None = None,
    ) -> bool:
        """Put what `build` returns, one value (a node or a number) an output, in the place of `outputs`.

        The id is "rule@anchor" (default: the first output). New nodes go before `at` (default: the first output).
        Returns False, with the reason recorded, where the id is refused or a user cannot take the new value.
        """
        anchor = anchor or outputs[0]
        identity = f"{rule}@{self.full_name(anchor)}"
        if not self.edit.context.allow(identity):
            self.decline(rule, anchor, "its id was refused")
            return False
        builder = Builder(self)
        try:
            with self.graph.inserting_before(at or outputs[0]), torch.no_grad():
                results = [item.node if isinstance(item, Proxy) else item for item in build(builder)]
            values = [item.meta["val"] if isinstance(item, Node) else item for item in results]
            changed = changes_downstream(self.edit.mode, dict(zip(outputs, values, strict=True)))
        except PropagationError as error:
            builder.undo()
            self.decline(rule, anchor, str(error))
            return False
        self._commit(rule, identity, outputs, inner, results, builder.nodes, changed)
        return True

    def insert(self, rule: str, anchor: Node, build: Build, at: Node) -> Sequence[Node] | None:
        """Put what `build` makes before `at` and leave all else alone; returns what it returns, which nothing reads.

        The id is "rule@anchor", where `anchor` is read by the new nodes. None, with the reason recorded, where the id
        is refused or a new node cannot be computed.
        """
        identity = f"{rule}@{self.full_name(anchor)}"
        if not self.edit.context.allow(identity):
            self.decline(rule, anchor, "its id was refused")
            return None
        builder = Builder(self)
        try:
            with self.graph.inserting_before(at), torch.no_grad():
                results = [item.node if isinstance(item, Proxy) else item for item in build(builder)]
        except PropagationError as error:
            builder.undo()
            self.decline(rule, anchor, str(error))
            return None
        self._mark(rule, anchor, (anchor,), builder.nodes)
        names = tuple(self.full_name(node) for node in builder.nodes)
        self.edit.rewrites.append(Rewrite(identity, rule, (self.full_name(anchor),), names))
        return results

    def remove(self, rule: str, node: Node) -> bool:
        """Erase a node that nothing reads; False, with the reason recorded, where its id is refused."""
        identity = f"{rule}@{self.full_name(node)}"
        if not self.edit.context.allow(identity):
            self.decline(rule, node, "its id was refused")
            return False
        self.edit.rewrites.append(Rewrite(identity, rule, (self.full_name(node),), ()))
        self.graph.erase_node(node)
        self._erased.add(node)
        return True

    def _commit(
        self,
        rule: str,
        identity: str,
        outputs: Sequence[Node],
        inner: Sequence[Node],
        results: Sequence[Any],
        new: Sequence[Node],
        changed: dict[Node, Any],
    ) -> None:
        for node, value in changed.items():
            node.meta["val"] = value
            node.meta.pop("tensor_meta", None)
        before = tuple(sorted({*inner, *outputs}))
        self._mark(rule, outputs[0], before, new)
        old_steps, old_outputs = record(self.module, before, outputs, self.full_name)
        new_steps, new_outputs = record(self.module, new, results, self.full_name)
        replaced = tuple(value.name for value in old_outputs)
        self.edit.instances.append(Instance(identity, old_steps, new_steps, replaced, new_outputs))
        fresh = set(new)
        for old, result in zip(outputs, results, strict=True):
            if isinstance(result, Node):
                old.replace_all_uses_with(result, delete_user_cb=lambda user: user not in fresh)
            else:
                substitute(old, result)
        names = tuple(self.full_name(node) for node in before)
        kept = tuple(node for node in results if isinstance(node, Node))
        after = tuple(dict.fromkeys(self.full_name(node) for node in (*new, *kept)))
        self.edit.rewrites.append(Rewrite(identity, rule, names, after))
        self.erase_dead((*inner, *outputs, *new))

    def _mark(self, rule: str, anchor: Node, before: Sequence[Node], new: Sequence[Node]) -> None:
        origins: dict[str, None] = {}
        for node in before:
            origins.update(dict.fromkeys(provenance(node).get("from") or [self.full_name(node)]))
        for node in new:
            node.meta.update({key: anchor.meta[key] for key in INHERITED if key in anchor.meta})
            custom = dict(anchor.meta.get("custom") or {})
            node.meta["custom"] = {**custom, PROVENANCE: {"rule": rule, "from": list(origins)}}

    def erase_dead(self, seeds: Sequence[Node]) -> list[Node]:
        """Erase those of `seeds` that nothing reads, then what they alone read; returns what went."""
        pending, gone = list(seeds), []
        while pending:
            node = pending.pop()
            if node.users or node in self._erased or has_effect(node):
                continue
            pending.extend(node.all_input_nodes)
            self.graph.erase_node(node)
            self._erased.add(node)
            gone.append(node)
        return gone

    def attribute_for(self, tensor: torch.Tensor) -> tuple[str, bool]:
        """The name of the attribute that holds `tensor`, and whether it was made for it.

        One attribute a storage: a view of memory that an attribute already holds is stored as a copy.
        """
        held = self._held()
        key = _memory_key(tensor)
        if key in held:
            return held[key], False
        if key[0] in self._storages or tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
            copied = tensor.detach().clone(memory_format=torch.contiguous_format)
            tensor = torch.nn.Parameter(copied, tensor.requires_grad) if _is_parameter(tensor) else copied
        name = self._free_name()
        if isinstance(tensor, torch.nn.Parameter):
            self.module.register_parameter(name, tensor)
        else:
            self.module.register_buffer(name, tensor.detach())
        held[_memory_key(tensor)] = name
        self._storages.add(_memory_key(tensor)[0])
        return name, True

    def _held(self) -> dict[Any, str]:
        if self._attributes is None:
            targets = [str(node.target) for node in self.graph.nodes if node.op == "get_attr"]
            values = [(target, get_attribute(self.module, target)) for target in targets]
            self._attributes = {_memory_key(value): name for name, value in values if isinstance(value, torch.Tensor)}
            self._storages = {key[0] for key in self._attributes}
        return self._attributes

    def _free_name(self) -> str:
        stem = self.edit.name.replace("-", "_")
        while hasattr(self.module, f"{stem}_{self._number}"):
            self._number += 1
        return f"{stem}_{self._number}"

    def remove_attribute(self, name: str) -> None:
        """Take back an attribute made by `attribute_for`."""
        held = self._held()
        key = _memory_key(get_attribute(self.module, name))
        del held[key]
        self._storages.discard(key[0])
        self._number = min(self._number, int(name.rpartition("_")[2]))
        delattr(self.module, name)


def _conditions(program: Program) -> dict[GraphModule, tuple[GraphModule, Node]]:
    """The graph and the node of the one `torch.cond` that each branch is read by; shared branches are left out."""
    found: dict[GraphModule, list[tuple[GraphModule, Node]]] = {}
    for _, module in program.graphs():
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
            for branch in node.args[1:3]:
                found.setdefault(get_attribute(module, str(branch.target)), []).append((module, node))
    return {branch: callers[0] for branch, callers in found.items() if len(callers) == 1}


def _constant_value(edit: Edit, module: GraphModule, node: Any) -> torch.Tensor | None:
    if not isinstance(node, Node):
        return None
    if node.op == "get_attr":
        value = get_attribute(module, str(node.target))
        return value if isinstance(value, torch.Tensor) else None
    if node.op != "placeholder" or module not in edit.callers:
        return None
    outer, condition = edit.callers[module]
    if condition.graph is not outer.graph or condition._erased:
        return None
    place = module.graph.find_nodes(op="placeholder").index(node)
    return _constant_value(edit, outer, condition.args[3][place])  # type: ignore[index]


def _is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def _memory_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    place = tensor.untyped_storage().data_ptr()
    if not place:  # empty tensors share the null address
        place = id(tensor)
    return place, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def size_names(program: Program) -> dict[str, str]:
    """What the user calls a symbolic size, by the name that torch gave it ("s43")."""
    names: dict[str, str] = {}
    placeholders = program.graph_module.graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, program.inputs, strict=False):  # the rest are of state
        for size, own in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(size, torch.SymInt) and isinstance(own, str) and own.isidentifier():
                names[str(size.node.expr)] = own
    return names


def is_control_flow(node: Node) -> bool:
    """Whether the node runs sub-graphs."""
    return isinstance(node.target, HigherOrderOperator)


def _refresh_output(module: GraphModule) -> None:
    output = next(iter(reversed(module.graph.nodes)))
    if "val" in output.meta:
        output.meta["val"] = map_arg(output.args[0], lambda node: node.meta["val"])


def substitute(node: Node, number: Any) -> None:
    """Write `number` wherever `node` is an argument."""
    for user in list(node.users):
        user.args = map_arg(user.args, lambda argument: number if argument is node else argument)
        user.kwargs = map_arg(user.kwargs, lambda argument: number if argument is node else argument)


def keep_read_attributes(module: GraphModule) -> None:
    """Leave only the attributes that some graph reads, in containers that belong to `module` alone."""
    targets = sorted({str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")})
    values = [(target, get_attribute(module, target)) for target in targets]
    module._parameters.clear()
    module._buffers.clear()
    module._modules.clear()
    for target, value in values:
        *path, name = target.split(".")
        owner: torch.nn.Module = module
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        _set_attribute(owner, name, value)
        if isinstance(value, GraphModule):
            keep_read_attributes(value)


def _set_attribute(owner: torch.nn.Module, name: str, value: Any) -> None:
    if isinstance(value, torch.nn.Parameter):
        owner.register_parameter(name, value)
    elif isinstance(value, torch.Tensor):
        owner.__dict__.pop(name, None)
        owner.register_buffer(name, value)
    elif isinstance(value, torch.nn.Module):
        owner.add_module(name, value)
    else:
        setattr(owner, name, value)
