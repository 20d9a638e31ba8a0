"""What a measurement on this machine is valid for, and where it comes from."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from graphopt.backends.tuner.record import Hardware
from graphopt.runtime.features import cpu_name, host_features, read_text

# Other flags tell of the kernel, its mitigations and the virtual machine, which change under the same CPU.
_X86 = re.compile(r"x86_64|(sse|ssse|avx|fma|amx|bmi)\w*|f16c|gfni|vaes|vpclmulqdq")
_ARM = re.compile(r"aarch64|fp|fphp|(asimd|sve|sme)\w*|atomics|bf16|i8mm|i?lrcpc")


def this_hardware(target: str, threads: int) -> Hardware:
    """What is measured here is valid for: this CPU, with this target and number of threads, and the TVM installed."""
    return Hardware(target, instruction_sets(host_features()), threads, tvm_version())


def any_hardware(target: str, threads: int) -> Hardware:
    """To look up what was measured on any CPU with this target, as when compiling for a machine that is not at hand."""
    return Hardware(target, (), threads, tvm_version())


def instruction_sets(flags: Iterable[str]) -> tuple[str, ...]:
    """Those of the CPU flags that a kernel's speed depends on, sorted."""
    found = set(flags)
    wanted = _X86 if "x86_64" in found else _ARM  # one flag may be two things: sme is memory encryption on x86
    return tuple(sorted(flag for flag in found if wanted.fullmatch(flag)))


def tvm_version() -> str:
    """Of the installed TVM, which is not imported."""
    return metadata.version("apache-tvm")


def provenance(root: Path = Path("/")) -> dict[str, str]:
    """Device, date, versions, and clocks where they can be read, of a record that is measured now.

    `root` holds the device's proc and sys, by default those of this machine.
    """
    about = {
        "device": cpu_name(root),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "graphopt": metadata.version("graphopt"),
        "tvm": tvm_version(),
        "python": platform.python_version(),
    }
    return about | clocks(root)


def clocks(root: Path) -> dict[str, str]:
    """What the kernel says of the clocks under `root`, which a virtual machine often cannot know.

    "clock_mhz" is the fastest core's at this moment; "governor" and "max_clock_mhz" are the first CPU's setting.
    """
    found = {}
    running = re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", read_text(root / "proc/cpuinfo"), re.MULTILINE)
    if running:
        found["clock_mhz"] = f"{max(map(float, running)):.0f}"
    policy = root / "sys/devices/system/cpu/cpu0/cpufreq"
    if governor := read_text(policy / "scaling_governor").strip():
        found["governor"] = governor
    if (most := read_text(policy / "scaling_max_freq").strip()).isdigit():
        found["max_clock_mhz"] = str(int(most) // 1000)
    return found
