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


@pytest.mark.parametrize("command", [["-m", "graphopt", "list-targets"], [str(ROOT / "tools" / "list_targets.py")]])
def test_module_and_script_are_the_same_code(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "cpu"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from graphopt.tools.command_line import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "'torch'" not in done.stdout and "'tvm'" not in done.stdout


def test_main_returns_codes_instead_of_leaving() -> None:
    assert main(["list-targets", "--help"]) == 0
