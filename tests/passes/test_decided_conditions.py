from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from graphopt.contract import PassContext
from graphopt.passes.decided_conditions import COMPARISONS, DecidedConditions
from tests.passes.checking import captured, check_pass, targets


class Function(nn.Module):
    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x)


ALL, SOME = torch.ones(1, 6, dtype=torch.bool), torch.arange(6) > 2
FIRES = [
    lambda x: (torch.arange(6) >= 0) & (x > 0),
    lambda x: (x > 0) & (torch.arange(6) + 3 > 2),
    lambda x: (torch.arange(6) * 2 < 0) | (x > 0),
    lambda x: torch.ones(4, 1, dtype=torch.bool) & (x > 0),
    lambda x: (torch.arange(1, 6, 2)[:, None, None] != 0) & (x > 0),
    lambda x: ALL & (x > 0),
]
DECLINES = [
    (lambda x: (torch.arange(6) >= 3) & (x > 0), "values from 0 to 5 do not decide a comparison with 3"),
    (lambda x: (torch.arange(6) - 2 > -2) & (x > 0), "values from -2 to 3 do not decide a comparison with -2"),
]


@pytest.mark.parametrize("function", FIRES)
def test_decided_mask_leaves_the_other_condition(function: Callable[..., object]) -> None:
    program = captured(Function(function), torch.randn(4, 6))
    count = len(DecidedConditions().run(program, PassContext()).rewrites)
    result = check_pass(program, DecidedConditions(), rewrites=count)
    assert count > 0
    assert not {"aten.__and__", "aten.__or__"} & set(targets(result.program))


@pytest.mark.parametrize(("function", "words"), DECLINES)
def test_open_comparison_is_declined(function: Callable[..., object], words: str) -> None:
    result = check_pass(captured(Function(function), torch.randn(4, 6)), DecidedConditions(), rewrites=0)
    assert [item.reason for item in result.declined] == [words]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x >= 0) & (x > 1),
        lambda x: x.long() & 0,
        lambda x: SOME & (x > 0),
        lambda x: (torch.arange(6, dtype=torch.int8) + 120 > 0) & (x > 0),  # int8 wraps around
    ],
)
def test_unknown_values_are_left_alone(function: Callable[..., object]) -> None:
    check_pass(captured(Function(function), torch.randn(4, 6)), DecidedConditions(), rewrites=0)


@pytest.mark.parametrize("comparison", COMPARISONS)
@pytest.mark.parametrize("number", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("ends", [(0, 2), (1, 1), (-1, 0)])
def test_every_decision_holds_for_every_value(comparison: object, number: int, ends: tuple[int, int]) -> None:
    outcome = COMPARISONS[comparison](*ends, number)
    results = {bool(comparison(torch.tensor(value), number)) for value in range(ends[0], ends[1] + 1)}  # type: ignore[operator]
    assert results == ({True, False} if outcome is None else {outcome})


def attention(mask: torch.Tensor, **options: object) -> Callable[..., torch.Tensor]:
    return lambda x: nn.functional.scaled_dot_product_attention(x, x, x, mask, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", [torch.ones(6, 6, dtype=torch.bool), torch.zeros(1, 6)], ids=["true", "zero"])
def test_a_mask_that_leaves_nothing_out_goes(mask: torch.Tensor) -> None:
    result = check_pass(captured(Function(attention(mask, scale=0.3)), torch.randn(2, 6, 4)), DecidedConditions(), 1)
    (node,) = result.program.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    assert node.all_input_nodes == result.program.graph_module.graph.find_nodes(op="placeholder")
    assert node.kwargs["scale"] == 0.3


@pytest.mark.parametrize("mask", [torch.eye(6).bool(), torch.full((1, 6), -0.5)], ids=["eye", "added"])
def test_other_masks_stay(mask: torch.Tensor) -> None:
    check_pass(captured(Function(attention(mask)), torch.randn(2, 6, 4)), DecidedConditions(), rewrites=0)
