from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from graphopt import capture
from graphopt.diff_page.diff import Diff, DiffNode, align
from graphopt.errors import UsageError
from tests.diff_page.graphs import chain, optimized
from tests.models import Mlp, program

aten = torch.ops.aten


@functools.cache
def explained(name: str) -> Diff:
    return align(program(name), *optimized(name))


def node(nodes: tuple[DiffNode, ...], name: str) -> DiffNode:
    (found,) = (node for node in nodes if node.name == name)
    return found


@pytest.mark.parametrize("name", ["mlp", "branching", "counter"])
def test_nothing_differs_from_itself(name: str) -> None:
    diff = align(program(name), program(name).copy())
    assert {found.state for found in (*diff.a, *diff.b)} == {"same"}
    assert [found.name for found in diff.a] == [found.name for found in diff.b]


def test_a_folded_batch_norm_is_replaced() -> None:
    diff = explained("conv_net")
    norm = next(found for found in diff.a if "batch_norm" in found.name)
    (made,) = (found for found in diff.b if found.rule and found.description.kind == "call")
    assert (norm.state, made.state, made.rule) == ("changed", "changed", "batch-norm-folding")
    assert made.name in norm.partners and norm.name in made.partners
    (change,) = (diff.account.changes[index] for index in made.changes)
    assert change.pass_name == "batch-norm-folding" and change.error is not None
    assert made.error == norm.error == change.error


def test_users_of_what_was_replaced_are_the_same_nodes() -> None:
    diff = explained("conv_net")
    assert node(diff.a, "relu").state == node(diff.b, "relu").state == "same"
    assert node(diff.a, "relu").inputs != node(diff.b, "relu").inputs


def test_weights_go_with_the_nodes_that_read_them() -> None:
    diff = explained("conv_net")
    gone = [found for found in diff.a if found.description.kind == "weight" and found.state == "removed"]
    assert len(gone) == 5 and all(found.changes for found in gone)


def test_a_removed_node_says_what_is_read_in_its_place() -> None:
    gone = node(explained("bert").a, "clone")
    assert (gone.state, gone.stand_in, gone.partners) == ("removed", "layer_norm", ())


def test_refusals_stand_at_their_node() -> None:
    notes = [note for found in explained("bert").a for note in found.notes if note.kind == "declined"]
    assert {note.pass_name for note in notes} == {"merge-linears"} and all(note.reason for note in notes)


def test_what_nothing_reads_any_more_is_said() -> None:
    notes = [(found.state, note.kind) for found in explained("bert").a for note in found.notes]
    assert ("removed", "removed") in notes


def test_without_a_report_provenance_still_names_the_rule() -> None:
    diff = align(program("conv_net"), optimized("conv_net")[0])
    made = [found for found in diff.b if found.rule]
    assert made and not any(found.changes for found in made) and not diff.account.passes


def test_a_file_of_b_is_as_good_as_b(tmp_path: Any) -> None:
    better, report = optimized("conv_net")
    better.save(str(tmp_path / "better.pt2"))
    read = align(program("conv_net"), capture(str(tmp_path / "better.pt2")), report)
    for found, direct in ((read.a, explained("conv_net").a), (read.b, explained("conv_net").b)):
        wanted = {item.name: (item.state, item.changes) for item in direct}
        assert {item.name: (item.state, item.changes) for item in found} == wanted


def test_one_computation_under_another_name() -> None:
    a, b = chain(4), chain(4)
    for number, relu in enumerate(b.graph_module.graph.find_nodes(op="call_function", target=aten.relu.default)):
        relu._rename(f"other_{number}")
    diff = align(a, b)
    assert {found.state for found in (*diff.a, *diff.b)} == {"same"}
    assert node(diff.a, "step_2").partners == ("other_2",)


def test_nodes_of_branches_bear_their_path() -> None:
    diff = explained("branching")
    assert {found.graph for found in diff.a} == {"", "true_graph_0", "false_graph_0"}
    assert node(diff.b, "true_graph_0.relu").inputs == ("true_graph_0.linear",)


def test_other_weights_are_a_change() -> None:
    torch.manual_seed(1)
    diff = align(program("mlp"), capture(Mlp().eval(), (torch.zeros(3, 16),), dynamic_shapes={"x": {0: "batch"}}))
    changed = {found.name: found.differences for found in diff.b if found.state == "changed"}
    assert len(changed) == 4 and set(changed.values()) == {("other values",)}


def test_a_node_that_reads_something_else_is_changed() -> None:
    a, b = chain(4), chain(4)
    nodes = {found.name: found for found in b.graph_module.graph.nodes}
    nodes["step_3"].replace_input_with(nodes["step_2"], nodes["step_0"])
    diff = align(a, b)
    changed = {found.name: found.differences for found in diff.b if found.state != "same"}
    assert changed == {"step_3": ("reads step_0 in place of step_2",)}


def test_what_only_one_has() -> None:
    longer = align(chain(3), chain(4))
    assert node(longer.b, "step_3").state == "new"
    shorter = align(chain(4), chain(4, removed=[1]))
    assert (node(shorter.a, "step_1").state, node(shorter.a, "step_1").stand_in) == ("removed", "step_0")
    assert {found.state for found in shorter.b} == {"same"}


def kernel(name: str, nodes: list[str], seconds: float) -> dict[str, Any]:
    return {"kernel": name, "nodes": nodes, "seconds": seconds, "share": seconds / 4}


def test_times_of_kernels_are_those_of_their_nodes() -> None:
    profile = {"kernels": [kernel("fused", ["step_0", "step_1"], 3.0), kernel("late", ["step_1"], 1.0)]}
    diff = align(chain(3), chain(3), profile=profile)
    assert [found.seconds for found in diff.b] == [None, 3.0, 4.0, None, None]
    assert not any(found.seconds for found in diff.a)


@pytest.mark.parametrize(
    "profile", [{}, {"kernels": [{"kernel": "k"}]}, {"kernels": [kernel("k", ["elsewhere"], 1.0)]}, {"kernels": 3}]
)
def test_what_is_no_profile_of_b(profile: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="profile"):
        align(chain(2), chain(2), profile=profile)


@pytest.mark.parametrize("report", [{}, {"format": "2.0"}, {"format": "1.0", "entries": {}}, {"format": "1.0"}])
def test_what_is_no_report(report: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="report"):
        align(chain(2), chain(2), report=report)
