"""Nodes keep their names in a file, though reading it traces the graph anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt import capture
from graphopt.capture.normal_form import NAME, noted_name
from graphopt.program import Program
from tests.models import program


def calls(found: Program) -> list[list[str]]:
    return [
        [node.name for node in module.graph.nodes if node.op == "call_function" and "sym_size" not in node.name]
        for _, module in found.graphs()
    ]


@pytest.mark.parametrize("name", ["gpt2", "resnet", "branching", "counter"])
def test_nodes_keep_their_names(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / "model.pt2")
    program(name).save(path)
    read = capture(path)
    assert calls(read) == calls(program(name))
    assert not [node for node in read.nodes() if NAME in (node.meta.get("custom") or {})]


def test_what_is_no_name_is_left_out() -> None:
    node = program("mlp").copy().graph_module.graph.find_nodes(op="output")[0].args[0][0]
    operator = str(node.target)
    for note in ("text", {"name": "a b", "operator": operator}, {"name": 3}, {"name": "relu", "operator": "other"}):
        node.meta["custom"] = {NAME: note}
        assert noted_name(node) is None
    node.meta["custom"] = {NAME: {"name": "relu_7", "operator": operator}}
    assert noted_name(node) == "relu_7"
