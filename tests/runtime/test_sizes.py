from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.errors import ArtifactError, FeedError
from graphopt.runtime.feed import FeedCheck
from graphopt.runtime.manifest import Bounds, Entry, TensorInfo
from graphopt.runtime.sizes import fits, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seq", 5),
        ("2*seq + 1", 11),
        ("(seq - 1)//2", 2),
        ("-seq + 7", 2),
        ("seq % 3", 2),
        ("Max(1, seq - 9)", 1),
        ("Min(batch, seq)", 3),
        ("FloorDiv(seq, 2)", 2),
        ("CeilDiv(seq, 2)", 3),
        ("batch*seq", 15),
        ("max(1, seq - 9)", 1),
        ("min(batch, seq)", 3),
        ("seq**2", 25),
    ],
)
def test_expressions(text: str, expected: int) -> None:
    assert parse_size(text).evaluate({"seq": 5, "batch": 3}) == expected


@pytest.mark.parametrize("text", ["", "1.5", "a.b", "f(1)", "Max()", "a if b else c", "a and b", "2**999999999", "("])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        parse_size(text)


def test_a_very_deep_expression_is_refused() -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        parse_size("-" * 5000 + "a")


@pytest.mark.parametrize(
    ("text", "value", "expected"), [("2*n", 6, 3), ("2*n", 7, None), ("n + 1", 1, 0), ("4", 4, None), ("n//2", 3, None)]
)
def test_solving(text: str, value: int, expected: int | None) -> None:
    assert parse_size(text).solve("n", {}, value) == expected


def test_fits() -> None:
    assert fits((2, 8), ("n", 8))
    assert not fits((2, 8), ("n", 7))
    assert not fits((2,), ("n", 8))


def check(
    shapes: dict[str, tuple[int | str, ...]], sizes: dict[str, Bounds], **given: tuple[int, ...]
) -> dict[str, int]:
    inputs = tuple(TensorInfo(name, "float32", shape) for name, shape in shapes.items())
    feed = {name: np.zeros(shape, np.float32) for name, shape in given.items()}
    return FeedCheck(Entry(inputs, (), sizes=sizes)).bind(feed)[1]


def test_expressions_of_sizes_given_elsewhere() -> None:
    shapes: dict[str, tuple[int | str, ...]] = {"past": ("2*n",), "x": ("n",)}
    assert check(shapes, {}, past=(6,), x=(3,)) == {"n": 3}
    with pytest.raises(FeedError, match=r"size '2\*n' is 5 in input 'past' \(axis 0\), expected 6"):
        check(shapes, {}, past=(5,), x=(3,))


def test_a_size_that_only_an_expression_gives() -> None:
    assert check({"x": ("8*tiles",)}, {"tiles": Bounds(1, 4)}, x=(16,)) == {"tiles": 2}
    with pytest.raises(FeedError, match=r"size 12 in input 'x' \(axis 0\) cannot be 8\*tiles"):
        check({"x": ("8*tiles",)}, {}, x=(12,))
    with pytest.raises(FeedError, match=r"size 'tiles' is 5 in input 'x' .*; the artifact was compiled for at most 4"):
        check({"x": ("8*tiles",)}, {"tiles": Bounds(1, 4)}, x=(40,))


def test_an_unknown_dtype_or_size_is_found_when_the_session_opens(parts: Any, tmp_path: Path) -> None:
    from graphopt.runtime import InferenceSession

    main = parts.manifest.entries["main"]
    for info, words in (
        (TensorInfo("x", "int3", ("rows", 8)), "input x has dtype 'int3', which this graphopt does not know"),
        (TensorInfo("x", "float32", ("2 ** rows", 8)), r"size '2 \*\* rows' cannot be read"),
    ):
        entries = {**parts.manifest.entries, "main": replace(main, inputs=(info,))}
        path = parts.write(tmp_path / "a.gopt", manifest=replace(parts.manifest, entries=entries))
        with pytest.raises(ArtifactError, match=words):
            InferenceSession(path)


def test_state_may_start_empty_but_not_outgrow_its_bound() -> None:
    info = TensorInfo("cache", "float32", ("past", 2))
    entry = Entry((TensorInfo("x", "float32", (2,)),), (), (info,), {"past": Bounds(1, 4)})
    feed = {"x": np.zeros(2, np.float32)}
    assert FeedCheck(entry).bind(feed, [np.zeros((0, 2))])[1] == {"past": 0}
    with pytest.raises(FeedError, match="size 'past' is 5 in the state; the artifact was compiled for at most 4"):
        FeedCheck(entry).bind(feed, [np.zeros((5, 2))])
