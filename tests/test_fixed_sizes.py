from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import Program, UnknownNameError, UsageError
from graphopt.in_place import written_state


class Pairs(nn.Module):
    """Joins each row with its neighbours: an input and an output have sizes that follow from others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        halves = y.view(x.shape[0], 2, 4).sum(1)
        return {"joined": torch.cat((self.weight(x), halves)), "rows": x.reshape(-1)[: x.shape[0]]}


@pytest.fixture(scope="module")
def program() -> Program:
    sizes = {"x": {0: "rows"}, "y": {0: "2*rows"}}
    return graphopt.capture(Pairs(), (torch.randn(3, 4), torch.randn(6, 4)), dynamic_shapes=sizes)


def test_the_program_of_one_size_computes_the_same(program: Program) -> None:
    fixed = program.fix_sizes(rows=5)
    assert [spec.shape for spec in fixed.inputs] == [(5, 4), (10, 4)]
    assert [spec.shape for spec in fixed.outputs] == [(10, 4), (5,)]
    assert not fixed.sizes and not fixed.symbols
    assert [example.shape for example in fixed.examples] == [(5, 4), (10, 4)]
    assert not any("sym_size" in str(node.target) for node in fixed.nodes())
    inputs = torch.randn(5, 4), torch.randn(10, 4)
    for found, expected in zip(fixed(*inputs), program(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert fixed.graph_module.get_parameter("weight.weight") is program.graph_module.get_parameter("weight.weight")


def test_the_original_stays_as_it_was(program: Program) -> None:
    text, values = str(program.graph_module.graph), [node.meta["val"] for node in program.nodes() if "val" in node.meta]
    program.fix_sizes(rows=2)
    assert str(program.graph_module.graph) == text
    assert all(
        node.meta["val"] is value
        for node, value in zip((n for n in program.nodes() if "val" in n.meta), values, strict=True)
    )
    assert program.fix_sizes(rows=1)(torch.zeros(1, 4), torch.ones(2, 4))[0].shape == (2, 4)


def test_sizes_that_cannot_be(program: Program) -> None:
    with pytest.raises(UnknownNameError, match="row"):
        program.fix_sizes(row=1)
    with pytest.raises(UsageError, match="size 'rows' cannot be 0; it is 1 and up"):
        program.fix_sizes(rows=0)
    for value in ("1", 1.5):
        with pytest.raises(UsageError, match=f"size 'rows' cannot be {value!r}; give a whole number"):
            program.fix_sizes(rows=value)  # type: ignore[arg-type]


class Recorder(nn.Module):
    """Keeps rows in `kept`; what it reads of them before they are written decides whether it can be in place."""

    kept: Tensor

    def __init__(self, reads_before: bool) -> None:
        super().__init__()
        self.reads_before = reads_before
        self.register_buffer("kept", torch.zeros(4, 3))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        before = self.kept.sum() if self.reads_before else 0
        self.kept.index_copy_(0, at, x)
        return self.kept * 2 + before


@pytest.mark.parametrize("reads_before", [False, True])
def test_state_is_written_in_place_where_nothing_reads_it_before(reads_before: bool) -> None:
    program = graphopt.capture(Recorder(reads_before), (torch.ones(2, 3), torch.tensor([3, 1])))
    assert written_state([program]) == (frozenset() if reads_before else {"kept"})
    session = graphopt.compile(program).session()
    state = None
    for first in (1, 3):
        x, at = first + torch.arange(6.0).view(2, 3), torch.tensor([first, 2])
        (expected,), state = program.step((x, at), state)
        (found,) = session.run(None, {"x": x.numpy(), "at": at.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected)
    clone = session.clone()
    feed = {"x": torch.zeros(2, 3).numpy(), "at": torch.tensor([0, 0]).numpy()}
    assert not clone.run(None, feed)[0].any()
    session.reset()
    assert not session.run(None, feed)[0].any()
    session.run(None, {**feed, "x": torch.ones(2, 3).numpy()})
    kept = session.run(None, {**feed, "at": torch.tensor([1, 1]).numpy()})[0]
    assert kept[0].tolist() == ([2.0 + 3] * 3 if reads_before else [2.0] * 3)
    assert session.profile(feed), "which runs on copies"


@pytest.mark.parametrize("nested", [False, True])
def test_state_that_is_what_is_written_is_not_in_place(nested: bool) -> None:
    class Shuffled(Recorder):
        def forward(self, at: Tensor) -> Tensor:  # type: ignore[override]
            self.kept.index_copy_(0, at, self.kept.flip(0) if nested else self.kept)
            return self.kept.sum(1)

    module = Shuffled(False)
    module.kept = torch.arange(12.0).view(4, 3)
    at = torch.tensor([1, 2, 3, 0])
    program = graphopt.capture(module, (at,))
    assert written_state([program]) == frozenset()
    session = graphopt.compile(program).session()
    state = None
    for _ in range(3):
        (expected,), state = program.step((at,), state)
        assert session.run(None, {"at": at.numpy()})[0].tolist() == expected.tolist()


def test_a_state_that_one_entry_returns_is_in_place_in_none() -> None:
    entries = {
        str(flag): graphopt.capture(Recorder(flag), (torch.ones(1, 3), torch.tensor([3]))) for flag in (True, False)
    }
    assert written_state(entries.values()) == frozenset()


def test_entries_share_a_state_only_where_it_is_the_same() -> None:
    class Other(Recorder):
        def __init__(self) -> None:
            super().__init__(False)
            self.kept = torch.ones(4, 3)

    example = (torch.ones(1, 3), torch.tensor([3]))
    entries = {"a": graphopt.capture(Recorder(False), example), "b": graphopt.capture(Other(), example)}
    with pytest.raises(UsageError, match="entry 'b' has state 'kept' of another shape or value"):
        graphopt.compile(entries)


def test_a_state_that_begins_as_not_a_number_is_the_same_in_every_entry() -> None:
    class Hole(nn.Module):
        kept: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.tensor([1.0, math.nan]))

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            self.kept.add_(value)
            return self.kept * 2

    entries = {name: graphopt.capture(Hole(), (torch.ones(2),)) for name in ("a", "b")}
    session = graphopt.compile(entries).session()
    assert [session.run(None, {"value": np.ones(2, np.float32)}, entry=name)[0][0] for name in entries] == [4.0, 6.0]
