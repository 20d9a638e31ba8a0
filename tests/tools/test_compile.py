from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tools.conftest import DYNAMIC, ROOT, TINY, Cli

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_compile_then_check(cli: Cli) -> None:
    outcome = cli("compile", TINY, "-o", "m.gopt", "--dynamic", DYNAMIC)
    assert outcome.code == 0, outcome.err
    assert "kernels" in outcome.out and "wrote m.gopt" in outcome.out
    assert cli("run", "m.gopt", "--check").code == 0


def test_inspect_shows_the_artifact(cli: Cli, artifact: str) -> None:
    outcome = cli("inspect", artifact)
    assert outcome.code == 0 and "rows x 8" in outcome.out and "kernels" in outcome.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("-o", "m.onnx"), "end its name in .gopt"),
        (("-o", "no/m.gopt"), "does not exist"),
        (("-o", "m.gopt", "--target", "cpu:x86-64-v9"), "'cpu:x86-64-v4'"),
        (("-o", "m.gopt", "--passes", "dead-cod"), "'dead-code'"),
        (("-o", "m.gopt", "-O9"), "-O"),
    ],
)
def test_wrong_options(cli: Cli, tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    cli("compile", TINY, *words).refused(expected)
    assert not list(tmp_path.iterdir())


def command(output: Path, model: str = TINY) -> list[str]:
    return [sys.executable, "-m", "graphopt", "compile", model, "-o", str(output)]


def test_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    output = tmp_path / "m.gopt"
    output.write_text("before")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # the weights alone have 4 MB

    environment = {**ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"}
    words = command(output, "tests.tools.tiny_models:wide")
    done = subprocess.run(words, env=environment, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    assert (
        done.returncode == 1
        and done.stderr.startswith("graphopt: error: cannot write")
        and done.stderr.count("\n") == 1
    )
    assert output.read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["m.gopt"]


@pytest.mark.parametrize("seconds", [1.0, 2.5])
def test_ctrl_c_leaves_nothing(tmp_path: Path, seconds: float) -> None:
    with subprocess.Popen(command(tmp_path / "m.gopt"), env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr and process.stderr.read() == b"graphopt: interrupted\n"
    assert not list(tmp_path.iterdir())
