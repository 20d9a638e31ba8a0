from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from graphopt.errors import UsageError
from graphopt.matcher import Match, argument, arguments, find_match, trace_pattern

aten = torch.ops.aten


def calls(function: Callable[..., Any]) -> list[Node]:
    """The calls of a traced function, last one first."""
    graph: Graph = torch.fx.Tracer().trace(function)
    return [node for node in reversed(graph.nodes) if node.op == "call_function"]


def matched(pattern: Callable[..., Any], function: Callable[..., Any]) -> Match | None:
    nodes = calls(function)
    found = (find_match(trace_pattern(pattern), node) for node in nodes)
    return next((match for match in found if match is not None), None)


def linear(x: Any, w: Any) -> Any:
    return aten.linear.default(x, w)


def biased(x: Any, w: Any, b: Any) -> Any:
    return aten.linear.default(x, w, b)


def test_arguments_left_out_are_filled_in() -> None:
    (node,) = calls(lambda x, w: aten.conv2d.default(x, w, stride=[2, 2]))
    assert arguments(node)[2:] == (None, [2, 2], [0, 0], [1, 1], 1)
    assert argument(node, "groups") == 1


def test_a_default_given_or_left_out_is_the_same() -> None:
    assert matched(linear, lambda x, w: aten.linear.default(x, w, None)) is not None
    assert matched(linear, lambda x, w: aten.linear.default(x, weight=w)) is not None
    assert matched(linear, lambda x, w, b: aten.linear.default(x, w, b)) is None


def test_a_variable_in_an_optional_place_is_bound_to_none() -> None:
    match = matched(biased, lambda x, w: aten.linear.default(x, w))
    assert match is not None and match.bindings["b"] is None


def test_commutation() -> None:
    def pattern(x: Any, y: Any) -> Any:
        return aten.add.Tensor(aten.relu.default(x), aten.sin.default(y))

    match = matched(pattern, lambda x, y: aten.add.Tensor(aten.sin.default(y), aten.relu.default(x)))
    assert match is not None and match.bindings["x"].name == "x"
    assert matched(pattern, lambda x, y: aten.add.Tensor(aten.sin.default(y), aten.relu.default(x), alpha=2)) is None
    assert matched(pattern, lambda x, y: aten.sub.Tensor(aten.relu.default(x), aten.sin.default(y))) is None


def test_a_scaled_add_does_not_commute() -> None:
    def pattern(x: Any, y: Any) -> Any:
        return aten.add.Tensor(aten.relu.default(x), y, alpha=2)

    assert matched(pattern, lambda x, y: aten.add.Tensor(aten.relu.default(x), y, alpha=2)) is not None
    assert matched(pattern, lambda x, y: aten.add.Tensor(y, aten.relu.default(x), alpha=2)) is None


def test_a_repeated_variable_is_one_value() -> None:
    def pattern(x: Any) -> Any:
        return aten.mul.Tensor(x, aten.sigmoid.default(x))

    assert matched(pattern, lambda x, y: aten.mul.Tensor(aten.sigmoid.default(x), x)) is not None
    assert matched(pattern, lambda x, y: aten.mul.Tensor(aten.sigmoid.default(x), y)) is None


@pytest.mark.parametrize(("literal", "fits"), [(1, True), (1.0, False), (True, False), (2, False)])
def test_literals_match_by_value_and_type(literal: object, fits: bool) -> None:
    def pattern(x: Any) -> Any:
        return aten.mul.Tensor(x, 1)

    assert (matched(pattern, lambda x: aten.mul.Tensor(x, literal)) is not None) is fits


def test_lists_match_item_by_item() -> None:
    def pattern(x: Any, rows: Any) -> Any:
        return aten.view.default(x, [rows, 4])

    match = matched(pattern, lambda x: aten.view.default(x, [8, 4]))
    assert match is not None and match.bindings["rows"] == 8
    assert matched(pattern, lambda x: aten.view.default(x, [8, 2, 2])) is None


def test_an_inner_value_with_another_reader_escapes() -> None:
    def pattern(x: Any) -> Any:
        return aten.relu.default(aten.sin.default(x))

    def reads_twice(x: Any) -> Any:
        y = aten.sin.default(x)
        return aten.relu.default(y), aten.cos.default(y)

    match = matched(pattern, reads_twice)
    assert match is not None
    assert match.escape() == "the inner value sin_default is also used by cos_default"


def test_several_outputs_share_an_input() -> None:
    def pattern(x: Any) -> Any:
        return aten.sin.default(x), aten.relu.default(aten.cos.default(x))

    match = matched(pattern, lambda x: (aten.relu.default(aten.cos.default(x)), aten.sin.default(x)))
    assert match is not None
    assert [node.name for node in (*match.outputs, *match.inner)] == ["sin_default", "relu_default", "cos_default"]
    assert matched(pattern, lambda x, y: (aten.relu.default(aten.cos.default(y)), aten.sin.default(x))) is None


def test_two_calls_of_a_pattern_are_two_nodes() -> None:
    def pattern(x: Any, v: Any, w: Any) -> Any:
        return aten.linear.default(x, v), aten.linear.default(x, w)

    assert matched(pattern, lambda x, v: aten.linear.default(x, v)) is None
    assert matched(pattern, lambda x, v, w: (aten.linear.default(x, v), aten.linear.default(x, w))) is not None


def test_a_pattern_that_is_a_variable_is_refused() -> None:
    with pytest.raises(UsageError, match="must return calls of operators"):
        trace_pattern(lambda x: x)


def test_an_unused_parameter_is_refused() -> None:
    with pytest.raises(UsageError, match="never uses its parameter 'y'"):
        trace_pattern(lambda x, y: aten.relu.default(x))
