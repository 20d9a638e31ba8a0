"""Stages: samples that are done leave, the rest goes on; the manifest says nothing that cannot be run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from graphopt.errors import ArtifactError
from graphopt.runtime.manifest import WEIGHTS, Entry, Manifest, TensorInfo, Variant, parse
from graphopt.runtime.stages import Stages, rows_axis
from graphopt.runtime.tensors import as_array, to_device

X = TensorInfo("x", "float32", ("batch", 3))
ANSWER, EXIT = TensorInfo("y", "float32", (2, "batch")), TensorInfo("exit", "int64", ("batch",))
DONE = TensorInfo("done", "bool", ("batch",))
HIDDEN, TABLE = TensorInfo("h", "float32", ("batch", 3)), TensorInfo("table", "float32", (3,))
FIRST = Entry((X,), (ANSWER, DONE, HIDDEN, TABLE))
LAST = Entry((X, HIDDEN, TABLE), (ANSWER,))
MAIN = Entry((X,), (ANSWER, EXIT), exits="exit", stages=("first", "last"), rows="batch")


def call(name: str, inputs: list[Any]) -> list[Any]:
    """Samples with a positive first number are done at once; later ones are marked by what they read."""
    x = as_array(inputs[0], "float32")
    if name == "first":
        y = np.stack([x[:, 0], np.zeros(len(x), np.float32)])
        values = [
            (y, "float32"),
            (x[:, 0] > 0, "bool"),
            (2 * x, "float32"),
            (np.arange(3, dtype=np.float32), "float32"),
        ]
    else:
        h, table = (as_array(item, "float32") for item in inputs[1:])
        values = [(np.stack([h[:, 1] + table[2], np.full(len(x), len(x), np.float32)]), "float32")]
    return [to_device(np.ascontiguousarray(array), dtype) for array, dtype in values]


@pytest.mark.parametrize("signs", ["+", "-", "+-", "--+-+", "+++", "---"])
def test_every_sample_gets_its_answer(signs: str) -> None:
    x = np.random.default_rng(0).random((len(signs), 3)).astype(np.float32) + 0.5
    x[:, 0] *= [1 if sign == "+" else -1 for sign in signs]
    (y,), exits = Stages(MAIN, {"first": FIRST, "last": LAST}).run(call, [to_device(x, "float32")])
    early = x[:, 0] > 0
    assert exits.tolist() == [0 if sign == "+" else 1 for sign in signs] and y.shape == (2, len(signs))
    assert np.array_equal(y[0], np.where(early, x[:, 0], 2 * x[:, 1] + 2))
    assert np.array_equal(y[1], np.where(early, 0, (~early).sum()))  # later stages see only those that are left


@pytest.mark.parametrize(
    "shape, axis", [((3,), -1), (("batch", 2), 0), ((2, "batch"), 1), (("2*batch",), None), (("batch", "batch"), None)]
)
def test_the_axis_of_samples(shape: tuple[int | str, ...], axis: int | None) -> None:
    assert rows_axis(shape, "batch") == axis


def manifest(**entries: Entry) -> Manifest:
    files = {name: {"sha256": "0" * 64, "bytes": 0} for name in (WEIGHTS, "lib/a.so")}
    weights: dict[str, tuple[str, ...]] = {name: () for name, entry in entries.items() if not entry.stages}
    return Manifest("m", entries, (Variant("cpu", (), "lib/a.so", weights),), files=files)


def test_a_manifest_keeps_its_stages() -> None:
    whole = manifest(main=MAIN, first=FIRST, last=LAST)
    assert parse(whole.to_json()).entries == whole.entries
    old = json.loads(manifest(first=FIRST).to_json())
    for key in ("exits", "stages", "rows"):  # as written before there were stages
        del old["entries"]["first"][key]
    assert parse(json.dumps(old)).entries == {"first": FIRST}


@pytest.mark.parametrize(
    "entries, reason",
    [
        ({"main": replace(MAIN, stages=("first", "nothing"))}, "entries lacks nothing"),
        ({"main": replace(MAIN, exits="z")}, "no output is called 'z'"),
        ({"main": replace(MAIN, rows=None)}, "has no rows"),
        ({"main": replace(MAIN, stages=("last",))}, "reads what none before it gives"),
        ({"first": replace(FIRST, outputs=(ANSWER, HIDDEN, TABLE))}, "does not give answers and flags"),
        ({"last": replace(LAST, outputs=(HIDDEN,))}, "does not give answers and flags"),
        ({"other": replace(MAIN, stages=("main",))}, "a stage has stages"),
    ],
)
def test_stages_that_cannot_run_are_refused(entries: dict[str, Entry], reason: str) -> None:
    damaged = manifest(**{"main": MAIN, "first": FIRST, "last": LAST, **entries})
    with pytest.raises(ArtifactError, match=reason):
        parse(damaged.to_json())
