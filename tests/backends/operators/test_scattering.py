"""Elements written to places: along an axis, by several tensors of positions, where a mask is true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.errors import CompileError

Check = Callable[..., Any]


def test_along_an_axis(agree: Check) -> None:
    cases = {
        "index_add": lambda x, ids, y: x.index_add(1, ids, y),
        "index_add_alpha": lambda x, ids, y: x.index_add(-1, ids, y, alpha=3),
        "index_copy": lambda x, ids, y: x.index_copy(1, ids[:4].argsort(), y[:, :4]),
        "index_add_first": lambda x, ids, y: x.t().index_add(0, ids, y.t()),
        "scatter_reduce_add": lambda x, ids, y: x.scatter(1, ids.expand(y.shape), y, reduce="add"),
        "scatter_reduce_multiply": lambda x, ids, y: x.scatter(1, ids.expand(y.shape), 2.0, reduce="multiply"),
    }
    ids = torch.tensor([4, 0, 2, 4, 1, 0])
    dynamic = [{0: "rows"}, None, {0: "rows"}]
    agree(cases, [torch.randn(3, 5), ids, torch.randn(3, 6)], dynamic, [(torch.randn(8, 5), ids, torch.randn(8, 6))])


def test_assignment_to_places(agree: Check) -> None:
    def cache(x: Tensor, ids: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x[:, ids] = y
        return x

    def masked(x: Tensor, ids: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x[x > 0] = -1.0
        return x

    def masked_rows(x: Tensor, ids: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x[:, ids.new_tensor([1, 0, 0, 1, 0, 0, 1]) > 0] = y[0, 0]
        return x

    agree(
        {"cache": cache, "masked": masked, "masked_rows": masked_rows},
        [torch.randn(2, 7, 20), torch.tensor([5, -1, 0]), torch.randn(2, 3, 20)],
        [{0: "batch"}, {0: "new"}, {0: "batch", 1: "new"}],
        [(torch.randn(3, 7, 20), torch.tensor([5, 2]), torch.randn(3, 2, 20))],
    )


def test_many_writes_to_one_place_do_not_depend_on_threads(compiled: Check) -> None:
    inputs = torch.zeros(3, 4), torch.randint(0, 3, (2000,)), torch.randn(2000, 4)
    run = compiled({"add": lambda x, ids, y: x.index_add(0, ids, y)}, inputs)
    first = run(*inputs)[0]
    assert all(torch.equal(run(*inputs)[0], first) for _ in range(5))


def test_a_place_outside_is_the_nearest_one(compiled: Check) -> None:
    run = compiled({"scatter": lambda x, ids: x.scatter(0, ids, 1.0)}, [torch.zeros(4), torch.tensor([0, 1])])
    assert run(torch.zeros(4), torch.tensor([99, -99]))[0].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_different_values_for_a_mask_are_refused(compiled: Check) -> None:
    def assign(x: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        return torch.ops.aten.index_put.default(x, [mask], y)

    with pytest.raises(CompileError, match="known when it runs"):
        compiled({"assign": assign}, [torch.zeros(3), torch.tensor([True, False, True]), torch.ones(2)])
