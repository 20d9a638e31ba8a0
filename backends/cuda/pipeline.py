"""TVM's lowering of kernels for CUDA, with `launch` in front."""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from graphopt.backends.code_instructions import round_whole
from graphopt.backends.cuda.threads import launch
from graphopt.backends.tir_pipeline import flatten

NAME = "graphopt-cuda"


@tirx.transform.prim_func_pass(opt_level=0)
def compare_floats(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """The larger and smaller of two floats as a CPU's code has them: CUDA's own functions would lose NaN."""

    def named(name: str) -> Any:
        def called(item: Any) -> Any:
            dtype = str(item.ty.dtype)
            return tirx.call_pure_extern(dtype, name, item.a, item.b) if "float" in dtype else item

        return called

    pairs = (tirx.Max, named("graphopt_max")), (tirx.Min, named("graphopt_min"))
    return function.with_body(tvm_ffi.structural_map(function.body, list(pairs)))


def _lower() -> tvm.transform.Pass:
    tir, blocks = tirx.transform, s_tir.transform
    return tvm.transform.Sequential(
        [
            launch,
            blocks.CanonicalizeLoop(),
            blocks.LowerOpaqueBlock(),
            blocks.StmtSimplify(),
            flatten,
            tir.NarrowDataType(32),
            tir.VectorizeLoop(),
            round_whole,
            tir.StorageRewrite(),
            blocks.HoistIfThenElse(),
            tir.UnrollLoop(),
            blocks.RenormalizeSplitPattern(),
            tir.StmtSimplify(),
            tir.RemoveNoOp(),
            blocks.RewriteUnsafeSelect(),
            tir.CommonSubexprElim(),
            compare_floats,
            tir.FP8ComputeLegalize(),
            tir.VerifyMemory(),
            tir.AnnotateEntryFunc(),
            tir.SplitHostDevice(),
            tir.MakePackedAPI(),
            tir.FP8StorageLegalize(),
            tir.BF16StorageLegalize(),
        ]
    )


def _pipeline() -> tuple[Any, Any, Any]:
    tir = tirx.transform
    host = tvm.transform.Sequential([tir.LowerTVMBuiltin(), tir.LowerIntrin()])
    device = tvm.transform.Sequential([tir.LowerWarpMemory(), tir.StmtSimplify(), tir.LowerIntrin()])
    return _lower(), lambda: host, lambda: device


def register() -> str:
    """Make the pipeline known to TVM; returns the name to build with."""
    tirx.compilation_pipeline.register_tir_pipeline(NAME, _pipeline)
    return NAME
