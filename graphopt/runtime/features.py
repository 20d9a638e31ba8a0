"""What this machine's CPU can do, as the kernel lists it; the name of a processor says nothing reliable in a VM."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path

_LISTS = ("flags", "Features")  # x86 and Arm


@cache
def host_features() -> frozenset[str]:
    """CPU flags in the kernel's spelling ("avx2", "avx512f", "asimd"), plus the architecture ("x86_64", "aarch64")."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no /proc: nothing is known, and artifacts that need a feature are refused
        cpuinfo = ""
    return read_features(cpuinfo) | {platform.machine()}


def read_features(cpuinfo: str) -> frozenset[str]:
    """Flags that every processor listed has: on big.LITTLE machines a thread may run on any of them."""
    lists = [line.partition(":")[2].split() for line in cpuinfo.splitlines() if line.split(":")[0].strip() in _LISTS]
    return frozenset.intersection(*map(frozenset, lists)) if lists else frozenset()


def missing(required: Iterable[str]) -> tuple[str, ...]:
    """Those of `required` that this machine lacks, in their order."""
    host = host_features()
    return tuple(name for name in required if name not in host)
