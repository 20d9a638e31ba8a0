"""What became of every node of A, and where every node of B comes from.

A node of both with one name, operator and provenance is the same node, and so is one under another name that computes
the same of the same inputs. Any other node of B names in its provenance the original nodes in whose place it stands;
those of them that B no longer has are its partners.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from graphopt.diff_page.account import Account, Note, Report, read_account
from graphopt.diff_page.describe import Description, describe, value_text
from graphopt.diff_page.kernel_times import Kernel, read_kernels
from graphopt.program import Program, get_attribute, provenance
from graphopt.report import Counts, count

State = Literal["same", "changed", "removed", "new"]


@dataclass(frozen=True)
class DiffNode:
    """One node of A or B; `name` is unique in its program, "true_graph_0.linear" in a sub-graph, whose path is `graph`.

    `partners` are names on the other side: the same node, what replaced it or what it replaces. `stand_in` is the node
    of B whose value is read in the place of a removed one. `changes` are places in `Diff.changes`, `kernels` in
    `Diff.kernels`; `error` is the largest of its rewrites, `seconds` the time of the kernels that compute it.
    """

    name: str
    graph: str
    description: Description
    inputs: tuple[str, ...]
    state: State = "same"
    partners: tuple[str, ...] = ()
    stand_in: str = ""
    differences: tuple[str, ...] = ()
    rule: str = ""
    origins: tuple[str, ...] = ()
    changes: tuple[int, ...] = ()
    notes: tuple[Note, ...] = ()
    kernels: tuple[int, ...] = ()
    error: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Diff:
    """Nodes in order of execution, graph by graph, the main one ("") first."""

    name_a: str
    name_b: str
    a: tuple[DiffNode, ...]
    b: tuple[DiffNode, ...]
    counts_a: Counts
    counts_b: Counts
    account: Account
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class _Place:
    """A node, the module of its graph, and what its program calls the sizes."""

    node: Node
    graph: str
    owner: GraphModule
    symbols: Mapping[str, str]

    def full_name(self, node: Node) -> str:
        return f"{self.graph}.{node.name}" if self.graph else node.name

    @cached_property
    def description(self) -> Description:
        return describe(self.node, self.owner, self.symbols)

    @property
    def inputs(self) -> list[str]:
        """The nodes among the arguments, in order, as often as they occur."""
        found: list[Node] = []
        torch.fx.map_arg((self.node.args, self.node.kwargs), found.append)
        return [self.full_name(node) for node in found]

    @cached_property
    def made_by(self) -> Mapping[str, Any]:
        """The provenance; a weight, which loses its own in a file, shares that of a node that reads it."""
        own = provenance(self.node)
        if own or self.node.op != "get_attr":
            return own
        return next((found for user in self.node.users if (found := provenance(user))), own)

    @property
    def origins(self) -> tuple[str, ...]:
        """The original nodes in whose place it stands; itself where it is one."""
        return tuple(self.made_by.get("from") or (self.full_name(self.node),))


Places = Mapping[str, _Place]


def align(a: Program, b: Program, report: Report | None = None, profile: Mapping[str, Any] | None = None) -> Diff:
    """`report` is the JSON of the `optimize` that made B from A, `profile` that of a profile of B compiled.

    Raises UsageError where one of them is something else.
    """
    old, new = _places(a), _places(b)
    account = read_account(report, old) if report is not None else Account()
    kernels = read_kernels(profile, new) if profile is not None else ()
    kept = {name: name for name in old.keys() & new.keys() if _is_one_node(old[name].node, new[name].node)}
    kept |= _alike(old, new, kept)
    twins = {right: left for left, right in kept.items()}
    partners = _partners(old, new, kept, twins)
    computed_by = _kernels_by_node(kernels)
    nodes_b = [
        _with_kernels(_new_node(place, name, twins, partners, account), computed_by.get(name, ()), kernels)
        for name, place in new.items()
    ]
    replaced = {left: [right] for left, right in kept.items()}
    for node in nodes_b:
        for partner in node.partners if node.name not in twins else ():
            replaced.setdefault(partner, []).append(node.name)
    stand_ins = _stand_ins(old, new, kept, replaced)
    nodes_a = [_old_node(place, name, kept, replaced, stand_ins, account) for name, place in old.items()]
    changed_a = {
        left: found
        for left, right in kept.items()
        if (found := _differences(old[left], new[right], replaced, stand_ins))
    }
    changed_b = {kept[name]: found for name, found in changed_a.items()}
    return Diff(
        a.name,
        b.name,
        tuple(_with_differences(node, changed_a) for node in _explain_weights(nodes_a)),
        tuple(_with_differences(node, changed_b) for node in nodes_b),
        count(a),
        count(b),
        account,
        kernels,
    )


def _places(program: Program) -> dict[str, _Place]:
    places = (
        _Place(node, path, module, program.symbols) for path, module in program.graphs() for node in module.graph.nodes
    )
    return {place.full_name(place.node): place for place in places}


def _is_one_node(old: Node, new: Node) -> bool:
    alike = old.target == new.target or old.op != "call_function"
    return old.op == new.op and alike and provenance(old) == provenance(new)


def _alike(old: Places, new: Places, kept: Mapping[str, str]) -> dict[str, str]:
    """Pairs of nodes under different names, which compute the same of the same: exporters number nodes anew."""
    spare: dict[tuple[Any, ...], list[str]] = {}
    for name, place in old.items():
        if name not in kept and not place.made_by and place.node.op in ("call_function", "placeholder"):
            spare.setdefault(_computation(place, place.inputs), []).append(name)
    found: dict[str, str] = {}
    twins: dict[str, str | None] = {right: left for left, right in kept.items()}
    for name, place in new.items():
        if name not in twins and not place.made_by and place.node.op in ("call_function", "placeholder"):
            same = spare.get(_computation(place, [twins.get(source) for source in place.inputs]))
            if same:
                twin = same.pop(0)
                twins[name], found[twin] = twin, name
    return found


def _computation(place: _Place, inputs: Sequence[str | None]) -> tuple[Any, ...]:
    node = place.node
    what: Any = node.target
    if node.op == "placeholder":
        what = node.graph.find_nodes(op="placeholder").index(node)
    return place.graph, node.op, what, place.description.type, _constants(node), tuple(inputs)


def _partners(
    old: Places, new: Places, kept: Mapping[str, str], twins: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """For each node that only B has: the nodes that only A has and that it stands for, wholly or in part."""
    by_origin: dict[str, list[str]] = {}
    for name, place in old.items():
        if name not in kept:
            for origin in place.origins:
                by_origin.setdefault(origin, []).append(name)
    made = {name: place for name, place in new.items() if name not in twins and place.made_by}
    return {
        name: tuple(dict.fromkeys(found for origin in place.origins for found in by_origin.get(origin, ())))
        for name, place in made.items()
    }


def _base(place: _Place, name: str) -> DiffNode:
    inputs = tuple(place.full_name(node) for node in place.node.all_input_nodes)
    return DiffNode(name, place.graph, place.description, inputs)


def _new_node(
    place: _Place,
    name: str,
    twins: Mapping[str, str],
    partners: Mapping[str, tuple[str, ...]],
    account: Account,
) -> DiffNode:
    found = (twins[name],) if name in twins else partners.get(name, ())
    state: State = "same" if name in twins else "changed" if found else "new"
    changes = account.of_new.get(name, ())
    made_by = provenance(place.node) if name in twins else place.made_by
    return replace(
        _base(place, name),
        state=state,
        partners=found,
        rule=str(made_by.get("rule", "")),
        origins=tuple(made_by.get("from", ())),
        changes=changes,
        notes=account.notes_of_new.get(name, ()),
        error=_error(account, changes),
    )


def _kernels_by_node(kernels: Sequence[Kernel]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for index, kernel in enumerate(kernels):
        for name in dict.fromkeys(kernel.nodes):
            found[name] = (*found.get(name, ()), index)
    return found


def _with_kernels(node: DiffNode, indices: tuple[int, ...], kernels: Sequence[Kernel]) -> DiffNode:
    if not indices:
        return node
    return replace(node, kernels=indices, seconds=sum(kernels[index].seconds for index in indices))


def _old_node(
    place: _Place,
    name: str,
    kept: Mapping[str, str],
    replaced: Mapping[str, list[str]],
    stand_ins: Mapping[str, str],
    account: Account,
) -> DiffNode:
    found = tuple(replaced.get(name, ()))
    state: State = "same" if name in kept else "changed" if found else "removed"
    made_by = provenance(place.node)
    changes = account.of_old.get(name, ()) if state != "same" else ()
    return replace(
        _base(place, name),
        state=state,
        partners=found,
        stand_in=stand_ins.get(name, "") if state == "removed" else "",
        rule=str(made_by.get("rule", "")),
        origins=tuple(made_by.get("from", ())),
        changes=changes,
        notes=account.notes_of_old.get(name, ()),
        error=_error(account, changes),
    )


def _error(account: Account, changes: tuple[int, ...]) -> float | None:
    return max((error for index in changes if (error := account.changes[index].error) is not None), default=None)


def _stand_ins(old: Places, new: Places, kept: Mapping[str, str], replaced: Mapping[str, list[str]]) -> dict[str, str]:
    """For a removed node: what those that read it and are still there read in its place."""
    found: dict[str, str] = {}
    for name, twin in kept.items():
        for left, right in _read(old[name], new[twin]):
            if left not in replaced:
                found.setdefault(left, right)
    return found


def _read(old: _Place, new: _Place) -> Iterator[tuple[str, str]]:
    """What both read at the same place of their arguments; nothing where they have different numbers of them."""
    left, right = old.inputs, new.inputs
    if len(left) == len(right):
        yield from zip(left, right, strict=True)


def _differences(
    old: _Place, new: _Place, replaced: Mapping[str, list[str]], stand_ins: Mapping[str, str]
) -> tuple[str, ...]:
    """How a node of both differs in B, apart from reading what replaced its inputs."""
    before, after = old.description, new.description
    found = []
    if before.operator != after.operator:
        found.append(f"{after.operator} in place of {before.operator}")
    if before.type != after.type:
        found.append(f"{after.type} in place of {before.type}")
    if _constants(old.node) != _constants(new.node):
        found.append("other arguments")
    for left, right in _read(old, new):
        if right not in replaced.get(left, ()) and stand_ins.get(left) != right:
            found.append(f"reads {right} in place of {left}")
    if old.node.op == "get_attr" and not _equal_values(old, new):
        found.append("other values")
    return tuple(found)


def _constants(node: Node) -> str:
    """The arguments as text, with nodes left out."""
    given = torch.fx.map_arg((list(node.args), list(node.kwargs.items())), lambda _: None)
    return value_text(given)


def _equal_values(old: _Place, new: _Place) -> bool:
    left, right = (get_attribute(place.owner, str(place.node.target)) for place in (old, new))
    if not (isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)):
        return True
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.data_ptr() == right.data_ptr() and left.stride() == right.stride():
        return True
    return torch.equal(*(value.detach().reshape(-1).contiguous().view(torch.uint8) for value in (left, right)))


def _explain_weights(nodes: list[DiffNode]) -> list[DiffNode]:
    """A weight that only changed nodes read went with them: it takes over their rewrites."""
    readers: dict[str, list[DiffNode]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    explained = []
    for node in nodes:
        if node.state == "removed" and node.description.kind == "weight" and not node.changes:
            users = readers.get(node.name, [])
            changes = tuple(dict.fromkeys(index for user in users for index in user.changes))
            node = replace(node, changes=changes)
        explained.append(node)
    return explained


def _with_differences(node: DiffNode, changed: Mapping[str, tuple[str, ...]]) -> DiffNode:
    if node.state != "same" or node.name not in changed:
        return node
    return replace(node, state="changed", differences=changed[node.name])
