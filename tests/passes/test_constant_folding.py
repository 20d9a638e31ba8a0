from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import Node

from graphopt.passes import constant_folding
from graphopt.passes.constant_folding import ConstantFolding
from graphopt.program import Program
from tests.passes.checking import captured, check_pass, targets


class Scaled(nn.Module):
    """A linear whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, (self.weight * 2).exp().abs())


def test_a_chain_becomes_one_weight() -> None:
    result = check_pass(captured(Scaled(), torch.randn(2, 4)), ConstantFolding(), rewrites=1)
    assert targets(result.program) == ["aten.linear"]
    assert list(result.program.graph_module.state_dict()) == ["constant_folding_0"]


def test_memory_may_not_grow_beyond_the_bound() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row = nn.Parameter(torch.randn(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.outer(self.row, self.row) * self.row

    program = captured(Outer(), torch.randn(64, 64))
    check_pass(program, ConstantFolding(max_bytes=16384), rewrites=1)
    result = check_pass(program, ConstantFolding(max_bytes=16000), 0)
    assert result.program is program


def test_growth_that_is_refused_says_by_how_much() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + x @ self.weight.exp()

    program = captured(Both(), torch.randn(2, 8))
    check_pass(program, ConstantFolding(max_bytes=255), 0, "memory would grow by 256 bytes; 255 of max-bytes are left")
    check_pass(program, ConstantFolding(max_bytes=256), rewrites=1)


class Function(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.arange(12.0).view(3, 4))

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x, self.table)  # type: ignore[operator]


def program_of(function: object, **options: object) -> Program:
    return captured(Function(function), torch.randn(3, 4), **options)  # type: ignore[arg-type]


def test_views_of_weights_are_stored_on_their_own() -> None:
    result = check_pass(program_of(lambda x, table: x[:2] + table[1:]), ConstantFolding(), rewrites=1)
    stored = result.program.graph_module.constant_folding_0
    assert isinstance(stored, torch.Tensor) and stored.is_contiguous()
    assert stored.untyped_storage().nbytes() == stored.nbytes


def test_an_expand_stays_and_its_source_is_stored() -> None:
    program = program_of(lambda x, table: x + table.exp()[:1].expand(3, 4))
    result = check_pass(program, ConstantFolding(), rewrites=1)
    assert targets(result.program) == ["aten.expand", "aten.add"]
    assert result.program.graph_module.constant_folding_0.shape == (1, 4)


def test_a_factory_alone_and_inputs_stay() -> None:
    program = program_of(lambda x, table: x + torch.zeros(3, 4) + x.exp() * torch.arange(4))
    check_pass(program, ConstantFolding(), rewrites=0)


def test_random_values_stay() -> None:
    from graphopt.contract import PassContext

    program = program_of(lambda x, table: x + table.exp())
    (exp,) = (node for node in program.nodes() if node.target is torch.ops.aten.exp.default)
    exp.target = torch.ops.aten.rand_like.default
    program.graph_module.recompile()
    assert not ConstantFolding().run(program, PassContext()).rewrites


def test_symbolic_sizes_are_never_folded() -> None:
    program = program_of(lambda x, table: x + torch.arange(x.shape[0])[:, None], dynamic={"x": {0: "rows"}})
    check_pass(program, ConstantFolding(), rewrites=0)


def test_size_nodes_with_a_known_value_become_numbers() -> None:
    program = program_of(lambda x, table: x.view(x.shape[0] * 2, 2).sin(), dynamic={"x": {0: "rows"}})
    graph = program.graph_module.graph
    (view,) = graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
    with graph.inserting_before(view):
        two = graph.call_function(torch.ops.aten.sym_size.int, (view.args[0], 1))
        half = graph.call_function(torch.ops.aten.sym_size.int, (view.args[0], 0))
    two.meta["val"], half.meta["val"] = 4, view.args[0].meta["val"].shape[0]
    view.args = (view.args[0], [half, two])
    view.meta["val"] = view.args[0].meta["val"]
    view.next.meta["val"] = view.args[0].meta["val"]
    result = ConstantFolding().run(program, __import__("graphopt").PassContext())
    assert [item.rule for item in result.rewrites] == ["constant-folding/size"]
    (folded,) = (node for node in result.program.nodes() if node.target is torch.ops.aten.view.default)
    assert folded.args[1][1] == 4 and isinstance(folded.args[1][0], torch.fx.Node)  # type: ignore[index]


def test_a_long_chain_keeps_few_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes of description must not hold every step of a chain in memory at once."""
    most = 0
    compute = constant_folding._Values._compute

    def watch(values: constant_folding._Values, node: Node) -> None:
        nonlocal most
        compute(values, node)
        most = max(most, len(values._kept))

    monkeypatch.setattr(constant_folding._Values, "_compute", watch)

    class Chain(nn.Module):
        weight: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            value = self.weight
            for _ in range(50):
                value = torch.sin(value) + value
            return x + value

    result = check_pass(captured(Chain(), torch.ones(4)), ConstantFolding(), rewrites=1)
    assert targets(result.program) == ["aten.add"]
    assert most <= 4
