"""One artifact for several kinds of machines: the best that a machine can run is taken, and all are exact on codes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphopt
from graphopt import tuning, variants
from graphopt.artifact.write import write_artifact
from graphopt.errors import ArtifactError, UsageError
from graphopt.runtime import loading
from graphopt.runtime.features import missing
from graphopt.runtime.manifest import Entry, Manifest, Variant
from tests.models import program

compile_module = import_module("graphopt.compile")  # in place of the function of that name
NAMES = ("cpu:x86-64-v3", "cpu:x86-64-v4", "cpu:sapphirerapids")  # of which each needs what those before it need
V3 = ("x86_64", "avx2")
TARGET = ",".join(NAMES)


@pytest.fixture(scope="module")
def artifact() -> graphopt.Artifact:
    return graphopt.compile(program("mlp"), TARGET, threads=1)


def features(artifact: graphopt.Artifact, name: str) -> tuple[str, ...]:
    (found,) = (variant.features for variant in artifact.manifest.variants if variant.target == name)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_best_that_a_machine_can_run_is_taken(
    artifact: graphopt.Artifact, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert [variant.target for variant in artifact.manifest.variants] == list(reversed(NAMES))
    artifact.save(tmp_path / "mlp.gopt")
    has = frozenset(features(artifact, name))
    if missing(has):
        pytest.skip(f"needs a CPU with the features of {name}")
    monkeypatch.setattr(loading, "missing", lambda required: tuple(each for each in required if each not in has))
    session = graphopt.load(tmp_path / "mlp.gopt")
    assert session.variant.target == name
    feed, expected = session.samples()
    np.testing.assert_allclose(session.run(None, feed)[0], next(iter(expected.values())), rtol=1e-5, atol=1e-6)


def test_a_machine_that_can_run_none_is_told_what_it_lacks(
    artifact: graphopt.Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact.save(tmp_path / "mlp.gopt")
    monkeypatch.setattr(loading, "missing", lambda required: tuple(each for each in required if each == "avx2"))
    with pytest.raises(ArtifactError, match=r"cpu:sapphirerapids needs avx2; .*cpu:x86-64-v3 needs avx2"):
        graphopt.load(tmp_path / "mlp.gopt")


def test_where_a_library_lacks_more_the_next_one_is_taken(
    artifact: graphopt.Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a kernel that gives a process no tiles."""
    artifact.save(tmp_path / "mlp.gopt")
    checked: list[Any] = []

    def check(library: Any) -> None:
        checked.append(library)
        if len(checked) == 1:
            raise ArtifactError("the kernel gives this process no tiles")

    monkeypatch.setattr(loading, "missing", lambda required: ())
    monkeypatch.setattr(loading, "_check_machine", check)
    monkeypatch.setattr(loading, "_constant_shapes", lambda library: frozenset())
    assert loading.load(tmp_path / "mlp.gopt", "full").variant.target == "cpu:x86-64-v4"


def test_weights_that_are_equal_are_stored_once(artifact: graphopt.Artifact) -> None:
    alone = {name: graphopt.compile(program("mlp"), name, threads=1) for name in NAMES}
    most = sum(array.nbytes for each in alone.values() for array in each.weights.values())
    assert sum(array.nbytes for array in artifact.weights.values()) < most
    for variant in artifact.manifest.variants:
        single = alone[variant.target]
        for name, own in zip(variant.weights["main"], single.manifest.variants[0].weights["main"], strict=True):
            np.testing.assert_array_equal(artifact.weights[name], single.weights[own])


def test_the_report_has_that_of_each(artifact: graphopt.Artifact) -> None:
    assert artifact.report["target"] == NAMES[-1] and set(artifact.report["variants"]) == set(NAMES)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("cpu:x86-64-v3,cpu:x86-64-v3", "named twice"),
        ("cpu:x86-64-v3,cpu:zen2", "variants cpu:x86-64-v3 and cpu:zen2 are for the same machines"),
        ("cpu:x86-64-v3,cpu:x86-64-v5", "unknown target 'cpu:x86-64-v5'"),
    ],
)
def test_variants_that_cannot_be_are_refused_before_any_is_compiled(
    target: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_module, "_compiled", None)
    with pytest.raises(UsageError, match=words):
        graphopt.compile(program("mlp"), target, threads=1)


def test_kernels_for_a_gpu_are_not_tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compile_module, "_compiled", None)
    for target in ("jetson-orin-nano", "cpu,cuda:sm_80"):
        with pytest.raises(UsageError, match="run on a GPU and cannot be tuned yet; compile without tuning"):
            graphopt.compile(program("mlp"), target, tune=1.0, database=tmp_path)
    with pytest.raises(UsageError, match="cannot be tuned yet"):
        tuning.tune(program("mlp"), "cuda:sm_80", seconds=1.0, database=tmp_path)


def test_code_for_a_gpu_comes_first() -> None:
    """However many features of its CPU another variant needs."""
    needed = {"v3": V3, "v4": (*V3, "avx512f", "avx512bw"), "gpu": (*V3, "cuda:sm_80")}
    merged = variants.merge([of_target(name, features) for name, features in needed.items()])
    assert [variant.target for variant in merged.manifest.variants] == ["gpu", "v4", "v3"]
    assert merged.report["target"] == "gpu"


def of_target(name: str, features: tuple[str, ...]) -> graphopt.Artifact:
    """An artifact with nothing in it."""
    variant = Variant(name, features, f"lib/{name}.so", {"main": ()})
    manifest = Manifest("empty", {"main": Entry((), ())}, (variant,))
    return graphopt.Artifact(manifest, {variant.library: b""}, {}, {}, {"target": name})


@pytest.mark.slow
def test_codes_are_the_same_on_each(tmp_path: Path) -> None:
    from tests.rewrites import qdq_fusion

    quantized = qdq_fusion()
    artifact = graphopt.compile(quantized, TARGET, threads=1)
    x = torch.randn(2, 3, 6, 6).numpy()
    found = []
    for variant in artifact.manifest.variants:
        if missing(variant.features):
            continue
        path = tmp_path / "one.gopt"
        manifest = graphopt_manifest(artifact, variant)
        libraries = {variant.library: artifact.libraries[variant.library]}
        write_artifact(path, manifest, libraries, artifact.weights, artifact.check, artifact.report)
        found.append(graphopt.load(path, threads=1).run(None, {"x": x})[0])
    if len(found) < 2:
        pytest.skip("this machine runs fewer than two of the variants")
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def graphopt_manifest(artifact: graphopt.Artifact, variant: Any) -> Any:
    from dataclasses import replace

    return replace(artifact.manifest, variants=(variant,))
