"""CUDA targets: `cuda:sm_87`, several architectures as `cuda:sm_80+sm_90`, and devices by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphopt.backends.target import Target
from graphopt.backends.target import resolve_target as resolve_cpu
from graphopt.backends.targets import DEVICES
from graphopt.errors import UnknownNameError, UsageError
from graphopt.runtime.gpu import PREFIX

FAMILY = "cuda"
ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_110", "sm_120")
_TASKS = 1 << 14  # equal shares of a kernel's work, where a rule asks for their number


@dataclass(frozen=True)
class CudaTarget(Target):
    """A CPU that starts kernels, and a GPU of one of `archs` that runs them; without `archs` the kernels are a CPU's.

    A task of a kernel is one thread, so that it has no vectors, and products of bytes are those of `dp4a`.
    """

    archs: tuple[str, ...] = ()

    @property
    def lanes(self) -> int:
        return 1

    @property
    def quads(self) -> str | None:
        return "int8"

    @property
    def registers(self) -> int:
        return 32


def resolve_target(name: str, threads: int | None = None) -> CudaTarget:
    """The target of this name. Raises UnknownNameError or UsageError."""
    if threads is not None:
        raise UsageError(f"threads is {threads}, and kernels of {name} share work by blocks; leave it out")
    device = DEVICES.get(name)
    if device is not None and device.on_gpu and device.level and device.cuda:
        host = device.level
        archs: tuple[str, ...] = (device.cuda,)
    else:
        family, _, wanted = name.partition(":")
        host, archs = "cpu:x86-64-v3", tuple(sorted(set(wanted.split("+")), key=_number))
        if family != FAMILY or not set(archs) <= set(ARCHS):
            raise UnknownNameError("target", name, target_names())
    cpu = resolve_cpu(host, 1)
    return CudaTarget(
        name, cpu.architecture, (*cpu.features, PREFIX + "+".join(archs)), _TASKS, cpu.machine, cpu.extensions, archs
    )


def _number(arch: str) -> int:
    digits = arch.removeprefix("sm_")
    return int(digits) if digits.isdigit() else 0


def target_names() -> tuple[str, ...]:
    """Every name of one architecture or device."""
    return (
        *(f"{FAMILY}:{arch}" for arch in ARCHS),
        *(device.name for device in DEVICES.values() if device.on_gpu and device.level),
    )


def runnable(target: CudaTarget) -> CudaTarget:
    """The same kernels as loops for this machine's CPU: nothing is launched to check a model."""
    here = resolve_cpu("cpu", 1)
    return replace(
        target,
        architecture=here.architecture,
        features=(here.machine,),
        machine=here.machine,
        extensions=here.extensions,
        archs=(),
    )
