"""Blocks that share weights: alignment that changes nothing, terms that give back what sharing takes, stored once."""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.analysis.storage import stored_weights
from graphopt.contract import PassContext
from graphopt.data.dataset import open_data
from graphopt.data.metric import open_metric
from graphopt.errors import UsageError
from graphopt.passes.block_folding import BlockFolding
from graphopt.passes.block_folding.alignment import align
from graphopt.passes.block_folding.assignment import best_assignment
from graphopt.passes.block_folding.blocks import Blocks, find_blocks
from graphopt.passes.block_folding.hidden_units import HiddenUnits, Weights, find_hidden_units
from graphopt.passes.block_folding.terms import least_squares_scale, low_rank
from graphopt.program import Program, get_attribute, set_attribute
from tests.passes.checking import captured, fingerprint

WIDTH, HEADS, HIDDEN = 16, 4, 24


class Split(nn.Module):
    """Queries, keys and values from weights of their own; two of the four heads share keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            product(x).view(batch, length, heads, -1).transpose(1, 2)
            for product, heads in ((self.query, HEADS), (self.key, HEADS // 2), (self.value, HEADS // 2))
        )
        key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
        found = torch.softmax(query @ key.transpose(2, 3) / 2, dim=-1) @ value
        return self.out(found.transpose(1, 2).reshape(batch, length, WIDTH))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Distant(nn.Module):
    """Every head forgets at a rate of its own, as in ALiBi."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.packed(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        place = torch.arange(x.shape[1])
        bias = -(place[:, None] - place).abs() / 2 ** torch.arange(HEADS).view(-1, 1, 1)
        found = nn.functional.scaled_dot_product_attention(query, key, value, bias)
        return self.out(found.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = attention()
        self.gate, self.up, self.down = (nn.Linear(*sizes) for sizes in [(WIDTH, HIDDEN)] * 2 + [(HIDDEN, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        hidden = self.norm2(x)
        return x + self.down(torch.relu(self.gate(hidden)) * self.up(hidden))


class Perceptron(nn.Module):
    def __init__(self, width: int = WIDTH, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.same, self.wide = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.wide(torch.relu(self.same(torch.relu(self.narrow(x))))))


class Flat(nn.Module):
    """Products as matrices, as GPT-2 has them, and a weight that is no product's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / 4),
            nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 8),
        )
        self.bias, self.table = nn.Parameter(torch.randn(2 * WIDTH)), nn.Parameter(torch.randn(6, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rows = (x + self.table).flatten(0, 1)
        return x + (torch.tanh(torch.addmm(self.bias, rows, self.up)) @ self.down).view(x.shape)


def chain(make: Callable[[], nn.Module], count: int, *shape: int) -> Program:
    torch.manual_seed(5)
    return captured(nn.Sequential(*(make() for _ in range(count))).eval(), torch.randn(2, *shape))


@functools.cache
def transformer(attention: Callable[[], nn.Module] = Packed, count: int = 3) -> Program:
    return chain(lambda: Block(attention), count, 6, WIDTH)


@functools.cache
def perceptrons(count: int = 3) -> Program:
    return chain(Perceptron, count, 6, WIDTH)


def run(program: Program, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    (spec,) = program.inputs
    shape = [int(size) for size in spec.shape]
    data = open_data([{spec.name: torch.randn(shape, generator=generator).numpy()} for _ in range(8)], program)
    context = PassContext(data=data, metric=open_metric("cosine"))
    return BlockFolding(**{"mode": "share", **options}).run(program, context)


def outputs(program: Program) -> Tensor:
    return program(*program.examples)[0]


def distance(left: Program, right: Program) -> float:
    return float((outputs(left) - outputs(right)).norm() / outputs(right).norm())


def size(program: Program) -> int:
    return sum(item.bytes for item in stored_weights(program))


def block_weights(program: Program, position: int) -> dict[int, Tensor]:
    found = find_blocks(program, "auto")
    assert isinstance(found, Blocks)
    nodes = found.blocks[position].weights
    return {number: get_attribute(program.graph_module, str(node.target)) for number, node in enumerate(nodes)}


def with_block_weights(program: Program, position: int, weights: Weights) -> Program:
    result = program.copy()
    found = find_blocks(program, "auto")
    assert isinstance(found, Blocks)
    for number, node in enumerate(found.blocks[position].weights):
        set_attribute(result.graph_module, str(node.target), nn.Parameter(weights[number].detach().clone()))
    return result


def hidden_units(program: Program) -> tuple[HiddenUnits, ...]:
    found = find_blocks(program, "auto")
    assert isinstance(found, Blocks)
    return find_hidden_units(program, found.blocks[0])


@pytest.mark.parametrize("kind", ["normal", "ties", "permuted"])
def test_the_best_assignment_is_that_of_all_orders(kind: str) -> None:
    draw = np.random.default_rng(4)
    for count in range(1, 7):
        profit = draw.normal(size=(count, count))
        if kind == "ties":
            profit = np.round(profit)
        if kind == "permuted":
            profit = np.eye(count)[draw.permutation(count)] * 5 + draw.random((count, count))
        found = best_assignment(profit)
        assert sorted(found) == list(range(count))
        orders = itertools.permutations(range(count))
        best = max(sum(profit[row, column] for row, column in enumerate(order)) for order in orders)
        assert profit[np.arange(count), found].sum() == pytest.approx(best)


CASES: dict[str, tuple[Callable[[], Program], list[int]]] = {
    "packed": (lambda: transformer(Packed), [HEADS, HIDDEN]),
    "grouped": (lambda: transformer(Split), [HEADS // 2, HIDDEN]),
    "distances of heads": (lambda: transformer(Distant), [HIDDEN]),
    "convolutions": (functools.cache(lambda: chain(Bottleneck, 3, 8, 5, 5)), [6, 6]),
    "matrices": (functools.cache(lambda: chain(Flat, 3, 6, WIDTH)), [2 * WIDTH]),
}


@pytest.mark.parametrize("case", CASES)
def test_units_that_change_places_change_no_output_and_are_found_again(case: str) -> None:
    make, counts = CASES[case]
    program = make()
    kinds = hidden_units(program)
    assert [units.count for units in kinds] == counts
    original = moved = block_weights(program, 1)
    generator = torch.Generator().manual_seed(1)
    for units in kinds:
        order = torch.randperm(units.count, generator=generator)
        moved = units.moved(moved, order)
    permuted = with_block_weights(program, 1, moved)
    assert any(not torch.equal(moved[number], original[number]) for number in moved)
    assert distance(permuted, program) < 1e-6
    found = align(original, moved, kinds)
    assert all(torch.equal(found[number], original[number]) for number in original)


@pytest.mark.slow
def test_a_planted_order_is_found_under_noise() -> None:
    program = transformer()
    kinds = hidden_units(program)
    original = block_weights(program, 1)
    generator = torch.Generator().manual_seed(2)
    noisy = {n: t + 0.1 * t.std() * torch.randn(t.shape, generator=generator) for n, t in original.items()}
    moved: Weights = noisy
    for units in kinds:
        moved = units.moved(moved, torch.randperm(units.count, generator=generator))
    found = align(original, moved, kinds)
    assert all(torch.equal(found[number], noisy[number]) for number in original)


def test_a_hidden_value_that_is_read_elsewhere_has_no_units() -> None:
    class Reading(Block):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.up(self.norm2(x)))
            return x + self.down(hidden) + hidden[..., :1]

    assert hidden_units(chain(lambda: Reading(Packed), 3, 6, WIDTH)) == ()


def test_middle_and_closest_parents() -> None:
    program = transformer(count=4)
    third = {n: 2 * t.detach() - block_weights(program, 2)[n].detach() for n, t in block_weights(program, 1).items()}
    program = with_block_weights(program, 3, third)  # 1 lies between 2 and 3
    for options, parent in (({}, 1), ({"parent": "middle"}, 2), ({"parent": "closest"}, 1)):
        result = run(program, group=3, **options)
        assert all(torch.equal(_up(result.program, number), _up(program, parent)) for number in (1, 2, 3)), options
    moved = with_block_weights(with_block_weights(program, 1, third), 3, block_weights(program, 1))
    assert torch.equal(_up(run(moved, group=3, parent="closest").program, 1), _up(moved, 3))


def test_closest_counts_distances_after_alignment() -> None:
    program = transformer(count=4)
    first = block_weights(program, 1)
    moved: Weights = first
    for units in hidden_units(program):
        moved = units.moved(moved, torch.arange(units.count).flip(0))
    program = with_block_weights(program, 3, moved)
    nearer = {n: 0.5 * (t + first[n]) for n, t in block_weights(program, 2).items()}
    nearer = {n: 0.5 * (t + moved[n]) for n, t in nearer.items()}
    program = with_block_weights(program, 2, nearer)
    plain, aligned = (run(program, group=3, parent="closest", align=value).program for value in (False, True))
    assert torch.equal(_up(plain, 1), _up(program, 2)) and torch.equal(_up(aligned, 2), _up(program, 1))


def _up(program: Program, position: int) -> Tensor:
    return max(block_weights(program, position).values(), key=lambda value: value.numel())


def test_the_mean_of_copies_in_other_orders_is_the_block_itself_once_aligned() -> None:
    program = transformer()
    moved: Weights = block_weights(program, 1)
    for units in hidden_units(program):
        moved = units.moved(moved, torch.arange(units.count).flip(0))
    program = with_block_weights(program, 2, moved)
    plain, aligned = (run(program, weights="mean", align=value) for value in (False, True))
    assert distance(aligned.program, program) < 1e-6 < 0.01 < distance(plain.program, program)
    assert size(plain.program) == size(aligned.program) < size(program)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("packed", {}),
        ("convolutions", {"scale": True}),
        ("packed", {"weights": "mean", "align": True}),
        pytest.param("grouped", {"align": True}, marks=pytest.mark.slow),
        pytest.param("distances of heads", {"weights": "mean", "align": True}, marks=pytest.mark.slow),
    ],
)
def test_at_full_rank_children_are_their_originals(case: str, options: dict[str, Any]) -> None:
    program = CASES[case][0]()
    result = run(program, rank=1000, **options)
    assert distance(result.program, program) < 2e-5 and not result.declined
    assert len(result.rewrites) > 1


def test_products_of_matrices_have_terms_and_tables_have_none() -> None:
    program = CASES["matrices"][0]()
    result = run(program, rank=1000, align=True)
    (declined,) = result.declined
    assert declined.reason == "_2_table is shared without terms, which only plain products have"
    parent, child = (block_weights(program, number) for number in (1, 2))
    alone = {number: (parent if own.shape == (6, WIDTH) else child)[number] for number, own in child.items()}
    assert distance(result.program, with_block_weights(program, 2, alone)) < 2e-5


def test_what_is_left_after_removal_is_aligned_and_shared() -> None:
    program = perceptrons(4)
    removed, both = run(program, mode="remove"), run(program, mode="both", rank=1000, align=True)
    assert len(removed.rewrites) == 1 and len(both.rewrites) == 1 + 1 + 2
    assert distance(both.program, removed.program) < 2e-5 < distance(both.program, program)


def test_low_rank_is_the_best_there_is() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(matrix)
    for rank in range(1, 7):
        outer, inner = low_rank(matrix, rank)
        assert outer.shape == (7, min(rank, 5)) and inner.shape == (min(rank, 5), 5)
        assert float((matrix - outer @ inner).norm()) == pytest.approx(float(values[rank:].norm()), abs=1e-12)


def test_the_scale_is_that_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(1)
    own, shared = torch.randn(2, 4, 3, generator=generator)
    scale = least_squares_scale(own, shared)
    error = [float((own - number * shared).norm()) for number in (scale, scale + 0.01, scale - 0.01)]
    assert error[0] < min(error[1:])
    assert least_squares_scale(own, torch.zeros_like(own)) == 1


def test_terms_come_nearer_and_their_bytes_count() -> None:
    program = perceptrons(5)
    results = [run(program, **options) for options in ({}, {"rank": 4}, {"rank": 8}, {"rank": 8, "scale": True})]
    errors = [distance(result.program, program) for result in results]
    assert errors[0] > errors[1] > errors[2]
    for result in results:
        saved = int(re.findall(r"blocks share (-?\d+) bytes", result.notes[-1])[0])
        assert saved == size(program) - size(result.program)
    products, children, bias = 2, 2, HIDDEN + WIDTH
    terms = 4 * products * (HIDDEN + WIDTH)
    assert size(results[1].program) - size(results[0].program) == 4 * children * (terms + bias)
    assert size(results[3].program) - size(results[2].program) == 4 * children * products


def test_a_rank_that_saves_nothing_says_so() -> None:
    notes = run(transformer(), rank=1000).notes
    assert notes[-1].startswith("blocks share -") and "give a smaller rank" in notes[-1]


@pytest.mark.parametrize("suffix", ["onnx", "pt2", pytest.param("gopt", marks=pytest.mark.slow)])
def test_weights_with_terms_exist_once_in_every_file(suffix: str, tmp_path: Any) -> None:
    program = chain(lambda: Perceptron(64, 128), 3, 6, 64)
    result = run(program, rank=16, scale=True, blocks=(0, 1, 2), group=3)
    saved = size(program) - size(result.program)
    sizes = []
    for name, item in (("before", program), ("after", result.program)):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "gopt":
            artifact = graphopt.compile(item, threads=1)
            sizes.append(sum(weight.nbytes for weight in artifact.weights.values()))
            continue
        item.to_onnx(str(path)) if suffix == "onnx" else item.save(str(path))
        again = graphopt.capture(str(path))
        sizes.append(size(again))
        assert torch.allclose(again(*program.examples)[0], outputs(item), atol=1e-5)
    assert abs(sizes[0] - sizes[1] - saved) < 0.01 * saved  # a format may round sizes up or hold scalars as literals


@pytest.mark.parametrize(
    "options", [{}, {"weights": "mean", "align": True}, {"parent": "closest", "group": 3}, {"rank": 2}, {"scale": True}]
)
def test_a_second_run_finds_nothing_and_the_first_leaves_its_argument(options: dict[str, Any]) -> None:
    program = perceptrons(5)
    before = fingerprint(program)
    result = run(program, **options)
    after = fingerprint(program)
    assert before[0] == after[0] and all(map(torch.equal, before[1], after[1]))
    again = run(result.program, **options)
    assert again.program is result.program and not again.rewrites
    if "rank" in options or "scale" in options:
        assert {item.reason for item in again.declined} <= {"a product in it already has terms"}
    ids = [item.id for item in result.rewrites]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("options", [{"weights": "mean", "align": True}, {"rank": 1000, "align": True}])
def test_every_rewrite_can_be_refused_alone(options: dict[str, Any]) -> None:
    program = perceptrons()
    whole = run(program, **options)
    for refused in [item.id for item in whole.rewrites]:
        context = PassContext(allow=functools.partial(operator.ne, refused))
        result = BlockFolding(mode="share", **options).run(program, context)
        ids = [item.id for item in result.rewrites]
        assert refused not in ids and set(ids) < {item.id for item in whole.rewrites}
        assert torch.isfinite(outputs(result.program)).all()


def test_a_weight_that_others_read_stays_its_own() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = Perceptron(), Perceptron(), Perceptron()

        def forward(self, x: Tensor) -> Tensor:
            x = self.last(self.second(self.first(x)))
            return nn.functional.linear(x, self.last.up.weight)

    torch.manual_seed(5)
    module = Tied().eval()
    result = run(captured(module, torch.randn(2, 6, WIDTH)), align=True, rank=1000)
    weights = dict(result.program.graph_module.named_parameters())
    assert torch.equal(weights["last.up.weight"], module.last.up.weight)
    assert distance(result.program, captured(module, *result.program.examples)) < 2e-5


def test_healing_trains_shared_weights_and_terms() -> None:
    program = perceptrons()
    options = {"rank": 2, "scale": True, "weights": "mean"}
    folded, healed = run(program, **options), run(program, **options, heal_steps=15)
    assert distance(healed.program, program) < distance(folded.program, program)
    before = dict(folded.program.graph_module.named_parameters())
    after = dict(healed.program.graph_module.named_parameters())
    new = [name for name in before if name.startswith("block_folding_")]
    assert len(new) == 2 + 2 * 2 * 3  # two weights in common; a scalar and two factors for each of two products, twice
    assert all(not torch.equal(before[name], after[name]) for name in new)
    assert size(healed.program) == size(folded.program)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": -1}, "rank=-1"),
        ({"mode": "remove", "rank": 4}, "rank=4 is about blocks that share"),
        ({"mode": "remove", "parent": "middle"}, "parent='middle' is about blocks that share"),
        ({"mode": "remove", "group": 3}, "group=3 is about blocks that share"),
        ({"mode": "share", "remove": 2}, "remove=2 is about blocks that go"),
        ({"mode": "share", "ranking": "gate"}, "ranking='gate' is about blocks that go"),
        ({"mode": "share", "align": True}, "align=true changes nothing"),
        ({"mode": "share", "weights": "mean", "parent": "closest"}, "parent='closest' changes nothing"),
    ],
)
def test_options_without_an_effect_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        BlockFolding(**options)
