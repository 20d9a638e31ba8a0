"""`graphopt.compile`: several entries, what it refuses, and that a wrong result is never saved."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from platform import machine

import numpy as np
import pytest
import torch
from torch import nn

import graphopt
from graphopt.backends import linker, lowering
from graphopt.backends.operators import OPERATORS
from graphopt.errors import ArtifactError, CompileError, UnknownNameError, UsageError, VerificationError
from tests import models


def test_entries_share_one_library_and_their_weights(tmp_path: Path) -> None:
    program = models.program("mlp")
    artifact = graphopt.compile({"first": program, "second": program.copy()})
    artifact.save(tmp_path / "two.gopt")
    session = graphopt.load(tmp_path / "two.gopt")
    assert session.entries == ("first", "second")
    feed = {program.inputs[0].name: program.examples[0].numpy()}
    one, two = (session.run(None, feed, entry=name)[0] for name in session.entries)
    assert np.array_equal(one, two)
    assert len(artifact.weights) == len(artifact.manifest.variants[0].weights["first"])


def test_saving_twice_gives_equal_bytes(tmp_path: Path) -> None:
    program = models.program("mlp")
    for name in ("a.gopt", "b.gopt"):
        graphopt.compile(program).save(tmp_path / name)
    assert (tmp_path / "a.gopt").read_bytes() == (tmp_path / "b.gopt").read_bytes()


def test_manifest_says_which_passes_ran_and_what_they_did(tmp_path: Path) -> None:
    program = graphopt.optimize(models.program("conv_net"), "no-op-removal,batch-norm-folding").program
    program.save(str(tmp_path / "m.pt2"))
    passes = graphopt.compile(graphopt.capture(tmp_path / "m.pt2")).manifest.passes
    assert [(item["entry"], item["name"]) for item in passes] == [
        ("main", "no-op-removal"),
        ("main", "batch-norm-folding"),
    ]
    assert passes[1]["rewrites"] > 0 and passes[1]["error"] < 1e-5 and passes[1]["options"] == {}


class ByItself(torch.nn.Module):
    """A convolution whose filter is not a constant has no schedule."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv1d(x, x)


def test_report_names_slow_kernels() -> None:
    assert not graphopt.compile(models.program("conv_net")).report["slow"]
    x = torch.randn(1, 2, 9)
    report = graphopt.compile(graphopt.capture(ByItself(), (x,))).report
    assert report["slow"] and all(report["kernels"][name] == "generic" for name in report["slow"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tune": 0}, "tuning for 0 seconds is not possible"),
        ({"database": 5}, "database=5 is no store"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_unusable_arguments(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        graphopt.compile(models.program("mlp"), **arguments)  # type: ignore[arg-type]


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'cpu:x86-64-v4'"):
        graphopt.compile(models.program("mlp"), "cpu:x86-64-v5")


class Sorting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.kthvalue(x, 2).values


def test_operator_without_lowering_is_named() -> None:
    with pytest.raises(CompileError, match=r"aten.kthvalue.default at kthvalue has no lowering for cpu"):
        graphopt.compile(graphopt.capture(Sorting(), (torch.randn(4, 5),)))


def test_wrong_lowering_is_found_before_anything_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    aten = torch.ops.aten
    wrong = {**OPERATORS, aten.relu.default: OPERATORS[aten.abs.default]}
    monkeypatch.setattr(lowering, "OPERATORS", wrong)
    program = graphopt.capture(nn.ReLU(), (torch.randn(4, 5),))
    with pytest.raises(VerificationError, match=r"output 'output' of entry 'main' at fixed sizes is off by"):
        graphopt.compile(program)


def test_missing_linker_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linker, "find_linker", lambda: None)
    with pytest.raises(CompileError, match=r"no linker for .* found .* install a C compiler"):
        graphopt.compile(models.program("mlp"))


def test_linker_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linker, "find_linker", lambda: ("/bin/false",))
    with pytest.raises(CompileError, match="false could not link the library"):
        graphopt.compile(models.program("mlp"))


def test_cc_may_hold_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "env 'cc' -Wall")
    assert linker.find_linker() == (shutil.which("env"), "cc", "-Wall")


@pytest.mark.parametrize("chosen", ["no-such-cc -Wall", "'cc"])
def test_a_cc_that_is_no_command_is_named_and_not_replaced(monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    monkeypatch.setenv("CC", chosen)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(CompileError, match=f"CC is .{chosen}"):
        linker.find_linker()


def test_zig_is_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "ziglang" else None)
    command = linker.find_linker()
    assert command is not None and command[1:] == ("-m", "ziglang", "cc")


def test_a_cross_compiler_wins_over_zig_and_cc_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-cc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    command = linker.find_cross_linker("aarch64")
    assert command is not None and command[1:4] == ("-m", "ziglang", "cc")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert linker.find_cross_linker("aarch64") == ("/usr/bin/aarch64-linux-gnu-gcc",)


OTHER_MACHINE, OTHER = ("x86_64", "cpu:x86-64-v4") if machine() == "aarch64" else ("aarch64", "cpu:cortex-a78ae")


def test_another_machine_without_its_linker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linker, "find_cross_linker", lambda machine: None)
    with pytest.raises(CompileError, match=r"no linker for \w+ found .* pip install ziglang, or install gcc-"):
        graphopt.compile(models.program("mlp"), OTHER)


@pytest.mark.skipif(linker.find_cross_linker(OTHER_MACHINE) is None, reason="needs the package ziglang or a cross gcc")
def test_another_machine_gets_its_artifact_and_the_report_says_where_it_ran(tmp_path: Path) -> None:
    artifact = graphopt.compile(models.program("mlp"), OTHER)
    assert artifact.report["checked_on"].endswith("not on the target") and artifact.report["errors"]["main"] < 1e-5
    (library,) = artifact.libraries.values()
    assert int.from_bytes(library[18:20], "little") == {"x86_64": 62, "aarch64": 183}[OTHER_MACHINE]  # ELF's e_machine
    artifact.save(tmp_path / "other.gopt")
    with pytest.raises(ArtifactError, match=f"compiled for another CPU: {OTHER} needs {OTHER_MACHINE}"):
        graphopt.load(tmp_path / "other.gopt")
    assert graphopt.compile(models.program("mlp"), OTHER).libraries == artifact.libraries
