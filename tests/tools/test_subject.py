from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from graphopt.errors import UnknownNameError, UsageError
from graphopt.runtime import session
from graphopt.tools.subject import choose_entry, chosen_sizes, open_artifact

SHAPES = {"x": [2, "seq"], "mask": [2, "past + 1"], "cache": ["past", 4]}


class Session:
    """One entry, "decode", with a size that is computed from another."""

    entries = ("decode",)

    def __init__(self, path: str) -> None:
        pass

    def get_inputs(self, entry: str) -> list[Any]:
        assert entry == "decode"
        return [SimpleNamespace(name=name, shape=shape) for name, shape in SHAPES.items()]

    def get_outputs(self, entry: str) -> list[Any]:
        return [SimpleNamespace(name="y")]

    def samples(self, entry: str) -> Any:
        return {"x": np.ones((2, 5)), "mask": np.ones((2, 4)), "cache": np.ones((3, 4))}, {}

    def run(self, names: None, feed: dict[str, Any], entry: str) -> list[Any]:
        return [feed["mask"]]


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "InferenceSession", Session)


def test_sizes_that_are_computed() -> None:
    subject = open_artifact("decoder.gopt")
    drawn = subject.draw({"past": 9}, 0)
    assert {name: array.shape for name, array in drawn.items()} == {"x": (2, 5), "mask": (2, 10), "cache": (9, 4)}
    assert subject.run(drawn)["y"].shape == (2, 10)


def options(*shapes: str) -> Namespace:
    return Namespace(size=[], shape=list(shapes))


def test_shapes_are_solved_for_their_names() -> None:
    inputs = open_artifact("decoder.gopt").inputs
    assert chosen_sizes(options("mask:2x10"), inputs) == {"past": 9}
    assert chosen_sizes(options("mask:2x10", "cache:9x4"), inputs) == {"past": 9}
    with pytest.raises(UsageError, match="past is given as 9 and as 8"):
        chosen_sizes(options("mask:2x10", "cache:8x4"), inputs)


def test_a_shape_that_no_size_gives() -> None:
    with pytest.raises(UsageError, match="cannot be made 5"):
        chosen_sizes(options("x:5"), {"x": ("2*seq",)})


def test_the_entry() -> None:
    both: Any = SimpleNamespace(entries=("prefill", "decode"))
    assert choose_entry(Session(""), None) == "decode"  # type: ignore[arg-type]
    assert choose_entry(SimpleNamespace(entries=("first", "main")), None) == "main"  # type: ignore[arg-type]
    assert choose_entry(both, "prefill") == "prefill"
    with pytest.raises(UsageError, match="choose one with --entry"):
        choose_entry(both, None)
    with pytest.raises(UnknownNameError, match="'decode'"):
        choose_entry(both, "decod")
