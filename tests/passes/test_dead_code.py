from __future__ import annotations

import torch

from graphopt.contract import PassContext
from graphopt.passes.dead_code import DeadCode
from tests.passes.checking import captured, check_pass, targets


class Relu(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


def test_unread_chains_go() -> None:
    program = captured(Relu(), torch.randn(3))
    graph = program.graph_module.graph
    (relu,) = graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    with graph.inserting_after(relu):
        sine = graph.call_function(torch.ops.aten.sin.default, (relu,))
    with graph.inserting_after(sine):
        cosine = graph.call_function(torch.ops.aten.cos.default, (sine,))
    sine.meta["val"] = cosine.meta["val"] = relu.meta["val"]
    program.graph_module.recompile()
    result = check_pass(program, DeadCode(), rewrites=2)
    assert targets(result.program) == ["aten.relu"]


def test_random_operators_stay() -> None:
    program = captured(Relu(), torch.randn(3))
    graph = program.graph_module.graph
    (relu,) = graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    with graph.inserting_before(relu):
        noise = graph.call_function(torch.ops.aten.rand.default, ([3],))
    noise.meta["val"] = relu.meta["val"]
    program.graph_module.recompile()
    result = DeadCode().run(program, PassContext())
    assert result.program is program
    assert "random" in result.declined[0].reason


def test_attention_without_dropout_goes() -> None:
    """Its operator is marked as random for the dropout that it may have."""

    program = captured(Relu(), torch.randn(1, 2, 3, 4))
    graph = program.graph_module.graph
    (relu,) = graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    with graph.inserting_before(relu):
        unread = graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, (relu.args[0],) * 3)
    unread.meta["val"] = relu.meta["val"]
    program.graph_module.recompile()
    check_pass(program, DeadCode(), rewrites=1)


def test_unread_inputs_stay() -> None:
    class First(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x.relu()

    check_pass(captured(First(), torch.randn(3), torch.randn(3)), DeadCode(), rewrites=0)
