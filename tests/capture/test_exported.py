"""Capture of exported programs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from graphopt.capture import capture
from graphopt.errors import CaptureError
from graphopt.program import SizeRange
from tests import models


def exported_mlp() -> torch.export.ExportedProgram:
    module, examples, _ = models.mlp()
    return torch.export.export(module, examples, dynamic_shapes={"x": {0: Dim("batch", min=1, max=64)}})


def test_source_is_left_as_it_was() -> None:
    source = exported_mlp()
    code, nodes = source.graph_module.code, [dict(node.meta) for node in source.graph.nodes]
    program = capture(source)
    assert source.graph_module.code == code
    assert [dict(node.meta) for node in source.graph.nodes] == nodes
    x = program.examples[0]
    torch.testing.assert_close(program(x)[0], source.module()(x))


def test_sizes_without_names_are_numbered_and_can_be_named() -> None:
    assert capture(exported_mlp()).sizes == {"s0": SizeRange(1, 64)}
    named = capture(exported_mlp(), dynamic_shapes={"x": {0: "batch"}})
    assert named.sizes == {"batch": SizeRange(1, 64)}
    assert named.inputs[0].shape == ("batch", 16)


def test_naming_a_fixed_size_is_refused() -> None:
    with pytest.raises(CaptureError, match="axis 1 of input 'x'"):
        capture(exported_mlp(), dynamic_shapes={"x": {1: "width"}})


def test_examples_can_be_given_or_are_drawn() -> None:
    source = exported_mlp()
    assert capture(source, {"x": torch.ones(2, 16)}).examples[0].shape == (2, 16)
    source.example_inputs = None
    assert capture(source).examples[0].shape[1] == 16
    with pytest.raises(CaptureError, match="do not fit"):
        capture(source, (torch.ones(2, 17),))


def test_gradient_modes_leave_no_trace() -> None:
    class Mode(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = x.sin()
            return y.cos()

    program = capture(torch.export.export(Mode(), (torch.ones(2),)))
    assert [str(n.target) for n in program.nodes() if n.op == "call_function"] == [
        "aten.sin.default",
        "aten.cos.default",
    ]


def test_dropout_that_is_on_is_refused() -> None:
    module = models.Mlp().train()
    with pytest.raises(CaptureError, match=r"draws random numbers.*eval mode"):
        capture(torch.export.export(module, (torch.ones(2, 16),)))
