"""TVM's lowering of kernels for CUDA, with `launch` in front."""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from graphopt.backends.cuda.threads import launch
from graphopt.backends.tir_pipeline import lower_loops

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


def _pipeline() -> tuple[Any, Any, Any]:
    tir = tirx.transform
    host = tvm.transform.Sequential([tir.LowerTVMBuiltin(), tir.LowerIntrin()])
    device = tvm.transform.Sequential([tir.LowerWarpMemory(), tir.StmtSimplify(), tir.LowerIntrin()])
    return lower_loops(first=(launch,), last=(compare_floats,)), lambda: host, lambda: device


def register() -> str:
    """Make the pipeline known to TVM; returns the name to build with."""
    tirx.compilation_pipeline.register_tir_pipeline(NAME, _pipeline)
    return NAME
