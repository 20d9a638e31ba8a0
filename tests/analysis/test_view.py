from __future__ import annotations

import networkx
import pytest

from graphopt.analysis.liveness import ancestors, region_liveness
from graphopt.analysis.view import node_kinds, program_view
from graphopt.errors import UnknownNameError
from tests import models


def _kinds(name: str, path: str = "") -> dict[str, str]:
    return {node.name: kind for node, kind in node_kinds(models.program(name), path).items()}


def test_view_has_every_node_and_edge_in_order() -> None:
    program = models.program("conv_net")
    nodes = list(program.graph_module.graph.nodes)
    view = program_view(program)
    assert list(view) == nodes and networkx.is_directed_acyclic_graph(view)
    assert set(view.edges) == {(argument, node) for node in nodes for argument in node.all_input_nodes}


def test_kinds() -> None:
    kinds = _kinds("branching")
    assert (kinds["x"], kinds["large_0_weight"], kinds["gt"]) == ("input", "weight", "data")
    assert (kinds["true_graph_0"], kinds["cond"], kinds["output"]) == ("module", "data", "output")


def test_sizes_and_constants_are_no_data() -> None:
    program = models.program("bert")
    kinds = node_kinds(program)
    of = {str(node.target): kind for node, kind in kinds.items()}
    assert (of["aten.sym_size.int"], of["aten.arange.default"], of["aten.new_ones.default"]) == (
        "size",
        "constant",
        "constant",
    )
    view = program_view(program)
    assert not any(flows for a, _, flows in view.edges(data="data") if kinds[a] not in ("input", "data"))
    assert sum(flows for _, _, flows in view.edges(data="data")) > 50


def test_operands_of_a_branch_are_what_its_caller_passes() -> None:
    kinds = _kinds("branching", "false_graph_0")
    assert (kinds["x"], kinds["p_small_weight"], kinds["linear"]) == ("input", "weight", "data")
    with pytest.raises(UnknownNameError, match="did you mean 'false_graph_0'"):
        program_view(models.program("branching"), "false_graph_1")


def test_border_of_a_region() -> None:
    program = models.program("conv_net")
    kinds = node_kinds(program)
    by_name = {node.name: node for node in kinds}
    relu, second = by_name["relu"], by_name["conv2d_1"]
    border = region_liveness(kinds, [second, relu])
    assert [node.name for node in border.weights] == ["second_weight", "second_bias"]
    assert (border.live_outs, border.modules, border.sizes) == ((second,), (), ())
    assert border.inputs == tuple(relu.all_input_nodes)
    assert region_liveness(kinds, [relu]).live_outs == (relu,)


def test_the_output_reads_too() -> None:
    program = models.program("mlp")
    kinds = node_kinds(program)
    calls = [node for node in kinds if node.op == "call_function"]
    assert region_liveness(kinds, calls).live_outs == (calls[-1],)
    assert ancestors(calls[-1]) == set(calls)
