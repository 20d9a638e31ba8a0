"""Linking a compiled module into a shared library: a C compiler driver, or zig from its pip package."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from graphopt.errors import CompileError

_DRIVERS = ("cc", "gcc", "clang")
HINT = "install a C compiler (gcc or clang), set CC to one, or run: pip install ziglang"
_OLDEST_GLIBC = "2.28"  # what zig links against; JetPack 5 has 2.31


def find_linker() -> tuple[str, ...] | None:
    """The command that links: $CC with its flags, else cc, gcc, clang or zig's driver from the package `ziglang`.

    None where none is installed; raises CompileError when CC is set to something that cannot be run.
    """
    if chosen := os.environ.get("CC", "").strip():
        return _split(chosen)
    for name in _DRIVERS:
        if path := shutil.which(name):
            return (path,)
    return (sys.executable, "-m", "ziglang", "cc") if _has_zig() else None


def find_cross_linker(machine: str) -> tuple[str, ...] | None:
    """The command that links for another machine: its gcc where installed, else zig's driver, which links for any.

    CC is for this machine and not asked. None where neither is installed.
    """
    if path := shutil.which(f"{machine}-linux-gnu-gcc"):
        return (path,)
    if _has_zig():
        return (sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu.{_OLDEST_GLIBC}")
    return None


def cross_hint(machine: str) -> str:
    """What to do where no linker for the machine is installed."""
    return f"run: pip install ziglang, or install gcc-{machine.replace('_', '-')}-linux-gnu"


def _has_zig() -> bool:
    return importlib.util.find_spec("ziglang") is not None


def _split(chosen: str) -> tuple[str, ...]:
    """CC as make and the shell take it: a driver, maybe behind a launcher such as ccache, and flags."""
    try:
        name, *flags = shlex.split(chosen)
    except ValueError as e:
        raise CompileError(f"CC is {chosen!r}, which is no command ({e}); set it to a C compiler or unset it") from e
    if (path := shutil.which(name)) is None:
        raise CompileError(f"CC is {chosen!r}, and {name!r} cannot be found; set it to a C compiler or unset it")
    return (path, *flags)


def link(objects: list[str], library: str, machine: str = platform.machine()) -> None:
    """Link object files for `machine` to a shared library that needs only libm.

    Raises CompileError with the linker's first words.
    """
    here = machine == platform.machine()
    command = find_linker() if here else find_cross_linker(machine)
    hint = HINT if here else cross_hint(machine)
    if command is None:
        raise CompileError(f"no linker for {machine} found to build the library; {hint}")
    # No build id and no path of a temporary file, so that equal inputs give equal bytes.
    flags = ["-shared", "-fPIC", "-s", "-Wl,--build-id=none", "-o", library]
    done = subprocess.run([*command, *flags, *objects, "-lm"], capture_output=True, text=True, check=False)
    if done.returncode or not Path(library).exists():
        words = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise CompileError(f"{Path(command[0]).name} could not link the library: {words}; {hint}")
