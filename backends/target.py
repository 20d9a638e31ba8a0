"""Targets: the machine an artifact is compiled for, as `family` or `family:level`."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace

from graphopt.backends.amx_probe import amx_works
from graphopt.backends.targets import DEVICES, refuse_gpu
from graphopt.errors import UnknownNameError, UsageError
from graphopt.runtime.features import host_features, missing

# x86-64 psABI micro-architecture levels (System V ABI, section 3.1.1) as the runtime spells the flags, oldest first.
_V3 = ("x86_64", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma")
_V3_VNNI = (*_V3, "avx_vnni")  # Intel from Alder Lake on, AMD from Zen 5 on, also where there is no AVX-512
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_VNNI = (*_V4, "avx512_vnni")  # Intel from Cascade Lake on, AMD from Zen 4 on
_BF16 = (*_VNNI, "avx512_bf16")  # Intel from Cooper Lake on, AMD from Zen 4 on
_AMX = (*_BF16, "avx512vbmi", "amx_tile", "amx_bf16", "amx_int8")  # Xeons from Sapphire Rapids on
# Armv8-A with NEON, which every 64-bit Arm has, and what LLVM may use of Armv8.2-A on the core of a Jetson Orin.
_ARMV8 = ("aarch64", "fp", "asimd")
_ARMV8_2 = (*_ARMV8, "atomics", "fphp", "asimdhp", "asimdrdm", "lrcpc", "asimddp")
_ARMV8_6 = (*_ARMV8_2, "i8mm")  # Neoverse from V1 and N2 on, Cortex-A from A510 and A710 on
LEVELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cpu:x86-64-v3": ("x86-64-v3", _V3),
    "cpu:x86-64-v3-vnni": ("x86-64-v3", _V3_VNNI),
    "cpu:x86-64-v4": ("x86-64-v4", _V4),
    "cpu:x86-64-v4-vnni": ("x86-64-v4", _VNNI),
    "cpu:x86-64-v4-bf16": ("x86-64-v4", _BF16),
    "cpu:sapphirerapids": (
        "x86-64-v4",
        _AMX,
    ),  # not LLVM's own name for it, which brings instructions without a flag here
    "cpu:aarch64": ("generic", _ARMV8),
    "cpu:cortex-a78ae": ("cortex-a78ae", _ARMV8_2),
    "cpu:armv8.6-a": ("cortex-a78ae", _ARMV8_6),  # a core much like those, for what else LLVM knows by its name
}
EXTENSIONS = {  # beyond what an architecture has: the kernel's flag -> LLVM's name
    "avx_vnni": "avxvnni",
    "avx512_bf16": "avx512bf16",
    "avx512_vnni": "avx512vnni",
    "avx512vbmi": "avx512vbmi",
    "amx_tile": "amx-tile",
    "amx_bf16": "amx-bf16",
    "amx_int8": "amx-int8",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
}
_QUADS = {"avx512_vnni": "uint8", "avx_vnni": "uint8", "i8mm": "uint8", "asimddp": "int8"}
MOST_THREADS = 1024  # more CPUs than one machine has; shares of kernels beyond that are only overhead


@dataclass(frozen=True)
class Target:
    """What kernels are written for, and the machine that their code is generated for.

    `features` are the CPU flags that the code needs, the first names the machine; `threads` is how many equal shares a
    kernel's work is cut into; `machine` ("x86_64", "aarch64"), `architecture` (LLVM's name of the CPU) and `extensions`
    (LLVM's names of what it has besides) choose the instructions.
    """

    name: str
    architecture: str
    features: tuple[str, ...]
    threads: int
    machine: str = "x86_64"
    extensions: tuple[str, ...] = ()

    @property
    def lanes(self) -> int:
        """float32 lanes of one vector register."""
        if "avx512f" in self.features:
            return 16
        return 4 if "asimd" in self.features else 8

    @property
    def pairs(self) -> bool:
        """Whether one instruction multiplies bfloat16 in pairs and adds the products to float32."""
        return "avx512_bf16" in self.features

    @property
    def amx(self) -> bool:
        """Whether there are tiles, and an instruction that multiplies them as matrices of bfloat16."""
        return "amx_bf16" in self.features

    @property
    def quads(self) -> str | None:
        """What one instruction multiplies by int8, adding four products to an int32; None where there is none."""
        return next((dtype for feature, dtype in _QUADS.items() if feature in self.features), None)

    @property
    def registers(self) -> int:
        """How many vector registers there are."""
        return 16 if self.lanes == 8 else 32


def resolve_target(name: str, threads: int | None = None) -> Target:
    """The target of this name; "cpu" is the best level this machine has, a device's is the level of its CPU.

    Raises UnknownNameError, or UsageError where it cannot be compiled for.
    """
    available = len(os.sched_getaffinity(0))
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; give a number of at least 1")
    if threads is not None and threads > MOST_THREADS:
        raise UsageError(f"threads is {threads}; give a number of at most {MOST_THREADS}")
    if name == "cpu":
        name = _host_level()
    if device := DEVICES.get(name):
        refuse_gpu(device)
        name, threads = str(device.level), threads or device.cores
    if name not in LEVELS:
        raise UnknownNameError("target", name, target_names())
    architecture, features = LEVELS[name]
    threads = min(threads or available, MOST_THREADS)
    return Target(name, architecture, features, threads, features[0], _extensions(features))


def runnable(target: Target) -> Target:
    """The target itself where this machine has its features, else the same kernels as code for this machine.

    Tiles, packed weights and the order of additions are those of `target`; only the instructions are not.
    """
    if not missing(target.features) and (not target.amx or amx_works()):
        return target
    architecture, features = LEVELS[_host_level()]
    return replace(target, architecture=architecture, machine=features[0], extensions=_extensions(features))


def _extensions(features: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(EXTENSIONS[feature] for feature in features if feature in EXTENSIONS)


def target_names() -> tuple[str, ...]:
    """Every name `resolve_target` takes, or refuses because it is a GPU's."""
    return ("cpu", *LEVELS, *DEVICES)


def _host_level() -> str:
    """The best level of this machine: levels of one kind of machine are in order, the oldest first."""
    machine, features = platform.machine(), host_features()
    levels = [name for name, (_, needed) in LEVELS.items() if needed[0] == machine]
    if not levels:
        raise UsageError(f"this machine is {machine}; targets are x86_64 and aarch64 machines")
    for name in reversed(levels):
        needed = set(LEVELS[name][1])
        if needed <= features and ("amx_tile" not in needed or amx_works()):
            return name
    lacking = sorted(set(LEVELS[levels[0]][1]) - features)
    raise UsageError(f"this CPU lacks {', '.join(lacking)}; the oldest supported level is {levels[0]}")
