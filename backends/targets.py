"""The CPUs and devices that targets are named after, what each is compiled as, and what is missing for it here."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from dataclasses import dataclass

from graphopt.backends.linker import HINT, cross_hint, find_cross_linker, find_linker
from graphopt.errors import CompileError, UsageError
from graphopt.runtime.features import missing


@dataclass(frozen=True)
class Device:
    """`level` is what its CPU runs of `target.LEVELS`, `cores` how many there are, None where that differs.

    `cuda` is the architecture of its GPU; where `cpu_only` says why, a program for it runs on its CPU, else on its GPU.
    `memory` is in GB, the most of its kind; `power_modes` are the watts that its modes are named after.
    """

    name: str
    summary: str
    level: str | None = None
    cores: int | None = None
    cuda: str | None = None
    memory: int | None = None
    power_modes: tuple[str, ...] = ()
    cpu_only: str | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether a program for it runs on its GPU."""
        return self.cuda is not None and self.cpu_only is None


_OLD_DRIVER = "its driver is older than TVM's CUDA runtime needs"
_V3, _BF16, _SPR = "cpu:x86-64-v3", "cpu:x86-64-v4-bf16", "cpu:sapphirerapids"
_ARM8, _ARM82, _ARM86 = "cpu:aarch64", "cpu:cortex-a78ae", "cpu:armv8.6-a"
_ALL = (
    Device("cpu:haswell", "Intel Core and Xeon from Haswell on", _V3),
    Device("cpu:cascadelake", "Intel Xeon from Cascade Lake on", "cpu:x86-64-v4-vnni"),
    Device("cpu:emeraldrapids", "Intel Xeon of the fifth generation", _SPR),
    Device("cpu:zen2", "AMD Ryzen and EPYC, Zen 2 and 3", _V3),
    Device("cpu:zen4", "AMD Ryzen and EPYC, Zen 4", _BF16),
    Device("cpu:zen5", "AMD Ryzen and EPYC, Zen 5", _BF16),
    Device("cpu:cortex-a57", "Cortex-A57", _ARM8),
    Device("cpu:cortex-a72", "Cortex-A72, AWS Graviton", _ARM8),
    Device("cpu:cortex-a76", "Cortex-A76", _ARM82),
    Device("cpu:neoverse-n1", "AWS Graviton 2, Ampere Altra", _ARM82),
    Device("cpu:neoverse-n2", "Azure Cobalt 100", _ARM86),
    Device("cpu:neoverse-v1", "AWS Graviton 3", _ARM86),
    Device("cpu:neoverse-v2", "AWS Graviton 4, Google Axion, NVIDIA Grace", _ARM86),
    Device("cpu:apple-m1", "Apple M1 under Linux", _ARM82),
    Device("cpu:apple-m2", "Apple M2 and later under Linux", _ARM86),
    Device("raspberry-pi-4", "4 Cortex-A72", _ARM8, 4, memory=8),
    Device("raspberry-pi-5", "4 Cortex-A76", _ARM82, 4, memory=16),
    Device("jetson-nano", "4 Cortex-A57", _ARM8, 4, "sm_53", 4, ("5", "10"), _OLD_DRIVER),
    Device("jetson-tx2", "4 Cortex-A57, 2 Denver", _ARM8, 4, "sm_62", 8, ("7.5", "15"), _OLD_DRIVER),
    Device("jetson-agx-xavier", "8 Carmel", _ARM8, 8, "sm_72", 64, ("10", "15", "30"), _OLD_DRIVER),
    Device("jetson-orin-nano", "6 Cortex-A78AE", _ARM82, 6, "sm_87", 8, ("7", "15", "25")),
    Device("jetson-orin-nx", "8 Cortex-A78AE", _ARM82, 8, "sm_87", 16, ("10", "15", "25", "40")),
    Device("jetson-agx-orin", "12 Cortex-A78AE", _ARM82, 12, "sm_87", 64, ("15", "30", "50", "60")),
    Device("jetson-thor", "14 Neoverse-V3AE", _ARM86, 14, "sm_110", 128, ("70", "90", "120")),
    Device("cuda:sm_80", "NVIDIA A100", cuda="sm_80", memory=80),
    Device("cuda:sm_86", "NVIDIA A10, A40, RTX 30", cuda="sm_86", memory=48),
    Device("cuda:sm_89", "NVIDIA L4, L40S, RTX 40", cuda="sm_89", memory=48),
    Device("cuda:sm_90", "NVIDIA H100, H200", cuda="sm_90", memory=141),
    Device("cuda:sm_100", "NVIDIA B200", cuda="sm_100", memory=192),
)
DEVICES = {device.name: device for device in _ALL}


def refuse_gpu(device: Device) -> None:
    """Raise UsageError where a program for the device would run on its GPU, which is none for a CPU's kernels."""
    if device.on_gpu:
        instead = f"; for its CPU: --target {device.level}" if device.level else ""
        raise UsageError(f"target {device.name} runs on a GPU ({device.cuda}), and this is for CPUs{instead}")


@dataclass(frozen=True)
class Ability:
    """What this machine can do for a target: "" where it can, else what is missing."""

    build: str
    run: str
    tune: str


def ability(features: tuple[str, ...]) -> Ability:
    """For a CPU with these features, the first of which is the machine."""
    lacking = missing(features)
    run = ""
    if features[0] != platform.machine():
        found = shutil.which(f"qemu-{features[0]}")
        run = f"another machine; its programs in C++ run in {found}" if found else f"a machine with {features[0]}"
    elif lacking:
        run = f"a CPU with {', '.join(lacking)}"
    return Ability(missing_builder(features[0]), run, "over RPC: graphopt tune --rpc HOST:PORT" if lacking else "")


def missing_builder(machine: str) -> str:
    """What it lacks here to compile and link for such a machine ("aarch64"); "" where it lacks nothing."""
    if importlib.util.find_spec("tvm") is None:
        return 'the compiler: pip install "graphopt[compile]"'
    here = machine == platform.machine()
    try:
        found = find_linker() if here else find_cross_linker(machine)
    except CompileError as e:
        return str(e)
    return "" if found else (HINT if here else cross_hint(machine))
