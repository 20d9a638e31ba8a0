"""Constant tensors inside branches of torch.cond."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.program import get_attribute, set_attribute
from tests import models


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        def deep(v: Tensor) -> Tensor:
            return torch.cond(v.max() > 1, lambda w: w * torch.tensor([2.0, 3.0]), lambda w: w.tan(), (v,))

        return torch.cond(x.sum() > 0, lambda v: deep(v) + torch.tensor([1.0, 0.0]), lambda v: v.cos(), (x,))


def test_constants_made_in_branches() -> None:
    module = Inner()
    for source in (module, torch.export.export(module, (torch.ones(2),))):
        program = capture(source, (torch.ones(2),))
        for x in (torch.tensor([0.5, 0.6]), torch.tensor([4.0, 1.0]), -torch.ones(2)):
            assert torch.equal(program(x)[0], module(x))
        for path, graph in program.graphs():
            reads = graph.graph.find_nodes(op="get_attr")
            assert not path or not any(isinstance(get_attribute(graph, str(n.target)), Tensor) for n in reads)


def test_constants_that_a_pass_left_in_a_branch_are_saved(tmp_path: Path) -> None:
    program = models.program("branching").copy()
    branch = dict(program.graphs())["false_graph_0"]
    (linear,) = (node for node in branch.graph.nodes if "linear" in str(node.target))
    set_attribute(branch, "folded", torch.full((8, 8), 0.5))
    with branch.graph.inserting_before(linear):
        read = branch.graph.create_node("get_attr", "folded")
    read.meta["val"] = linear.args[1].meta["val"]
    linear.args = (linear.args[0], read, *linear.args[2:])
    branch.recompile()
    program.save(str(tmp_path / "m.pt2"))
    x = -torch.ones(2, 8)
    torch.testing.assert_close(capture(tmp_path / "m.pt2")(x)[0], program(x)[0])
    assert "branch_constant" not in program.graph_module.code
