"""Values from the inside of a program as further outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import UnknownNameError
from graphopt.watched import with_outputs


def program() -> graphopt.Program:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    return graphopt.capture(module, (torch.randn(2, 4),), dynamic_shapes={"input": {0: "batch"}})


def test_inner_values_come_out_beside_the_outputs() -> None:
    original = program()
    (relu,) = original.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    watched = with_outputs(original, {"inner": relu.name})
    x = torch.randn(5, 4)
    found, inner = watched(x)
    weights = dict(original.graph_module.named_parameters())
    assert torch.equal(found, original(x)[0])
    assert torch.equal(inner, torch.relu(x @ weights["0.weight"].T + weights["0.bias"]))
    assert [(spec.name, spec.shape) for spec in watched.outputs] == [("output", ("batch", 3)), ("inner", ("batch", 6))]
    assert len(original(x)) == 1
    assert all(one is other for one, other in zip(watched.graph_module.parameters(), weights.values(), strict=True))


def test_a_node_that_is_not_there() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown node of .* 'relux'; did you mean 'relu'"):
        with_outputs(program(), {"inner": "relux"})
