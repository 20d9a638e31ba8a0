from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from platform import machine

import pytest

from graphopt.backends.cuda import compiler
from graphopt.backends.linker import find_cross_linker
from tests.tools.conftest import DYNAMIC, ROOT, TINY, Cli

OTHER_MACHINE, OTHER = ("x86_64", "cpu:x86-64-v4") if machine() == "aarch64" else ("aarch64", "cpu:cortex-a78ae")
OTHER_LINKER = find_cross_linker(OTHER_MACHINE)

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_compile_then_check(cli: Cli) -> None:
    outcome = cli("compile", TINY, "-o", "m.gopt", "--dynamic", DYNAMIC)
    assert outcome.code == 0, outcome.err
    assert "kernels" in outcome.out and "wrote m.gopt" in outcome.out
    assert cli("run", "m.gopt", "--check").code == 0


def test_slow_kernels_are_named_with_reason_and_nodes(cli: Cli) -> None:
    found = cli("compile", "tests.tools.tiny_models:unscheduled", "-o", "m.gopt", "--json").json["artifact"]
    assert found["slow"] == [{"kernel": "conv1d", "reason": "generic: no schedule rule took it", "nodes": ["conv1d"]}]
    assert found["checked_on"] == found["target"]
    out = cli("compile", "tests.tools.tiny_models:unscheduled", "-o", "m.gopt").out
    assert "slow: conv1d (generic: no schedule rule took it), for conv1d" in out


@pytest.mark.skipif(OTHER_LINKER is None, reason="needs the package ziglang or a cross gcc")
def test_what_could_not_run_here_is_still_to_be_checked(cli: Cli) -> None:
    outcome = cli("compile", TINY, "-o", "m.gopt", "--target", OTHER)
    assert outcome.code == 0 and "not on the target; on the target run: graphopt run m.gopt --check" in outcome.out
    outcome = cli("run", "m.gopt", "--check")
    assert outcome.code != 0 and "compiled for another CPU" in outcome.err
    outcome = cli("compile", TINY, "-o", "m.gopt", "--variants", f"cpu,{OTHER}")
    assert f"note  {OTHER} checked on" in outcome.out and outcome.out.count("--check") == 1, outcome.out


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


def test_comparing_operators_on_codes_that_are_not_there_is_said(cli: Cli) -> None:
    outcome = cli("compile", TINY, "-o", "m.gopt", "--check-operators")
    assert outcome.code == 0 and "no operator is on codes: there is nothing to compare alone" in outcome.out


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


INTERRUPTED = """
import os, signal
import {module} as module
from tests.tools.tiny_models import dense

def interrupted(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    return original(*arguments)

original, module.{name} = module.{name}, interrupted
"""


@pytest.mark.parametrize(
    ("module", "name"), [("graphopt.backends.cpu", "build"), ("graphopt.artifact.write", "lay_out")]
)
def test_ctrl_c_while_building_or_writing_leaves_nothing(tmp_path: Path, module: str, name: str) -> None:
    (tmp_path / "model.py").write_text(INTERRUPTED.format(module=module, name=name))
    environment = {**ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"}
    words = command(Path("m.gopt"), "model:dense")
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "graphopt: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["model.py"]


def test_variants_for_several_machines(cli: Cli) -> None:
    model = "tests.tools.tiny_models:dense"
    outcome = cli("compile", model, "-o", "m.gopt", "--variants", "x86-64-v3, x86-64-v4")
    assert outcome.code == 0 and "variants  cpu:x86-64-v3, cpu:x86-64-v4" in outcome.out, outcome.err
    assert cli("run", "m.gopt", "--check").code == 0
    cli("compile", model, "-o", "m.gopt", "--variants", "x86-64-v3,x86-64-v5").refused("cpu:x86-64-v5")
    both = ("--variants", "x86-64-v3,x86-64-v4", "--target", "cpu")
    cli("compile", model, "-o", "m.gopt", *both).refused("either --target or --variants")


def test_several_architectures_of_gpus_are_a_target(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """That gets as far as to the compilers, of which none is taken."""
    for name in ("find_nvcc", "find_nvrtc"):
        monkeypatch.setattr(compiler, name, lambda: None)
    several = ("--target", "cuda:sm_80+sm_90")
    assert cli("optimize", TINY, "-o", "m.pt2", *several).code == 0
    cli("compile", TINY, "-o", "m.gopt", *several).refused("no compiler for CUDA devices found", code=1)
    cli("compile", TINY, "-o", "m.gopt", "--target", "cuda:sm_80+sm_91").refused("unknown target 'cuda:sm_80+sm_91'")
