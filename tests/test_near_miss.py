from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from graphopt.matcher import find_match, trace_pattern
from graphopt.near_miss import describe, nearest_miss

aten = torch.ops.aten


def scaled(x: Any, y: Any) -> Any:
    return aten.mul.Tensor(aten.relu.default(x), aten.sin.default(y))


def repeated(x: Any) -> Any:
    return aten.sub.Tensor(aten.exp.default(x), x)


def summed(x: Any) -> Any:
    return aten.sum.dim_IntList(aten.exp.default(x), [1], True)


def split(x: Any, y: Any) -> Any:
    return aten.sin.default(x), aten.cos.default(x), aten.add.Tensor(x, y)


def halves(x: Any) -> Any:
    parts = aten.split.Tensor(x, 2, -1)
    return aten.mul.Tensor(operator.getitem(parts, 0), operator.getitem(parts, 1))


def miss(pattern: Callable[..., Any], build: Callable[[Graph, Node, Node], Node]) -> tuple[str, int, int]:
    graph = Graph()
    anchor = build(graph, graph.placeholder("x"), graph.get_attr("w"))
    traced = trace_pattern(pattern)
    assert find_match(traced, anchor) is None
    return nearest_miss(traced, anchor)


def call(graph: Graph, target: Any, *arguments: Any) -> Node:
    return graph.call_function(target, arguments)


CASES: dict[str, tuple[Callable[..., Any], Callable[[Graph, Node, Node], Node], str, int, int]] = {
    "the order of a product with which more is found": (
        scaled,
        lambda g, x, w: call(g, aten.mul.Tensor, call(g, aten.sin.default, x), call(g, aten.tanh.default, w)),
        "input of mul_tensor is tanh_default (aten.tanh.default) where the pattern has aten.relu.default",
        2,
        3,
    ),
    "nothing below the anchor": (
        scaled,
        lambda g, x, w: call(g, aten.mul.Tensor, x, w),
        "input of mul_tensor is x (an input) where the pattern has aten.relu.default",
        1,
        3,
    ),
    "two values where the pattern has one": (
        repeated,
        lambda g, x, w: call(g, aten.sub.Tensor, call(g, aten.exp.default, x), w),
        "x is x (an input) in one place and w (a constant) in another",
        2,
        2,
    ),
    "an item of a list": (
        summed,
        lambda g, x, w: call(g, aten.sum.dim_IntList, call(g, aten.exp.default, x), [0], True),
        "dim of sum_dim_int_list is 0 where the pattern has 1",
        2,
        2,
    ),
    "a list of another length": (
        summed,
        lambda g, x, w: call(g, aten.sum.dim_IntList, call(g, aten.exp.default, x), [1, 2], True),
        "dim of sum_dim_int_list is [1, 2] where the pattern has [1]",
        2,
        2,
    ),
    "a default that is not given": (
        summed,
        lambda g, x, w: call(g, aten.sum.dim_IntList, call(g, aten.exp.default, x), [1]),
        "keepdim of sum_dim_int_list is False where the pattern has True",
        2,
        2,
    ),
    "an output that is not there": (
        split,
        lambda g, x, w: (call(g, aten.add.Tensor, x, w), call(g, aten.sin.default, x))[1],
        "nothing reads x with aten.cos.default",
        2,
        3,
    ),
    "a function of Python": (
        halves,
        lambda g, x, w: call(g, aten.mul.Tensor, call(g, operator.getitem, w, 0), x),
        "argument 0 of getitem is w (a constant) where the pattern has aten.split.Tensor",
        2,
        4,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_most_that_is_found_and_the_first_difference(case: str) -> None:
    pattern, build, reason, matched, total = CASES[case]
    assert miss(pattern, build) == (reason, matched, total)


def test_values_are_described_by_what_they_are() -> None:
    graph = Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    item = call(graph, operator.getitem, x, 0)
    found = describe([x, w, item, 2.0, None])
    assert found == "[x (an input), w (a constant), getitem (operator.getitem), 2.0, None]"
