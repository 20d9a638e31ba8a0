"""Artifacts for 64-bit Arm, run by the C++ program that ships with them in an emulator."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from graphopt.package.cpp_project import write_cpp_project
from graphopt.package.libraries import FFI, download_hint

EMULATOR = "qemu-aarch64"
CPUS = {"cpu:aarch64": "cortex-a53", "cpu:cortex-a78ae": "cortex-a76", "cpu:armv8.6-a": "max"}  # with no more than that
LIBRARIES = Path("/usr/aarch64-linux-gnu")
_COMPILER = "aarch64-linux-gnu-g++"
_ZIG = f"{sys.executable} -m ziglang c++ -target aarch64-linux-gnu.2.31"


def unavailable(what: str) -> None:
    """Skip; in CI, which installs all that is needed, fail."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is not there")
    pytest.skip(f"needs {what}")


def wheels_for_arm(folder: Path) -> Path:
    """A folder with the wheels, which is filled as the error message says."""
    if not list(folder.glob(f"{FFI.replace('-', '_')}-*.whl")):
        command = [sys.executable, "-m", *shlex.split(download_hint("aarch64"))]
        command[command.index("-d") + 1] = str(folder)
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            unavailable(f"an index of packages ({done.stderr.strip().splitlines()[-1]})")
    return folder


@dataclass(frozen=True)
class Runner:
    """`program` is the example of a shipped folder; `cpu` the emulator's, "" for this machine."""

    program: Path
    emulated: bool

    def __call__(
        self, model: Path, feed: Mapping[str, np.ndarray], folder: Path, cpu: str = ""
    ) -> dict[str, np.ndarray]:
        """The outputs by name."""
        done = self.raw(model, feed, folder, cpu)
        assert done.returncode == 0, done.stderr
        names = [line.split()[0] for line in done.stdout.splitlines()]
        return {name: np.load(folder / "out" / f"{name}.npy") for name in names}

    def raw(
        self, model: Path, feed: Mapping[str, np.ndarray], folder: Path, cpu: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """What came of the process."""
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir()
        words = [str(self.program), str(model), "-o", str(folder / "out")]
        for name, array in feed.items():
            np.save(folder / f"{name}.npy", array)
            words.append(f"{name}={folder / name}.npy")
        if self.emulated:
            words = [EMULATOR, "-cpu", cpu, "-L", str(LIBRARIES), *words]
        return subprocess.run(words, capture_output=True, text=True, timeout=300)


def arm_runner(model: Path, wheels: Path, folder: Path) -> Runner:
    """Built with the cross compiler from the folder that ships this model, which is for 64-bit Arm."""
    if shutil.which(EMULATOR) is None:
        unavailable(f"{EMULATOR} (Debian: qemu-user)")
    if not (LIBRARIES / "lib" / "libstdc++.so.6").exists():
        unavailable("libstdc++ of 64-bit Arm (Debian: g++-aarch64-linux-gnu)")
    write_cpp_project(model, str(folder), str(wheels))
    build(folder, _COMPILER if shutil.which(_COMPILER) else _ZIG)
    return Runner(folder / "run", emulated=True)


def build(folder: Path, compiler: str = "") -> None:
    """Without CMake."""
    environment = os.environ | ({"CXX": compiler} if compiler else {})
    done = subprocess.run(
        ["sh", str(folder / "build.sh")], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
