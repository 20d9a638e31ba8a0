"""Costs against formulas by hand and against torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import graphopt
from graphopt.analysis.blocks import find_repeats
from graphopt.analysis.cost import Cost, node_costs, total_cost
from graphopt.analysis.storage import stored_weights
from graphopt.errors import FeedError, UnknownNameError
from graphopt.program import Program
from tests import models
from tests.analysis.residual_models import Shared, captured


def _total(program: Program, **sizes: int) -> Cost:
    return total_cost(node_costs(program, sizes).values())


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _macs_by_torch(program: Program) -> int:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: _attention}) as counter:
        program(*program.examples)
    return int(counter.get_total_flops()) // 2


SLOW = ("llama", "t5_encoder", "mobilenet_v2", "vit", "convnext")  # seconds each to capture
NAMES = ["mlp", "conv_net", "branching", "tied", "bert", "gpt2", "resnet", *models.ZOO]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NAMES])
def test_macs_agree_with_torch(name: str) -> None:
    program = models.program(name)
    assert _total(program).macs == _macs_by_torch(program) > 0


def test_a_block_of_bert_by_hand() -> None:
    program = models.program("bert")
    width, inner = 32, 64
    for batch, rows in ((2, 6), (3, 11)):
        costs = node_costs(program, {"batch": batch, "seq": rows})
        (repeat,) = find_repeats(program)
        for block in repeat.blocks:
            cost = total_cost(costs[node] for node in block.nodes)
            linears = batch * rows * (4 * width * width + 2 * width * inner)
            assert cost.macs == linears + 2 * batch * rows * rows * width
            assert cost.weight_bytes == 4 * (
                4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
            )


CALLS: list[tuple[Callable[..., Any], tuple[tuple[int, ...], ...], int]] = [
    (lambda a, b: torch.einsum("bij,bjk->bik", a, b), ((2, 3, 4), (2, 4, 5)), 2 * 3 * 4 * 5),
    (lambda a, b: torch.einsum("...ij,...jk->...ik", a, b), ((7, 1, 3, 4), (2, 4, 5)), 7 * 2 * 3 * 4 * 5),
    (lambda a, b: a @ b, ((2, 3, 4), (4,)), 2 * 3 * 4),
    (lambda a, b: torch.conv_transpose2d(a, b), ((1, 3, 5, 5), (3, 4, 2, 2)), 3 * 25 * 4 * 4),
    (lambda a, b: torch.conv2d(a, b, groups=2), ((1, 4, 5, 5), (6, 2, 3, 3)), 6 * 9 * 2 * 9),
    (lambda a, b: torch.conv1d(a, b), ((1, 3, 9), (4, 3, 2)), 4 * 8 * 3 * 2),
    (lambda a, b: torch.baddbmm(a, b, b), ((2, 3, 3), (2, 3, 3)), 54),
    (lambda a, b: a * b, ((2, 3), (2, 3)), 0),
]


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.function(a, b)


@pytest.mark.parametrize(("function", "shapes", "macs"), CALLS)
def test_macs_of_single_calls(function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], macs: int) -> None:
    program = captured(lambda: Function(function), *(torch.randn(shape) for shape in shapes))
    assert _total(program).macs == macs


def test_recurrent_layers() -> None:
    program = captured(lambda: nn.LSTM(4, 6, num_layers=2, bidirectional=True), torch.randn(5, 3, 4))
    first, second = 24 * (4 + 6), 24 * (12 + 6)
    assert _total(program).macs == 5 * 3 * 2 * (first + second)


def test_bytes_and_elementwise_operations_of_single_calls() -> None:
    def cost(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Cost:
        return _total(captured(lambda: Function(function), *(torch.randn(shape) for shape in shapes)))

    assert cost(lambda a, b: a + b, (3, 4), (4,)) == Cost(0, 12, 4 * (12 + 4), 4 * 12)
    assert cost(lambda a, b: a.sum(0) * 1.5, (3, 4), (1,)) == Cost(0, 12 + 4, 4 * (12 + 4), 4 * (4 + 4))
    assert cost(lambda a, b: a.t().clone(), (3, 4), (1,)) == Cost(0, 0, 4 * 12, 4 * 12)
    assert cost(lambda a, b: a.expand(5, 4) * b, (1, 4), (5, 1)) == Cost(0, 20, 4 * (4 + 5), 4 * 20)
    assert cost(lambda a, b: torch.erfinv(a), (3, 4), (1,)).elementwise == 12  # in no table
    assert cost(lambda a, b: (a > 0) & (a < 1), (3, 4), (1,)).elementwise == 0


def test_a_table_is_read_as_far_as_rows_are_taken() -> None:
    program = captured(lambda: nn.Embedding(1000, 8), torch.tensor([3, 5]))
    assert _total(program) == Cost(0, 0, 2 * 8, 2 * 8 * 4, {"weight": 2 * 8 * 4})


def test_weights_count_once_in_a_sum() -> None:
    program = captured(lambda: Shared(3))
    costs = node_costs(program)
    (repeat,) = find_repeats(program)
    blocks = [total_cost(costs[node] for node in block.nodes) for block in repeat.blocks]
    assert len({cost.weight_bytes for cost in blocks}) == 1
    assert total_cost(blocks).weight_bytes == blocks[0].weight_bytes
    assert total_cost(blocks).macs == 3 * blocks[0].macs
    assert blocks[0].bytes == blocks[0].read + blocks[0].written + blocks[0].weight_bytes


def test_a_condition_costs_its_dearer_branch() -> None:
    cost = _total(models.program("branching"), batch=5)
    assert cost.macs == 5 * 2 * 8 * 32
    assert set(cost.weights) == {"large.0.weight", "large.0.bias", "large.2.weight", "large.2.bias"}


def test_sizes_come_from_the_caller_else_from_the_examples() -> None:
    program = models.program("mlp")
    assert _total(program).macs == 3 * 2 * 16 * 32
    assert _total(program, batch=7).macs == 7 * 2 * 16 * 32
    with pytest.raises(UnknownNameError, match="did you mean 'batch'"):
        node_costs(program, {"batches": 1})


def test_a_size_without_a_value() -> None:
    program = replace(models.program("bert"), examples=())
    with pytest.raises(FeedError, match="size 'seq' has no value"):
        node_costs(program, {"batch": 2})
    assert _total(program, batch=2, seq=6) == _total(models.program("bert"))


def test_storage_counts_tied_weights_and_views_once() -> None:
    program = models.program("tied")
    stored = stored_weights(program)
    assert sorted(item.elements for item in stored) == [3 * 8, 20 * 8]
    assert sum(item.bytes for item in stored) == 4 * 23 * 8
    assert [item.names for item in stored if len(item.names) > 1] == [("rows", "last_row")]


def test_storage_of_separate_weights_is_separate() -> None:
    program = graphopt.capture(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval(), (torch.randn(1, 3),))
    assert [(item.elements, len(item.names)) for item in stored_weights(program)] == [(9, 1), (3, 1)] * 2
