"""Artifacts for AMX and how they are run: with functions in place of the instructions, and in the emulator."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graphopt.backends import cpu
from graphopt.backends.linker import find_linker
from graphopt.backends.target import LEVELS, Target, runnable
from graphopt.compile import Artifact, _trial, prepare
from graphopt.database import open_store
from graphopt.program import Program
from graphopt.runtime.features import host_features

LEVEL = "cpu:sapphirerapids"
AMX = {"amx_tile", "amx_bf16", "amx_int8"}
LACKING = sorted(set(LEVELS[LEVEL][1]) - AMX - host_features())
_RULES = Path(__file__).parent / "rules"


def products_of(artifact: Artifact) -> list[tuple[str, Any]]:
    """(rule, what it multiplies) of every kernel that multiplies matrices."""
    (variant,) = artifact.manifest.variants
    kernels = variant.kernels.values()
    return [(each.rule, each.configuration.get("products")) for each in kernels if "gemm" in each.rule]


def built(program: Program) -> tuple[Artifact, Artifact]:
    """The artifact, unchecked, and the same with functions in place of the instructions."""
    compilation = prepare(program, LEVEL, threads=2)
    module = compilation.lower(open_store(None))
    artifact = compilation.assemble(module)
    return artifact, _trial(artifact, cpu.build(module.module, without_tiles(compilation.target)))


def without_tiles(target: Target) -> Target:
    """The same kernels as code for this machine, whether it has tiles or not."""
    here = runnable(target)
    return replace(here, extensions=tuple(each for each in here.extensions if not each.startswith("amx")))


def build_emulator(folder: Path) -> Path:
    """A library to preload; skips the test where nothing can be emulated."""
    if LACKING:
        pytest.skip(f"this CPU lacks {', '.join(LACKING)}")
    if AMX & host_features():
        pytest.skip("this CPU has AMX, so nothing needs to be emulated")
    command = find_linker()
    if command is None:
        pytest.skip("needs a C compiler")
    library = folder / "emulator.so"
    flags = ["-O2", "-mavx2", "-mfma", "-ffp-contract=off", "-shared", "-fPIC", "-o", str(library)]
    done = subprocess.run([*command, *flags, str(_RULES / "amx_emulator.c"), "-ldl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def run_child(artifact: Artifact, folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    artifact.save(folder / "model.gopt")
    results = folder / "results.npz"
    command = [sys.executable, str(_RULES / "amx_child.py"), str(folder / "model.gopt"), str(results)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300), results
