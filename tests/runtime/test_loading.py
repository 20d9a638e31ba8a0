"""Which variant of an artifact is opened where one is for a GPU, and what is said where none can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graphopt.errors import ArtifactError
from graphopt.runtime import loading


@pytest.fixture
def write(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """write("cuda", "cpu") -> a folder with these variants, on a machine with a GPU and no TVM runtime for it."""
    (cpu,) = parts.manifest.variants
    gpu = replace(cpu, target="cuda", features=("cuda:sm_80",), library="lib/cuda.so")
    known = {"cpu": cpu, "cuda": gpu}

    def refuse() -> None:
        raise ArtifactError("TVM's runtime for GPUs cannot be loaded")

    monkeypatch.setattr(loading, "missing", lambda required: ())
    monkeypatch.setattr(loading, "load_gpu_runtime", refuse)

    def call(*names: str) -> Path:
        variants = tuple(known[name] for name in names)
        libraries = {variant.library: parts.libraries[cpu.library] for variant in variants}
        manifest = replace(parts.manifest, variants=variants)
        return Path(parts.write(f"{tmp_path}/model/", manifest=manifest, libraries=libraries))

    return call


def test_without_the_runtime_for_a_gpu_code_for_a_cpu_runs(write: Any) -> None:
    assert loading.load(write("cuda", "cpu"), "full").variant.target == "cpu"


def test_code_for_a_gpu_alone_says_what_is_missing(write: Any) -> None:
    with pytest.raises(ArtifactError, match="runtime for GPUs cannot be loaded"):
        loading.load(write("cuda"), "full")


def test_an_altered_library_is_refused_though_another_would_run(write: Any) -> None:
    path = write("cuda", "cpu")
    library = path / "lib" / "cuda.so"
    library.write_bytes(library.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match=r"cuda\.so .* was altered"):
        loading.load(path, "code")
