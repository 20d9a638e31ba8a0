from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.errors import VerificationError
from graphopt.tools import list_targets
from graphopt.tools.command_line import VERBS, main
from tests.tools.conftest import ROOT, Cli


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(cli: Cli, verb: str) -> None:
    outcome = cli(verb, "--help")
    assert outcome.code == 0 and f"graphopt {verb}" in outcome.out


def test_help_lists_every_verb(cli: Cli) -> None:
    outcome = cli("--help")
    assert outcome.code == 0 and all(f"  {verb}" in outcome.out for verb in VERBS)


def test_version(cli: Cli) -> None:
    assert cli("--version").out.startswith("graphopt 0.")


def test_unknown_verb_names_the_nearest(cli: Cli) -> None:
    cli("optimise").refused("unknown verb 'optimise'", "'optimize'")


def test_no_verb(cli: Cli) -> None:
    cli().refused("a verb is missing")


def test_unknown_option_names_the_nearest(cli: Cli) -> None:
    cli("optimize", "m.pt2", "--pases", "x").refused("unknown option '--pases'", "'--passes'")


def test_options_are_not_abbreviated(cli: Cli) -> None:
    cli("run", "m.gopt", "--inp", "x.npz").refused("unknown option '--inp'", "'--input'")


def test_missing_argument(cli: Cli) -> None:
    cli("inspect").refused("MODEL")


def test_snake_case_options_are_accepted(cli: Cli, tmp_path: Path) -> None:
    help = cli("list_targets".replace("_", "-"), "--json", tmp_path / "a_b.json")
    assert help.code == 0 and (tmp_path / "a_b.json").exists()


def test_unexpected_error_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_targets, "run", fail(ValueError("a\nb")))
    cli("list-targets").refused("ValueError: a b", "--debug", code=1)


def test_debug_shows_the_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_targets, "run", fail(ValueError("a")))
    outcome = cli("list-targets", "--debug")
    assert outcome.code == 1 and "Traceback" in outcome.err


def test_own_error_says_which_code(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_targets, "run", fail(VerificationError("wrong")))
    cli("list-targets").refused("wrong", code=1)


def test_full_disk_is_a_failure_not_a_usage_error(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_targets, "run", fail(OSError(28, "No space left on device", "m.gopt")))
    cli("list-targets").refused("m.gopt: No space left on device", code=1)


def test_missing_extra_names_the_install_command(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_targets, "run", fail(ModuleNotFoundError("no tvm", name="tvm")))
    cli("list-targets").refused('pip install "graphopt[compile]"')


def test_interrupt(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_targets, "run", fail(KeyboardInterrupt()))
    outcome = cli("list-targets")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "graphopt: interrupted\n")


def fail(error: BaseException) -> object:
    def run(arguments: object) -> int:
        raise error

    return run


def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    waits = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    (tmp_path / "waiting.py").write_text(f"def model():\n    {waits}\n")
    command = [sys.executable, "-m", "graphopt", "inspect", "waiting:model"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == b"graphopt: interrupted\n"


LOST = """
import os, signal, time, weakref
from tests.tools.tiny_models import dense

class Thing:
    pass

def press(*arguments):
    os.kill(os.getpid(), signal.SIGINT)

def in_a_callback():
    thing = Thing()
    reference = weakref.ref(thing, press)
    del thing
    time.sleep(60)

def swallowed():
    try:
        press()
    except KeyboardInterrupt:
        pass
    return dense()

def another_error():
    try:
        press()
    except KeyboardInterrupt:
        raise RuntimeError("native code failed")
"""


@pytest.mark.parametrize("function", ["in_a_callback", "swallowed", "another_error"])
def test_a_ctrl_c_that_gets_lost_on_its_way(tmp_path: Path, function: str) -> None:
    (tmp_path / "lost.py").write_text(LOST)
    command = [sys.executable, "-m", "graphopt", "inspect", f"lost:{function}", "--json", "out.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "graphopt: interrupted\n")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(streams: str) -> None:
    command = f"exec {sys.executable} -m graphopt list-targets --json {streams}"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_full_stdout_is_a_failure() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "graphopt", "list-targets"]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "No space left on device" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
        ImportError("libtorch.so: failed to map segment from shared object", name="torch._C"),
    ],
)
def test_out_of_memory_in_any_words(cli: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(list_targets, "run", fail(error))
    cli("list-targets").refused("out of memory", code=1)


@pytest.mark.parametrize("command", [["-m", "graphopt", "list-targets"], [str(ROOT / "tools" / "list_targets.py")]])
def test_module_and_script_are_the_same_code(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split()[0] == "cpu"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from graphopt.tools.command_line import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "'torch'" not in done.stdout and "'tvm'" not in done.stdout


def test_main_returns_codes_instead_of_leaving() -> None:
    assert main(["list-targets", "--help"]) == 0
