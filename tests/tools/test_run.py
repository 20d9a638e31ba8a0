from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.runtime.manifest import MANIFEST
from tests.tools.conftest import ROOT, Cli

Inputs = Callable[..., Path]
X = np.ones((3, 8), np.float32)


def test_run_writes_outputs_by_name(cli: Cli, artifact: str, inputs: Inputs, tmp_path: Path) -> None:
    outcome = cli("run", artifact, "--input", inputs(x=X), "-o", "y.npz")
    assert outcome.code == 0, outcome.err
    with np.load(tmp_path / "y.npz") as arrays:
        (output,) = (arrays[name] for name in arrays.files)
    assert output.shape[0] == 3 and output.dtype == np.float32


def test_check(cli: Cli, artifact: str) -> None:
    outcome = cli("run", artifact, "--check", "--json")
    assert outcome.code == 0 and outcome.json["good"]


def test_check_notices_another_result(cli: Cli, artifact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.runtime.session import InferenceSession

    def wrong(self: Any, *arguments: Any, **options: Any) -> list[Any]:
        return [array + 1 for array in run(self, *arguments, **options)]

    run = InferenceSession.run
    monkeypatch.setattr(InferenceSession, "run", wrong)
    outcome = cli("run", artifact, "--check")
    assert outcome.code == 1 and "something else" in outcome.out


@pytest.mark.parametrize(
    ("feed", "words"),
    [
        ({"xx": X}, ("unknown input 'xx'", "'x'")),
        ({}, ("'x'",)),
        ({"x": X.astype(np.float64)}, ("float64", "float32")),
        ({"x": X[0]}, ("[8]", "[rows, 8]")),
        ({"x": X[:, :7]}, ("7", "8")),
        ({"x": np.ones((65, 8), np.float32)}, ("rows", "65", "64")),
    ],
)
def test_wrong_input(
    cli: Cli, artifact: str, inputs: Inputs, tmp_path: Path, feed: dict[str, Any], words: tuple[str, ...]
) -> None:
    cli("run", artifact, "--input", inputs(**feed), "-o", "y.npz").refused(*words)
    assert not (tmp_path / "y.npz").exists()


def test_pickled_arrays_are_refused(cli: Cli, artifact: str, inputs: Inputs) -> None:
    cli("run", artifact, "--input", inputs(x=np.array([{}], object)), "-o", "y.npz").refused("plain arrays")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\3\4"])
def test_not_an_npz(cli: Cli, artifact: str, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    cli("run", artifact, "--input", "x.npz", "-o", "y.npz").refused("x.npz")


def test_an_array_without_a_name(cli: Cli, artifact: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    cli("run", artifact, "--input", "x.npy", "-o", "y.npz").refused("without a name")


def test_unknown_entry(cli: Cli, artifact: str, inputs: Inputs) -> None:
    cli("run", artifact, "--input", inputs(x=X), "-o", "y.npz", "--entry", "mian").refused("'main'")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--check", "--input", "x.npz"),
        ("--check", "-o", "y.npz"),
        ("--input", "x.npz"),
        ("--input", "x.npz", "-o", "y"),
    ],
)
def test_options_that_do_not_go_together(cli: Cli, artifact: str, words: tuple[str, ...]) -> None:
    cli("run", artifact, *words).refused()


@pytest.mark.parametrize("model", ["m.pt2", "package.module:function"])
@pytest.mark.parametrize("words", [("run", "--check"), ("profile",)])
def test_a_model_is_no_artifact(cli: Cli, tmp_path: Path, model: str, words: tuple[str, ...]) -> None:
    (tmp_path / "m.pt2").write_bytes(b"PK")
    cli(*words, model).refused(f"{model} is a model, not an artifact; compile it first")


def test_missing_artifact(cli: Cli) -> None:
    cli("run", "no.gopt", "--check").refused("no.gopt")


@pytest.mark.parametrize("part", [0, 100, 5000])
def test_truncated_artifact(cli: Cli, artifact: str, tmp_path: Path, part: int) -> None:
    (tmp_path / "cut.gopt").write_bytes(Path(artifact).read_bytes()[:part])
    cli("run", "cut.gopt", "--check").refused("cut.gopt")


@pytest.mark.parametrize("member", ["weights.safetensors", "check.safetensors", "library"])
def test_tampered_artifact(cli: Cli, artifact: str, tmp_path: Path, member: str) -> None:
    with zipfile.ZipFile(artifact) as archive:
        manifest = json.loads(archive.read(MANIFEST))
        data = archive.read(manifest["variants"][0]["library"] if member == "library" else member)
    content = bytearray(Path(artifact).read_bytes())
    content[content.find(data) + len(data) - 1] ^= 1
    (tmp_path / "tampered.gopt").write_bytes(content)
    cli("run", "tampered.gopt", "--check").refused()


def test_artifact_for_a_cpu_with_more_features(cli: Cli, artifact: str, tmp_path: Path) -> None:
    folder = tmp_path / "foreign.gopt"
    with zipfile.ZipFile(artifact) as archive:
        archive.extractall(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["variants"][0]["features"] = ["avx9000"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    cli("run", "foreign.gopt", "--check").refused("avx9000")


def test_output_that_does_not_fit_leaves_nothing(artifact: str, inputs: Inputs, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))

    command = [
        sys.executable,
        "-m",
        "graphopt",
        "run",
        artifact,
        "--input",
        str(inputs(x=X)),
        "-o",
        str(tmp_path / "y.npz"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("graphopt: error: ") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["inputs.npz"]


def test_folder_artifact(cli: Cli, artifact: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(artifact) as archive:
        archive.extractall(tmp_path / "model.gopt")
    assert cli("run", "model.gopt/", "--check").code == 0
    shutil.rmtree(tmp_path / "model.gopt")
