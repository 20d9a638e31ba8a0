"""What makes machine code for a GPU, and what is said where nothing can."""

from __future__ import annotations

import struct

import pytest

from graphopt.backends.cuda import compiler
from graphopt.backends.cuda.target import ARCHS, CudaTarget, resolve_target, runnable, target_names
from graphopt.errors import CompileError, UnknownNameError, UsageError
from graphopt.registry import list_targets
from graphopt.runtime import gpu
from graphopt.runtime.features import missing

KERNEL = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'


def elf(flags: int, abi: int) -> bytes:
    return (
        b"\x7fELF"
        + bytes([2, 1, 1, 0x41, abi])
        + bytes(9)
        + struct.pack("<H", 190)
        + bytes(28)
        + struct.pack("<I", flags)
    )


def test_machine_code_is_found_by_its_architecture() -> None:
    data = b"#" + elf(0x5600, 8) + b"\x7fELF" + bytes(60) + elf(0x50, 7)
    assert compiler.cubins(data) == ("sm_86", "sm_80")
    compiler.check_machine_code(data, ("sm_80", "sm_86"))
    with pytest.raises(CompileError, match="no machine code for sm_90"):
        compiler.check_machine_code(data, ("sm_80", "sm_90"))
    with pytest.raises(CompileError, match="source"):
        compiler.check_machine_code(data + b"__global__", ("sm_80",))


@pytest.mark.parametrize("arch", ["sm_80", "sm_87", "sm_90"])
def test_there_is_a_compiler_here(arch: str) -> None:
    compile_source = compiler.find_compiler([arch])
    assert set(compiler.cubins(compile_source(KERNEL))) == {arch}
    with pytest.raises(CompileError, match="could not compile the kernels"):
        compile_source("__global__ void wrong() { nothing; }")


def test_two_builds_give_equal_bytes() -> None:
    compile_source = compiler.find_compiler(["sm_87"])
    assert compile_source(KERNEL) == compile_source(KERNEL)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "find_nvcc", lambda: None)
    with pytest.raises(CompileError, match="not for sm_80 and sm_90; choose one, or install the CUDA toolkit"):
        compiler.find_compiler(["sm_80", "sm_90"])
    monkeypatch.setattr(compiler, "find_nvrtc", lambda: None)
    with pytest.raises(CompileError, match="no compiler for CUDA devices found; install"):
        compiler.find_compiler(["sm_80"])


@pytest.mark.parametrize("name", target_names())
def test_every_target_resolves(name: str) -> None:
    target = resolve_target(name)
    assert name in list_targets() and set(target.archs) <= set(ARCHS)
    assert not runnable(target).archs and not missing(runnable(target).features)


def test_names_of_targets() -> None:
    assert resolve_target("cuda:sm_90+sm_80").archs == ("sm_80", "sm_90")
    assert isinstance(resolve_target("jetson-agx-orin"), CudaTarget)
    assert resolve_target("jetson-agx-orin").machine == "aarch64"
    for name in ("cuda", "cuda:sm_1", "cuda:sm_80+", "jetson-agx-orin:sm_87"):
        with pytest.raises(UnknownNameError):
            resolve_target(name)
    with pytest.raises(UsageError, match="leave it out"):
        resolve_target("cuda:sm_80", 2)


def test_code_runs_on_its_own_major_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpu_architecture", lambda: (8, 7))
    assert missing(["cuda:sm_80", "cuda:sm_90", "cuda:sm_89", "cuda:sm_87+sm_90"]) == ("cuda:sm_90", "cuda:sm_89")
    assert missing(["cuda:sm_87a", "cuda:", "cuda:sm_90a+sm_80"]) == ("cuda:sm_87a", "cuda:")
    monkeypatch.setattr(gpu, "gpu_architecture", lambda: None)
    assert missing(["cuda:sm_80"]) == ("cuda:sm_80",)
