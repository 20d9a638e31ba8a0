"""The CUDA family: which rules write its kernels, and how a library with machine code for GPUs is built."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from graphopt.backends import cpu
from graphopt.backends.choice import Tuned
from graphopt.backends.cuda.compiler import check_machine_code, compiling, find_compiler
from graphopt.backends.cuda.driver import load_cuda_runtime
from graphopt.backends.cuda.operators import NATIVE, OPERATORS
from graphopt.backends.cuda.pipeline import register
from graphopt.backends.cuda.target import CudaTarget, resolve_target, runnable
from graphopt.backends.cuda.transfers import copy_to_and_from
from graphopt.backends.linker import link
from graphopt.errors import CompileError
from graphopt.in_place import written_state
from graphopt.program import Program
from graphopt.runtime.manifest import GENERIC

__all__ = ["build", "lower", "resolve_target", "runnable"]

_SHARED_MEMORY = 48 << 10  # bytes of a block that every architecture grants


def lower(programs: Mapping[str, Program], target: CudaTarget, tuned: Tuned | None = None) -> cpu.Module:
    """Every entry as a function of one module; what a CPU's rule wrote, a task a thread, is generic here.

    Raises CompileError naming the node that has no lowering, or state that is written in place.
    """
    if written := sorted(written_state(programs.values())):
        raise CompileError(f"state {written[0]} is written in place, which no kernel for a GPU does; compile for a CPU")
    module = cpu.lower(programs, target, tuned, OPERATORS)
    module.choices.notes[f"{target.name}: not run and not tuned, checked as loops on this machine's CPU"] = None
    kernels = {
        name: kernel if kernel.rule in NATIVE else replace(kernel, rule=GENERIC, configuration={"rule": kernel.rule})
        for name, kernel in module.kernels.items()
    }
    return replace(module, kernels=kernels)


def build(module: tvm.IRModule, target: CudaTarget) -> bytes:
    """The shared library. Raises CompileError where code generation or linking fails, or no compiler is installed."""
    if not target.archs:
        return cpu.build(module, target)
    compile_source = find_compiler(target.archs)
    load_cuda_runtime()
    native = native_target(target)
    try:
        with native, tvm.transform.PassContext(opt_level=3), compiling(compile_source):
            executable = relax.build(
                copy_to_and_from(module), native, relax_pipeline=cpu.finalize(), tir_pipeline=register()
            )
    except CompileError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, NotImplementedError) as e:
        raise CompileError(f"code generation for {target.name} failed: {str(e).strip().splitlines()[-1]}") from e
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "library.so")

        def linker(output: str, objects: list[str], **_: Any) -> None:
            link(list(objects), output, target.machine)

        executable.export_library(path, fcompile=linker, workspace_dir=folder)
        library = Path(path).read_bytes()
    check_machine_code(library, target.archs)
    return library


def native_target(target: CudaTarget) -> tvm.target.Target:
    """The target as TVM has it; the first architecture stands for all, which have what it has."""
    host = cpu.target_fields(target)
    return tvm.target.Target(
        {
            "kind": "cuda",
            "arch": target.archs[0],
            "max_threads_per_block": 1024,
            "thread_warp_size": 32,
            "max_shared_memory_per_block": _SHARED_MEMORY,
            "host": host,
        }
    )
