"""The CPU family: what its programs are legalised to, which rules write its kernels, and how a library is built."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from graphopt.backends import amx
from graphopt.backends.choice import Choices, Tuned
from graphopt.backends.instructions import definitions
from graphopt.backends.linker import link
from graphopt.backends.lowering import WEIGHT_COUNT, Operators, lower_program, reserve
from graphopt.backends.operators.low_bit import is_looked_up
from graphopt.backends.packed_weights import Weights
from graphopt.backends.target import Target, resolve_target, runnable
from graphopt.backends.tir_pipeline import register
from graphopt.errors import CodeGenerationError, CompileError
from graphopt.in_place import written_state
from graphopt.program import Program
from graphopt.runtime.manifest import KernelInfo

__all__ = ["Module", "build", "finalize", "lower", "resolve_target", "runnable"]

SET_DENORMALS = "graphopt_set_denormals"
_CHECKS = ("vm.builtin.check_tensor_info", "vm.builtin.match_shape")
_FTZ_DAZ = 0x8040  # MXCSR: flush to zero (bit 15) and denormals are zero (bit 6)
_FZ = 1 << 24  # FPCR: flush to zero, operands and results
_SPACE = 64 << 20  # bytes for object files and the library; code is a few MB


@dataclass(frozen=True)
class Module:
    """All entries lowered: `arguments` names each entry's weights in order."""

    module: tvm.IRModule
    weights: Mapping[str, np.ndarray]
    arguments: Mapping[str, tuple[str, ...]]
    kernels: Mapping[str, KernelInfo]
    choices: Choices


def lower(
    programs: Mapping[str, Program],
    target: Target,
    tuned: Tuned | None = None,
    operators: Operators | None = None,
) -> Module:
    """Every entry as a function of one module; `tuned` tells what measured best for a workload.

    Raises CompileError naming the node that has no lowering.
    """
    choices = Choices(tuned) if tuned else Choices()
    functions: dict[Any, Any] = {}
    arguments: dict[str, tuple[str, ...]] = {}
    kernels: dict[str, KernelInfo] = {}
    weights = Weights()
    builder = relax.BlockBuilder()
    written = written_state(programs.values())
    for entry in programs:
        reserve(entry, builder)
    for entry, program in sorted(programs.items(), key=_packs_first):  # the rest read their packing
        lowered = lower_program(program, target, entry, weights, builder, choices, written, operators)
        arguments[entry] = lowered.weights
        for kernel, info in lowered.kernels.items():
            known = kernels.get(kernel, info)
            kernels[kernel] = replace(known, nodes={**known.nodes, **info.nodes})
    functions.update(builder.get().functions)
    return Module(tvm.IRModule(functions), weights.arrays, arguments, kernels, choices)


def _packs_first(item: tuple[str, Program]) -> tuple[bool, int]:
    """Look-ups take weights in one order only, other products in any; fixed sizes are choosier than open ones."""
    _, program = item
    return not any(is_looked_up(node) for node in program.nodes()), len(program.sizes)


@tvm.transform.module_pass(opt_level=0)
def order_shape_functions(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
    """Compute derived sizes in the order of their slots: TVM's own order follows addresses and differs between builds.

    Each store reads only the slots of plain sizes, which no store writes, so any order is right.
    """
    for variable, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and function.attrs.get("tirx.is_host_func"):
            body = tvm_ffi.structural_map(function.body, (tirx.SeqStmt, _ordered))
            module.update_func(variable, function.with_body(body))
    return module


def _ordered(statement: Any) -> Any:
    if not all(isinstance(item, tirx.BufferStore) for item in statement.seq):
        return statement
    return tirx.SeqStmt(sorted(statement.seq, key=lambda store: int(store.indices[0])))


@tvm.transform.module_pass(opt_level=0)
def plan_memory(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
    """One plan for the intermediate values of each function, all of whose memory is allocated at its start.

    TVM's plan allocates memory inside of a branch that what follows it, and the other branch, use as well: it would not
    exist where that one is not taken.
    """
    planned = relax.transform.StaticPlanBlockMemory()(module)
    for variable, function in planned.functions.items():
        if isinstance(function, relax.Function):
            planned.update_func(variable, _allocated_first(function))
    return planned


def _allocated_first(function: relax.Function) -> relax.Function:
    storages: list[relax.Binding] = []

    def without(block: relax.BindingBlock) -> relax.BindingBlock:
        found = [binding for binding in block.bindings if _allocates(binding)]
        storages.extend(found)
        return relax.BindingBlock([item for item in block.bindings if not _allocates(item)]) if found else block

    body = tvm_ffi.structural_map(function.body, (relax.BindingBlock, without))
    if not storages:
        return function
    body = relax.SeqExpr([relax.BindingBlock(storages), *body.blocks], body.body)
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


def _allocates(binding: relax.Binding) -> bool:
    return isinstance(binding.value, relax.Call) and binding.value.op == tvm.ir.Op.get("relax.memory.alloc_storage")


@tvm.transform.module_pass(opt_level=0)
def trust_weights(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
    """Leave out the checks of dtype and shape that every call makes of every weight: loading has made them.

    They cost two calls a weight, more than the kernels of a small network.
    """
    for variable, function in module.functions.items():
        if isinstance(function, relax.Function) and WEIGHT_COUNT in (function.attrs or {}):
            weights = function.params[len(function.params) - int(function.attrs[WEIGHT_COUNT]) :]
            first, *rest = function.body.blocks
            kept = [binding for binding in first.bindings if not _checks(binding, weights)]
            body = relax.SeqExpr([relax.BindingBlock(kept), *rest], function.body.body)
            module.update_func(variable, relax.Function(function.params, body, function.ret_ty, False, function.attrs))
    return module


def _checks(binding: relax.Binding, weights: Sequence[relax.Var]) -> bool:
    call = binding.value
    if not isinstance(call, relax.Call) or not isinstance(call.op, relax.ExternFunc):
        return False
    return call.op.global_symbol in _CHECKS and any(call.args[0].same_as(weight) for weight in weights)


def finalize() -> tvm.transform.Pass:
    """From kernel calls to VM code: calls by destination, a static memory plan, shape arithmetic as functions."""
    passes = relax.transform
    return tvm.transform.Sequential(
        [
            passes.Normalize(),
            passes.RewriteDataflowReshape(),
            passes.ToNonDataflow(),
            passes.RemovePurityChecking(),
            passes.CallTIRRewrite(),
            plan_memory,
            passes.LowerAllocTensor(),
            passes.KillAfterLastUse(),
            passes.LowerRuntimeBuiltin(),
            passes.ComputePrimValue(),
            passes.VMShapeLower(),
            trust_weights,
            order_shape_functions,
            passes.AttachGlobalSymbol(),
        ]
    )


def generate(module: tvm.IRModule, target: Target) -> relax.VMExecutable:
    """Code for the target, not linked yet. Raises CodeGenerationError."""
    native = native_target(target)
    own = {
        relax.GlobalVar(name): function for name, function in own_functions(target, module.functions.values()).items()
    }
    module = tvm.IRModule({**module.functions, **own})
    try:
        with native, tvm.transform.PassContext(opt_level=3):
            return relax.build(module, native, relax_pipeline=finalize(), tir_pipeline=register())
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, NotImplementedError) as e:
        raise CodeGenerationError(f"code generation for {target.name} failed: {str(e).strip().splitlines()[-1]}") from e


def build(module: tvm.IRModule, target: Target) -> bytes:
    """The shared library. Raises CompileError where code generation, its kind CodeGenerationError, or linking fails."""
    executable = generate(module, target)
    with tempfile.TemporaryDirectory() as folder:
        _check_space(folder)
        path = str(Path(folder) / "library.so")

        def linker(output: str, objects: list[str], **_: Any) -> None:
            link(list(objects), output, target.machine)

        executable.export_library(path, fcompile=linker, workspace_dir=folder)
        return Path(path).read_bytes()


def _check_space(folder: str) -> None:
    """LLVM ends the process when it cannot write an object file, so a full disk is found before."""
    free = shutil.disk_usage(folder).free
    if free < _SPACE:
        raise CompileError(
            f"the temporary folder has {free >> 20} MB free and building needs {_SPACE >> 20} MB; free some space or "
            "set TMPDIR to another folder"
        )


def native_target(target: Target) -> tvm.target.Target:
    """The target as TVM has it."""
    return tvm.target.Target(target_fields(target))


def target_fields(target: Target) -> dict[str, Any]:
    """As JSON. LLVM splits vectors of x86-64-v4 into halves unless told otherwise."""
    wide = target.lanes == 16 and target.machine == "x86_64"
    return {
        "kind": "llvm",
        "mtriple": f"{target.machine}-unknown-linux-gnu",
        "mcpu": target.architecture,
        "mattr": ["-prefer-256-bit"] * wide + [f"+{extension}" for extension in target.extensions],
        "num-cores": target.threads,
    }


def own_functions(target: Target, kernels: Iterable[Any]) -> dict[str, tirx.PrimFunc]:
    """What a library of these kernels has besides them; brings the instructions that TVM has no words for."""
    own = {SET_DENORMALS: set_denormals(target)}
    if any(map(amx.uses_tiles, kernels)):
        own[amx.CHECK_MACHINE] = amx.check_machine(target)
    return own


def set_denormals(target: Target) -> tirx.PrimFunc:
    """graphopt_set_denormals(flush, threads): so many of the caller's pool treat denormals as zero; flush 0 undoes it.

    The caller is the first of them; alone it waits for no other.

    Denormal operands cost an x86 core a microcode assist each: a matrix product over them runs 200 times slower. Arm
    cores take them in their stride; there it is done so that results are the same.
    """
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(SET_DENORMALS)
            T.func_attr({"tirx.noalias": True, "global_symbol": SET_DENORMALS})
            flush = T.arg("flush", tirx.Var("flush", "int32"))
            threads = T.arg("threads", tirx.Var("threads", "int32"))
            with _importing(definitions(target)), T.If(threads > 1):
                with T.Then(), T.parallel(tirx.const(0, "int32"), threads):  # one task for each thread
                    _set_denormals_here(target, flush)
                with T.Else():
                    _set_denormals_here(target, flush)
        return builder.get()


def _set_denormals_here(target: Target, flush: Any) -> None:
    if target.machine == "aarch64":
        word = T.bind(tirx.call_llvm_intrin("int64", "llvm.aarch64.get.fpcr"))
        T.evaluate(tirx.call_llvm_intrin("void", "llvm.aarch64.set.fpcr", _flushed(word, _FZ, flush)))
    else:
        word = T.alloc_buffer((1,), "int32", scope="local", layout=None)
        address = tirx.address_of(word[0])
        T.evaluate(tirx.call_llvm_intrin("void", "llvm.x86.sse.stmxcsr", address))
        T.buffer_store(word, _flushed(word[0], _FTZ_DAZ, flush), [0])
        T.evaluate(tirx.call_llvm_intrin("void", "llvm.x86.sse.ldmxcsr", address))


def _importing(code: str) -> AbstractContextManager[Any]:
    """Functions in LLVM's language for all kernels of the module; a statement has to carry them."""
    return T.attr(tirx.const(0, "int32"), "pragma_import_llvm", tvm.ir.StringImm(code)) if code else nullcontext()


def _flushed(word: Any, bits: int, flush: Any) -> Any:
    """The control register with these bits set where `flush`, else cleared."""
    dtype = str(word.ty.dtype)
    return tirx.Select(flush > 0, word | tirx.const(bits, dtype), word & tirx.const(~bits, dtype))
