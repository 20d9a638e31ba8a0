from __future__ import annotations

import networkx
import pytest
import torch
from torch import nn

from graphopt.analysis.cut_points import Flow, crossing, cut_points
from graphopt.analysis.view import node_kinds, program_view
from graphopt.errors import UnknownNameError
from graphopt.program import Program
from tests import models
from tests.analysis.residual_models import (
    FloatMasked,
    KeyValues,
    Residual,
    Skipped,
    Stack,
    captured,
    encoder_decoder,
    gated,
    self_masked,
    towers,
)


def _operators(program: Program) -> list[str]:
    return [str(cut.node.target).split(".")[1] for cut in cut_points(program)]


def _side(program: Program) -> list[list[str]]:
    return [[node.name for node in cut.side_inputs] for cut in cut_points(program)]


def test_residual_stream_of_bert_is_cut_at_sums_and_norms() -> None:
    program = models.program("bert")
    layer = ["add", "layer_norm", "add", "layer_norm"]
    assert _operators(program) == ["embedding", "add", "add", "layer_norm", "clone", *layer, *layer]
    mask = next(node.args[3] for node in program.nodes() if "dot_product" in node.name)
    assert [node for cut in cut_points(program)[5:] for node in cut.side_inputs] == [mask, mask]


def test_residual_stream_of_gpt2_is_cut_at_sums() -> None:
    tail = ["layer_norm", "view", "slice", "slice", "linear"]
    assert _operators(models.program("gpt2")) == ["view", "embedding", "add", "clone", *["add"] * 4, *tail]


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "conv_net", "mlp"])
def test_every_path_runs_through_every_cut_point(name: str) -> None:
    """Without the cut point, and without other inputs, no path is left: asked of networkx."""
    program = models.program(name)
    view = program_view(program)
    (output,) = (node for node, kind in view.nodes(data="kind") if kind == "output")
    data = networkx.DiGraph((a, b) for a, b, flows in view.edges(data="data") if flows)
    source = next(iter(view))
    cuts = [cut.node for cut in cut_points(program)]
    assert len(cuts) > 3
    for cut in cuts:
        without = data.copy()
        without.remove_node(cut)
        assert networkx.has_path(data, source, output)
        assert cut is source or not networkx.has_path(without, source, output)
    everywhere = set(networkx.immediate_dominators(networkx.reverse(data), output))
    inside = [node for cut in cut_points(program) for node in cut.segment[:-1]]
    assert set(inside) <= everywhere and not set(inside) & set(cuts)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_mask_hides_no_cut_point_wherever_it_comes_from(layers: int) -> None:
    assert _operators(gated(layers)) == ["add"] * layers
    assert _operators(self_masked(layers)) == ["embedding", *["add"] * layers]
    assert _operators(captured(lambda: FloatMasked(layers))) == ["linear", *["add"] * layers]
    assert _side(gated(layers)) == [["mul"]] * layers


def test_what_goes_around_for_good_does_hide() -> None:
    assert _operators(captured(lambda: Skipped(Residual(), Residual()))) == ["add"]
    assert _operators(captured(lambda: Stack(Residual()))) == ["add"]


def test_a_condition_that_is_the_only_way_is_on_the_stream() -> None:
    class Threshold(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) > 0

    assert _operators(captured(Threshold)) == ["relu", "gt"]


def test_outputs_that_are_not_counted() -> None:
    program = captured(lambda: KeyValues(2))
    assert cut_points(program) == ()
    found = cut_points(program, outputs=[program.outputs[0].name])
    assert [str(cut.node.target) for cut in found] == ["aten.add.Tensor"] * 2
    with pytest.raises(UnknownNameError, match="unknown output 'y'"):
        cut_points(program, outputs=["y"])


def test_new_state_is_no_output() -> None:
    assert _operators(models.program("counter")) == ["add"]


def test_cut_points_of_a_branch() -> None:
    program = models.program("branching")
    found = cut_points(program, "true_graph_0")
    assert [str(cut.node.target).split(".")[1] for cut in found] == ["linear", "relu", "linear"]
    with pytest.raises(UnknownNameError, match="unknown graph 'true'"):
        cut_points(program, "true")


def test_a_program_without_data_has_none() -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(x.shape[0])

    assert cut_points(captured(Constant)) == ()


def test_streams_hold_each_value_once() -> None:
    for program in (towers(), encoder_decoder(2, 3), models.program("bert")):
        flow = Flow(program)
        values = [node for stream in flow.streams() for node in stream.path]
        assert len(values) == len(set(values))
        assert set(values) == {node for node, kind in flow.kinds.items() if kind in ("input", "data")}


def test_crossing_is_what_the_second_half_needs_besides_the_cut() -> None:
    program = models.program("gpt2")
    cuts = [cut.node for cut in cut_points(program)]
    kinds = node_kinds(program)
    mask = next(node.args[3] for node in program.nodes() if "dot_product" in node.name)
    assert mask in crossing(kinds, cuts[5])
    assert all(kinds[node] == "size" for node in crossing(kinds, cuts[7]))
