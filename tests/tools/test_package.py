"""Folders to ship, run by a Python that finds numpy and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import graphopt
from tests.tools.conftest import Cli

Run = Callable[..., subprocess.CompletedProcess[str]]
X = np.linspace(-3, 3, 40, dtype=np.float32).reshape(5, 8)
MOST = 15 << 20  # bytes of a folder besides numpy and the weights


@pytest.fixture(scope="module")
def numpy_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numpy")
    installed = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (installed / name).exists():
            (folder / name).symlink_to(installed / name)
    return folder


@pytest.fixture
def run(numpy_alone: Path) -> Run:
    """run("code", *arguments) -> what an isolated interpreter makes of it."""

    def call(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        code = f"import sys; sys.path.append({str(numpy_alone)!r}); {code}"
        command = [sys.executable, "-I", "-S", "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return call


@pytest.fixture
def folder(cli: Cli, artifact: str, tmp_path: Path) -> Path:
    outcome = cli("package", artifact, "--python", "shipped")
    assert outcome.code == 0, outcome.err
    return tmp_path / "shipped"


def script(folder: Path) -> str:
    return f"import runpy; runpy.run_path({str(folder / 'run.py')!r}, run_name='__main__')"


def test_a_folder_runs_with_numpy_alone(folder: Path, artifact: str, run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X)
    done = run(script(folder), str(tmp_path / "x.npz"), str(tmp_path / "y.npz"))
    assert (done.returncode, done.stderr) == (0, "")
    with np.load(tmp_path / "y.npz") as found:
        np.testing.assert_array_equal(found["output"], graphopt.load(artifact).run(None, {"x": X})[0])
    done = run(script(folder))
    assert done.returncode == 0 and "output float32 [3, 16] largest difference 0.0" in done.stdout, done.stderr
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(sizes) - Path(artifact).stat().st_size < MOST


def test_nothing_else_is_imported(folder: Path, run: Run) -> None:
    code = f"""sys.path.insert(0, {str(folder)!r}); import graphopt
graphopt.load({str(folder / "model.gopt")!r})
found = {{getattr(m, "__file__", None) for m in sys.modules.values()}} - {{None}}
print([f for f in found if "site-packages" in f and "/numpy/" not in f or "graphopt/" in f and "shipped" not in f])"""
    done = run(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_an_artifact_that_is_a_folder(cli: Cli, artifact: str, run: Run, tmp_path: Path) -> None:
    unpack(artifact, tmp_path / "dense.gopt")
    assert cli("package", tmp_path / "dense.gopt", "--python", "shipped").code == 0
    assert "largest difference 0.0" in run(script(tmp_path / "shipped")).stdout


def unpack(artifact: str, folder: Path) -> Path:
    """The path of its manifest."""
    with zipfile.ZipFile(artifact) as archive:
        archive.extractall(folder)
    return folder / "manifest.json"


def test_code_for_a_gpu_beside_that_for_a_cpu(cli: Cli, artifact: str, run: Run, tmp_path: Path) -> None:
    """It is taken along and left where the folder runs; alone it is refused."""
    manifest = unpack(artifact, tmp_path / "dense.gopt")
    about = json.loads(manifest.read_text())
    (on_cpu,) = about["variants"]
    on_gpu = {**on_cpu, "target": "cuda:sm_80", "features": [*on_cpu["features"], "cuda:sm_80"]}
    manifest.write_text(json.dumps({**about, "variants": [on_gpu, on_cpu]}))
    assert cli("package", tmp_path / "dense.gopt", "--python", "shipped").code == 0
    assert "largest difference 0.0" in run(script(tmp_path / "shipped")).stdout
    manifest.write_text(json.dumps({**about, "variants": [on_gpu]}))
    cli("package", tmp_path / "dense.gopt", "--python", "other").refused("is for a GPU", "compile it for a CPU")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("python", "3.12", "this folder was made for Python 3.12 and this is Python 3.11; run it with python3.12"),
        ("machine", "riscv64", f"this folder was made for riscv64 machines and this one is {os.uname().machine}; make"),
    ],
)
def test_another_python_or_machine_is_one_sentence(folder: Path, run: Run, field: str, value: str, words: str) -> None:
    about = json.loads((folder / "graphopt-package.json").read_text())
    (folder / "graphopt-package.json").write_text(json.dumps({**about, field: value}))
    refused(run(script(folder)), words)


def test_another_tvm_ffi_is_one_sentence(folder: Path, run: Run) -> None:
    version = folder / "tvm_ffi" / "_version.py"
    version.write_text(version.read_text().replace("0.1.14.post1", "0.1.15"))
    refused(run(script(folder)), "apache-tvm-ffi 0.1.15 is installed, graphopt works with one pair only")


@pytest.mark.parametrize("name", ["libtvm_ffi.so", "core.cpython-311-x86_64-linux-gnu.so"])
def test_libraries_of_another_machine_are_one_sentence(folder: Path, run: Run, name: str) -> None:
    (library,) = folder.rglob(name)
    data = bytearray(library.read_bytes())
    data[18] = 183  # e_machine: aarch64
    library.write_bytes(data)
    refused(run(script(folder)), "tvm_ffi cannot be imported (")


def refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr


def test_a_folder_of_something_else_stays(cli: Cli, artifact: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    cli("package", artifact, "--python", "mine").refused("mine/", "give another name or remove it", code=1)
    (tmp_path / "mine" / "package.json").write_text('{"name": "a project of npm"}')
    cli("package", artifact, "--python", "mine").refused("mine/", "give another name or remove it", code=1)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    cli("package", artifact, "--python", "mine", "--cpp", "link").refused("are both link; give each a folder")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert cli("package", artifact, "--python", "shipped").code == 0
    assert cli("package", artifact, "--python", "shipped").code == 0  # one of its own kind is replaced


def test_a_damaged_artifact_is_not_shipped(cli: Cli, artifact: str, tmp_path: Path) -> None:
    data = bytearray(Path(artifact).read_bytes())
    data[4096 + 100] ^= 1
    (tmp_path / "bad.gopt").write_bytes(data)
    cli("package", "bad.gopt", "--python", "shipped").refused("was altered")
    assert not (tmp_path / "shipped").exists()


def test_nothing_to_write(cli: Cli, artifact: str) -> None:
    cli("package", artifact).refused("--python DIR or --cpp DIR")


def test_wheels_that_are_not_there(cli: Cli, artifact: str, tmp_path: Path) -> None:
    cli("package", artifact, "--python", "shipped", "--wheels", "none").refused("none is no folder")
    (tmp_path / "empty").mkdir()
    words = ("empty has 0 wheels of apache-tvm-ffi", "pip download", "apache-tvm==")
    cli("package", artifact, "--python", "shipped", "--wheels", "empty").refused(*words)
