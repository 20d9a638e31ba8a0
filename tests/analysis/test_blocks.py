"""Repeated blocks of real models, with and without names, and of networks made to be told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from graphopt.analysis.blocks import Block, Repeat, find_repeats
from graphopt.analysis.view import module_path
from graphopt.errors import UnknownNameError
from graphopt.program import Program, TensorSpec
from tests import models
from tests.analysis.anonymous import anonymous
from tests.analysis.residual_models import (
    FloatMasked,
    KeyValues,
    PerLayerTable,
    PostNorm,
    Residual,
    Shared,
    Skipped,
    Stack,
    Thresholded,
    captured,
    encoder_decoder,
    gated,
    self_masked,
    towers,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Expected:
    """One repeat: the module of each block, its calls and weights, cut points inside, and what enters at the side."""

    modules: tuple[str, ...]
    nodes: int
    weights: int
    cuts: int
    side: tuple[str, ...] = ()


def _layers(prefix: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{prefix}.{number}" for number in numbers)


SWIN_PAIRS = ("model.swin.encoder.layers.1", "model.swin.encoder.layers.1")
ROTARY = ("aten.expand.default", "aten.mul.Tensor", "aten.mul.Tensor")
EXPECTED = {
    "bert": [Expected(_layers("model.encoder.layer", 0, 1), 23, 16, 4, ("aten.expand.default",))],
    "gpt2": [Expected(_layers("model.transformer.h", 0, 1), 33, 12, 2, ("aten.expand.default",))],
    "llama": [Expected(_layers("model.model.layers", 0, 1, 2), 51, 9, 2, ROTARY)],
    "t5_encoder": [
        Expected(_layers("model.encoder.block", 0, 1, 2), 26, 8, 2, ("aten.expand.default", "aten.unsqueeze.default"))
    ],
    "vit": [Expected(_layers("model.vit.layers", 0, 1, 2), 23, 16, 2, ("aten.expand.default",))],
    "swin": [Expected(SWIN_PAIRS, 123, 36, 4)],
    "deep_resnet": [
        Expected(_layers("model.resnet.encoder.stages.0.layers", 0, 1, 2), 9, 10, 2),
        Expected(_layers("model.resnet.encoder.stages.1.layers", 1, 2), 9, 10, 2),
    ],
    "mobilenet_v2": [
        Expected(_layers("model.mobilenet_v2.layer", *layers), 15, 15, 1)
        for layers in ((3, 4), (6, 7, 8), (10, 11), (13, 14))
    ],
    "convnext": [
        Expected(_layers("model.convnext.encoder.stages.0.layers", 0, 1), 9, 9, 1),
        Expected(_layers("model.convnext.encoder.stages.1.layers", 0, 1, 2), 9, 9, 1),
    ],
}

SLOW = ("llama", "t5_encoder", "mobilenet_v2", "vit", "convnext")  # seconds each to capture
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in EXPECTED]


def _summary(repeat: Repeat) -> Expected:
    first = repeat.blocks[0]
    modules = tuple(module_path(block.nodes) for block in repeat.blocks)
    side = tuple(str(node.target) for node in first.side_inputs)
    return Expected(modules, len(first.nodes), len(first.weights), len(first.cut_points), side)


@pytest.mark.parametrize("name", NAMES)
def test_real_models(name: str) -> None:
    program = models.program(name)
    repeats = find_repeats(program)
    assert [_summary(repeat) for repeat in repeats] == EXPECTED[name]
    for repeat in repeats:
        _check(repeat)


def _check(repeat: Repeat) -> None:
    """What `Block` promises, with the border of each block computed again from its nodes alone."""
    for before, after in zip(repeat.blocks, repeat.blocks[1:], strict=False):
        assert after.input is before.output
    for block in repeat.blocks:
        inside = set(block.nodes)
        read = {argument for node in inside for argument in node.all_input_nodes} - inside
        tensors = {node for node in read if isinstance(node.meta["val"], torch.Tensor)}
        assert tensors == {block.input, *block.weights, *block.side_inputs}
        assert [node for node in inside if not set(node.users) <= inside] == [block.output] == list(block.live_outs)
        assert block.is_closed and block.cut_points[-1] is block.output and len(inside) == len(block.nodes)
        _in_order(block)
    for row in repeat.rows():
        assert len({(node.op == "get_attr", str(node.meta["val"])) for node in row}) == 1
    for row in zip(*(block.nodes for block in repeat.blocks), strict=True):
        assert len({node.target for node in row}) == 1


def _in_order(block: Block) -> None:
    position = {node: index for index, node in enumerate(block.nodes)}
    for node in block.nodes:
        assert all(position[argument] < position[node] for argument in node.all_input_nodes if argument in position)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_order_do_not_matter(name: str) -> None:
    program = models.program(name)
    stripped, old = anonymous(program)
    wanted = [_names(repeat) for repeat in find_repeats(program)]
    found = find_repeats(stripped)
    assert sorted(_names(repeat, old) for repeat in found) == sorted(wanted)
    assert not any(module_path(block.nodes) for repeat in found for block in repeat.blocks)


def _names(repeat: Repeat, old: dict[str, str] | None = None) -> list[list[list[str]]]:
    def names(nodes: tuple[torch.fx.Node, ...]) -> list[str]:
        return sorted(old[node.name] if old else node.name for node in nodes)

    return [
        [names(part) for part in ((block.input, block.output), block.nodes, block.weights, block.side_inputs)]
        for block in repeat.blocks
    ]


@pytest.mark.parametrize("name", ["mlp", "conv_net", "counter", "branching", "tied", "dict_output", "resnet"])
def test_models_without_repetition_have_no_blocks(name: str) -> None:
    assert find_repeats(models.program(name)) == ()


def _counts(program: Program) -> list[int]:
    return [len(repeat.blocks) for repeat in find_repeats(program)]


def test_a_mask_made_of_the_ids_themselves() -> None:
    for program in (gated(3), self_masked(3), captured(lambda: FloatMasked(3))):
        (repeat,) = find_repeats(program)
        assert len(repeat.blocks) == 3
        _check(repeat)
        assert len({block.side_inputs for block in repeat.blocks}) == 1
        assert [str(node.target) for node in repeat.blocks[0].side_inputs] == ["aten.mul.Tensor"]


def test_both_halves_of_an_encoder_decoder() -> None:
    program = encoder_decoder(2, 3)
    encoder, decoder = find_repeats(program)
    assert (len(encoder.blocks), len(decoder.blocks)) == (2, 3)
    for block in decoder.blocks:
        assert block.side_inputs == (encoder.blocks[-1].output,)


def test_both_towers() -> None:
    assert _counts(towers()) == [2, 3]


def test_shared_weights_are_said() -> None:
    (repeat,) = find_repeats(captured(lambda: Shared(3)))
    assert len(repeat.shared_weights()) == 6 == len(repeat.blocks[0].weights)
    (repeat,) = find_repeats(gated(3))
    assert repeat.shared_weights() == ()


def test_repeats_within_blocks() -> None:
    def pair() -> nn.Module:
        return nn.Sequential(Residual(), Residual(), PostNorm())

    (outer,) = find_repeats(captured(lambda: Stack(pair(), pair())))
    assert len(outer.blocks) == 2
    for block in outer.blocks:
        (inner,) = block.inner
        assert len(inner.blocks) == 2 and inner.blocks[0].input is block.input
        _check(inner)


def test_a_post_norm_block_ends_in_its_norm() -> None:
    (repeat,) = find_repeats(captured(lambda: Stack(nn.LayerNorm(8), PostNorm(), PostNorm())))
    assert [str(node.target) for node in repeat.blocks[0].cut_points] == ["aten.add.Tensor", "aten.layer_norm.default"]
    assert str(repeat.blocks[0].input.target) == "aten.layer_norm.default"


@pytest.mark.parametrize(
    "blocks",
    [
        lambda: (Residual(), PostNorm(), Residual()),
        lambda: (Residual(8), nn.Linear(8, 16), Residual(16)),
        lambda: (Residual(), nn.ReLU(), Residual(), nn.GELU()),
        lambda: (nn.ReLU(), nn.ReLU(), nn.ReLU()),
    ],
    ids=["other order", "other width", "other operator", "no weights"],
)
def test_what_differs_or_has_no_weights_is_no_repeat(blocks: Callable[[], tuple[nn.Module, ...]]) -> None:
    assert find_repeats(captured(lambda: Stack(*blocks()))) == ()


def test_values_returned_from_inside_hide_blocks_unless_they_are_not_counted() -> None:
    program = captured(lambda: KeyValues(3))
    assert find_repeats(program) == ()
    (repeat,) = find_repeats(program, outputs=[program.outputs[0].name])
    assert len(repeat.blocks) == 3
    for block in repeat.blocks:
        assert not block.is_closed and [str(node.target) for node in block.live_outs[1:]] == ["aten.linear.default"]
    with pytest.raises(UnknownNameError, match="output 'logits'"):
        find_repeats(program, outputs=["logits"])


def test_what_differs_at_the_side_stays_at_the_side() -> None:
    """Each block's constant belongs to it; the row of a table, another one for each block, is its side input."""
    (repeat,) = find_repeats(captured(lambda: PerLayerTable(3)))
    for block in repeat.blocks:
        targets = [str(node.target) for node in block.nodes]
        assert "aten.arange.default" in targets and "aten.cos.default" in targets
        assert [str(node.target) for node in block.side_inputs] == ["aten.select.int"]


def test_an_input_around_all_blocks_hides_the_first() -> None:
    assert _counts(captured(lambda: Skipped(*(Residual() for _ in range(4))))) == [3]


def test_a_condition_made_inside_a_block_belongs_to_it() -> None:
    (repeat,) = find_repeats(captured(lambda: Stack(*(Thresholded() for _ in range(3)))))
    assert len(repeat.blocks) == 3
    _check(repeat)
    assert "aten.gt.Scalar" in {str(node.target) for node in repeat.blocks[0].nodes}


def _deep(layers: int) -> Program:
    """x -> x + linear(relu(x)) many times, written straight into a graph."""
    mode, root, graph = FakeTensorMode(), nn.Module(), Graph()
    with mode:
        activation, weight = torch.empty(2, 8), torch.empty(8, 8)

    def noted(node: Node, value: torch.Tensor) -> Node:
        node.meta["val"] = value
        return node

    x = noted(graph.placeholder("x"), activation)
    for layer in range(layers):
        root.register_buffer(f"w{layer}", torch.zeros(8, 8))
        matrix = noted(graph.get_attr(f"w{layer}"), weight)
        relu = noted(graph.call_function(aten.relu.default, (x,)), activation)
        linear = noted(graph.call_function(aten.linear.default, (relu, matrix)), activation)
        x = noted(graph.call_function(aten.add.Tensor, (x, linear)), activation)
    graph.output((x,))
    specs = [TensorSpec(name, torch.float32, (2, 8)) for name in "xy"]
    return Program(GraphModule(root, graph), (specs[0],), (specs[1],), (torch.zeros(2, 8),))


def test_thousands_of_blocks() -> None:
    (repeat,) = find_repeats(_deep(2500))
    assert len(repeat.blocks) == 2500 and len(repeat.rows()) == 5


def test_counterparts() -> None:
    (repeat,) = find_repeats(models.program("gpt2"))
    node = repeat.blocks[0].nodes[7]
    assert repeat.counterparts(node) == (node, repeat.blocks[1].nodes[7])
    assert repeat.counterparts(next(iter(models.program("gpt2").nodes()))) == ()
