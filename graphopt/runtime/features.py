"""What this machine's CPU can do, as the kernel lists it; the name of a processor says nothing reliable in a VM."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from graphopt.runtime import gpu

_LISTS = ("flags", "Features")  # x86 and Arm


@cache
def host_features() -> frozenset[str]:
    """CPU flags in the kernel's spelling ("avx2", "avx512f", "asimd"), plus the architecture ("x86_64", "aarch64").

    Without /proc nothing is known, and artifacts that need a feature are refused.
    """
    return read_features(read_text(Path("/proc/cpuinfo"))) | {platform.machine()}


def read_features(cpuinfo: str) -> frozenset[str]:
    """Flags that every processor listed has: on big.LITTLE machines a thread may run on any of them."""
    lists = [line.partition(":")[2].split() for line in cpuinfo.splitlines() if line.split(":")[0].strip() in _LISTS]
    return frozenset.intersection(*map(frozenset, lists)) if lists else frozenset()


def cpu_name(root: Path = Path("/")) -> str:
    """The processor as its maker calls it, else the board (Arm), else the kind of machine; `root` holds proc."""
    cpuinfo, board = (read_text(root / name) for name in ("proc/cpuinfo", "proc/device-tree/model"))
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1] if found else board.strip("\0\n ") or platform.machine()


def read_text(path: Path) -> str:
    """What a file of the kernel says; nothing where it has none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def missing(required: Iterable[str]) -> tuple[str, ...]:
    """Those of `required` that this machine lacks, in their order."""
    host = host_features()
    return tuple(name for name in required if not (gpu.runs(name) if name.startswith(gpu.PREFIX) else name in host))
