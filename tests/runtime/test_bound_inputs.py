"""An input that is bound has one value: the manifest says which, a session refuses all others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.errors import ArtifactError, BoundInputError, FeedError
from graphopt.runtime.manifest import Manifest, parse
from graphopt.runtime.session import InferenceSession

VALUE = np.arange(8, dtype=np.float32) / 10


def bound(manifest: Manifest, elements: Any, dtype: str = "float32") -> Manifest:
    """The manifest with the input of the entry "fixed" bound."""
    entry = manifest.entries["fixed"]
    changed = replace(entry, inputs=(replace(entry.inputs[0], bound=elements, dtype=dtype),))
    return replace(manifest, entries={**manifest.entries, "fixed": changed})


@pytest.fixture
def session(parts: Any, tmp_path: Path) -> InferenceSession:
    return InferenceSession(parts.write(tmp_path / "a.gopt", manifest=bound(parts.manifest, tuple(VALUE.tolist()))))


def test_only_the_bound_value_runs(session: InferenceSession) -> None:
    for feed in (VALUE, np.repeat(VALUE, 2)[::2], VALUE.astype(">f4").astype("<f4")):
        assert np.array_equal(session.run(None, {"x": feed}, entry="fixed")[0], VALUE + VALUE)
    other = VALUE.copy()
    for wrong in (np.nextafter(np.float32(0.2), np.float32(1)), np.nan):
        other[2] = wrong
        with pytest.raises(BoundInputError, match=r"input 'x' is bound to \[0.0, .*, got \[0.0, .*capture the model"):
            session.run(None, {"x": other}, entry="fixed")
    assert np.array_equal(session.run(None, {"x": np.ones(8, np.float32)}, entry="count")[0], np.ones(8))


def test_types_and_sizes_come_first(session: InferenceSession) -> None:
    for wrong in (VALUE.astype(np.float64), VALUE[:7]):
        with pytest.raises(FeedError) as caught:
            session.run(None, {"x": wrong}, entry="fixed")
        assert type(caught.value) is FeedError


def test_it_is_read_as_it_is_written(session: InferenceSession) -> None:
    manifest = session.manifest
    assert manifest.entries["fixed"].inputs[0].bound == tuple(VALUE.tolist())
    assert parse(manifest.to_json()) == manifest
    data = json.loads(manifest.to_json())
    del data["entries"]["fixed"]["inputs"][0]["bound"]  # of an older writer
    assert parse(json.dumps(data)) == bound(manifest, None)


@pytest.mark.parametrize("elements", [(1.0,), ("1",) * 8, 3])
def test_a_damaged_value(elements: Any, session: InferenceSession) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged \(('x' is bound|.*should be a)"):
        parse(bound(session.manifest, elements).to_json())


@pytest.mark.parametrize("element", [300, 2.5])
def test_a_value_of_another_type(element: float, parts: Any, tmp_path: Path) -> None:
    manifest = bound(parts.manifest, (element,) * 8, "int8")
    with pytest.raises(ArtifactError, match="input x is bound to what is no int8"):
        InferenceSession(parts.write(tmp_path / "a.gopt", manifest=manifest))
