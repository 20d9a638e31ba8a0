from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.data.accumulators import Accumulator, Histogram, Moments, SecondMoment, Statistics
from graphopt.data.dataset import Sample
from graphopt.data.statistics import collect, observe
from graphopt.errors import UnknownNameError, UsageError, VerificationError
from tests.models import program
from tests.passes.checking import captured

CHUNKS = [torch.randn(size, 4, generator=torch.Generator().manual_seed(size)) * size + 100 for size in (1, 5, 2, 9)]
ALL = torch.cat(CHUNKS)


def fed(accumulator: Any, chunks: list[Tensor]) -> Any:
    for chunk in chunks:
        accumulator.update(chunk)
    return accumulator


def close(left: Any, right: Any) -> None:
    for name in vars(left):
        torch.testing.assert_close(getattr(left, name), getattr(right, name), equal_nan=True, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [None, 1, -1])
def test_moments_are_those_of_all_values_at_once(axis: int | None) -> None:
    found: Statistics | None = fed(Moments(axis), CHUNKS).result()
    wide = ALL.double()
    rows = wide.reshape(1, -1) if axis is None else wide.T
    expected = {
        "count": torch.full((len(rows),), rows.shape[1]),
        "nonfinite": torch.zeros(len(rows), dtype=torch.int64),
        "minimum": rows.amin(1),
        "maximum": rows.amax(1),
        "mean": rows.mean(1),
        "variance": rows.var(1, correction=0),
        "absolute_mean": rows.abs().mean(1),
        "absolute_maximum": rows.abs().amax(1),
    }
    assert found is not None
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value if axis is not None else value[0], rtol=1e-13, atol=0.0)


def test_channels_pool_to_the_whole_tensor() -> None:
    channels, whole = fed(Moments(1), CHUNKS).result(), fed(Moments(), CHUNKS).result()
    close(channels.per_tensor(), whole)


@pytest.mark.parametrize("make", [Moments, lambda: Moments(1), lambda: Histogram(16), SecondMoment])
def test_order_and_merging_do_not_matter(make: Any) -> None:
    expected = fed(make(), [ALL]).result()
    close(fed(make(), CHUNKS[::-1]).result(), expected)
    left, right, empty = fed(make(), CHUNKS[:1]), fed(make(), CHUNKS[1:]), make()
    for other in (right, make()):
        left.merge(other)
    empty.merge(left)
    close(empty.result(), expected)
    assert make().result() is None


def test_a_variance_far_from_zero() -> None:
    values = 1e8 + torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert float(fed(Moments(), [values] * 1000).result().variance) == pytest.approx(0.25, rel=1e-9)


def test_infinities_and_nan_are_counted_apart() -> None:
    value = torch.tensor([[1.0, math.inf, math.nan], [3.0, -math.inf, math.nan]])
    found = fed(Moments(1), [value, value]).result()
    assert found.count.tolist() == [4, 0, 0] and found.nonfinite.tolist() == [0, 4, 4]
    assert found.mean[0] == 2.0 and bool(found.mean[1:].isnan().all() & found.minimum[1:].isnan().all())
    assert (float(found.per_tensor().mean), int(found.per_tensor().nonfinite)) == (2.0, 8)
    assert fed(Histogram(4), [value]).result().nonfinite == 4
    products = fed(SecondMoment(), [value, torch.ones(1, 3)]).result()
    assert (products.rows, products.nonfinite_rows) == (1, 2) and bool((products.mean == 1).all())


@pytest.mark.parametrize("bins", [2, 3, 16, 100])
@pytest.mark.parametrize(
    "chunks",
    [
        CHUNKS,
        [torch.tensor([0.0]), torch.tensor([1e-30]), torch.tensor([5.0]), torch.tensor([-7e20, 3.0])],
        [torch.tensor([7.25]), torch.tensor([7.25, 7.5])],
        [torch.tensor([1e300, -1e300], dtype=torch.float64), torch.tensor([1.0])],
    ],
    ids=["normal", "growing", "constant", "huge"],
)
def test_a_histogram_is_that_of_all_values_at_once(bins: int, chunks: list[Tensor]) -> None:
    values = torch.cat([chunk.reshape(-1).double() for chunk in chunks])
    for order in (chunks, chunks[::-1], [values]):
        found = fed(Histogram(bins), order).result()
        inside = (values >= found.edges[:-1, None]) & (values < found.edges[1:, None])
        assert found.counts.tolist() == inside.sum(1).tolist() and int(found.counts.sum()) == len(values)
        close(found, fed(Histogram(bins), [values]).result())


def test_a_histogram_uses_its_bins() -> None:
    found = fed(Histogram(2048), [torch.linspace(-3, 5, 10_000)]).result()
    assert 2048 / 2 - 2 <= int((found.counts > 0).sum()) <= 2048
    for share in (0.001, 0.25, 0.5, 0.999):
        assert found.quantile(share) == pytest.approx(-3 + 8 * share, abs=0.01)
    assert found.quantile(0.0) <= -2.99 and found.quantile(1.0) >= 4.99


def test_what_accumulators_refuse() -> None:
    cases: list[tuple[Any, list[Tensor], str]] = [
        (Moments(1), [torch.zeros(2, 3), torch.zeros(2, 4)], "4 channels in one sample and 3 in those before"),
        (Moments(2), [torch.zeros(2, 3)], "axis 2 does not exist in a value of 2 axes"),
        (Moments(), [torch.zeros(1, dtype=torch.complex64)], "complex"),
        (SecondMoment(), [torch.zeros(2, 3), torch.zeros(2, 4)], "4 features after 3"),
        (SecondMoment(), [torch.tensor(1.0)], "need an axis of features"),
    ]
    for accumulator, chunks, words in cases:
        with pytest.raises(UsageError, match=words):
            fed(accumulator, chunks)
    with pytest.raises(UsageError, match="cannot grow"):
        Histogram(1)
    with pytest.raises(UsageError, match="cannot be merged"):
        Histogram(4).merge(Histogram(8))


def test_empty_tensors_are_no_values() -> None:
    for accumulator in (Moments(), Moments(1), Histogram(), SecondMoment()):
        assert fed(accumulator, [torch.zeros(0, 3)]).result() is None
        assert fed(accumulator, [torch.ones(1, 3)]).result() is not None


def samples(*parts: Tensor) -> list[Sample]:
    return [Sample((part,)) for part in parts]


def test_statistics_at_nodes() -> None:
    mlp = program("mlp")
    parts = [torch.randn(size, 16) for size in (2, 1, 4)]
    hidden = torch.cat([_hidden(part) for part in parts]).double()
    relu = next(node.name for node in mlp.nodes() if "relu" in node.name)
    found = collect(mlp, ["x", relu], samples(*parts), axis=1)
    torch.testing.assert_close(_known(found["x"]).mean, torch.cat(parts).double().mean(0))
    torch.testing.assert_close(_known(found[relu]).maximum, hidden.amax(0))
    whole = _known(collect(mlp, [relu], samples(*parts))[relu])
    torch.testing.assert_close(whole.variance, hidden.var(correction=0))
    assert whole.count.item() == hidden.numel()


def _known(found: Statistics | None) -> Statistics:
    assert found is not None
    return found


def _hidden(x: Tensor) -> Tensor:
    mlp = program("mlp")
    weight, bias = (dict(mlp.graph_module.state_dict())[name] for name in ("first.weight", "first.bias"))
    return torch.relu(nn.functional.linear(x, weight, bias))


def test_branches_are_named_by_path_and_unreached_ones_said() -> None:
    branching = program("branching")
    inside = [f"{path}.{node.name}" for path, module in branching.graphs() if path for node in module.graph.nodes]
    large = next(name for name in inside if name.startswith("true_graph_0.relu"))
    small = next(name for name in inside if name.startswith("false_graph_0.linear"))
    found = collect(branching, [large, small], samples(torch.ones(3, 8), torch.ones(1, 8)))
    assert found[small] is None and int(_known(found[large]).count) == 4 * 32
    moments = {name: [Moments()] for name in (large, small)}
    assert observe(branching, moments, samples(torch.ones(3, 8), -torch.ones(1, 8))) == {large: 1, small: 1}


def test_hessian_of_a_linear() -> None:
    parts = [torch.randn(2, 16), torch.randn(3, 16)]
    accumulator = SecondMoment()
    observe(program("mlp"), {"x": [accumulator]}, samples(*parts))
    wide = torch.cat(parts).double()
    found = accumulator.result()
    assert found is not None and found.rows == 5
    torch.testing.assert_close(found.mean, wide.T @ wide / 5)


class Alive:
    """An accumulator of one's own: how many values it was shown are alive still."""

    def __init__(self) -> None:
        self.seen: list[weakref.ref[Tensor]] = []

    def update(self, value: Tensor) -> None:
        assert self.result() <= 1  # of the sample before, what its own loop still holds
        self.seen.append(weakref.ref(value))

    def result(self) -> int:
        return sum(ref() is not None for ref in self.seen)


@pytest.mark.parametrize(("name", "width"), [("mlp", 16), ("branching", 8)])
def test_no_value_is_kept(name: str, width: int) -> None:
    given = program(name)
    nodes = [
        f"{path}.{node.name}".lstrip(".")
        for path, module in given.graphs()
        for node in module.graph.nodes
        if node.op == "call_function" and isinstance(node.meta["val"], Tensor)
    ]
    alive = {node: Alive() for node in nodes}
    watching: dict[str, list[Accumulator]] = {node: [alive[node], Moments(), Histogram(64)] for node in nodes}
    seen = observe(given, watching, (Sample((torch.randn(2, width) + sign,)) for sign in (1, -1) * 4))
    assert sum(seen.values()) > 8
    assert [node for node in nodes if alive[node].result()] == []


def test_what_cannot_be_watched() -> None:
    mlp = program("mlp")
    with pytest.raises(UnknownNameError, match="unknown node 'rel'"):
        collect(mlp, ["rel"], samples(torch.zeros(1, 16)))
    with pytest.raises(UsageError, match="statistics of node 'x': axis 3 does not exist") as refused:
        collect(mlp, ["x"], samples(torch.zeros(1, 16)), axis=3)
    assert "\n" not in str(refused.value)

    class Top(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values, _ = x.max(1)
            return values

    top = captured(Top(), torch.zeros(2, 3))
    name = next(node.name for node in top.nodes() if node.op == "call_function" and "getitem" not in node.name)
    with pytest.raises(UsageError, match=f"node '{name}' gives .*, not one tensor"):
        collect(top, [name], samples(torch.zeros(2, 3)))
    with pytest.raises(VerificationError, match="cannot run sample 0"):
        collect(program("tied"), ["ids"], samples(torch.tensor([[99]])))
