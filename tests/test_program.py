"""Program: running, checking of inputs, copies, sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.errors import FeedError
from graphopt.program import Program, evaluate_size, get_attribute, placeholder_name, provenance, set_attribute
from tests import models


@pytest.fixture(scope="module")
def text_model() -> Program:
    return models.program("tied")


@pytest.fixture(scope="module")
def branching() -> Program:
    return models.program("branching")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), r"takes 1 inputs \(ids\), got 0"),
        ((torch.ones(2, 5),), "must be torch.int64, got torch.float32"),
        ((torch.ones(2, dtype=torch.int64),), "must have 2 axes"),
        ((torch.ones(0, 5, dtype=torch.int64),), r"axis 0 of input 'ids' \(batch\) must be 1 and up, got 0"),
    ],
)
def test_inputs_that_do_not_fit(text_model: Program, inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(FeedError, match=message):
        text_model(*inputs)


def test_bind_gives_sizes(text_model: Program) -> None:
    assert text_model.bind((torch.zeros(2, 5, dtype=torch.int64),)) == {"batch": 2, "seq": 5}


def test_one_size_in_two_inputs_must_agree() -> None:
    program = models.program("bert")
    ids, mask = program.examples
    with pytest.raises(FeedError, match="axis 0 of input 'attention_mask' is 1, but batch is 2"):
        program(ids, mask[:1])


def test_copy_shares_tensors_but_no_graph(branching: Program) -> None:
    copied = branching.copy()
    assert [path for path, _ in copied.graphs()] == [path for path, _ in branching.graphs()]
    for (_, mine), (_, theirs) in zip(copied.graphs(), branching.graphs(), strict=True):
        assert mine is not theirs and mine.graph is not theirs.graph
    weight = "large.0.weight"
    assert get_attribute(copied.graph_module, weight) is get_attribute(branching.graph_module, weight)
    set_attribute(copied.graph_module, weight, torch.zeros(32, 8))
    assert get_attribute(branching.graph_module, weight).any()
    assert [n.meta.keys() for n in copied.nodes()] == [n.meta.keys() for n in branching.nodes()]


def test_editing_a_branch_of_a_copy_leaves_the_original(branching: Program) -> None:
    x = torch.ones(2, 8)
    before = branching(x)[0]
    copied = branching.copy()
    for _, module in copied.graphs():
        for node in module.graph.nodes:
            if node.target is torch.ops.aten.relu.default:
                node.target = torch.ops.aten.neg.default
        module.recompile()
    assert torch.equal(branching(x)[0], before)
    assert not torch.equal(copied(x)[0], before)


def test_counts_walk_branches(branching: Program) -> None:
    assert {path for path, _ in branching.graphs()} == {"", "true_graph_0", "false_graph_0"}
    assert branching.count_operators() == sum(n.op == "call_function" for n in branching.nodes())
    assert all(not provenance(node) for node in branching.nodes())


@pytest.mark.parametrize(
    ("text", "value"),
    [("seq", 5), ("2*seq + 1", 11), ("(seq//2)", 2), ("seq%3", 2), ("-seq", -5), ("max(1, seq - 9)", 1), (7, 7)],
)
def test_size_expressions(text: int | str, value: int) -> None:
    assert evaluate_size(text, {"seq": 5}) == value


@pytest.mark.parametrize("text", ["batch", "open('x')", "seq.real", "[1]"])
def test_sizes_that_are_no_expression(text: str) -> None:
    with pytest.raises(FeedError):
        evaluate_size(text, {"seq": 5})


def test_placeholder_names() -> None:
    assert [placeholder_name(name) for name in ("x", "a.0", "lambda", "0", "self")] == [
        "x",
        "a_0",
        "_lambda",
        "_0",
        "_self",
    ]
