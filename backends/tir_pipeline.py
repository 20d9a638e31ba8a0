"""TVM's lowering of kernels with one pass of our own: register tiles stay on the stack.

`LowerTVMBuiltin` turns every buffer of 1024 bytes and more into a call for workspace, scope "local" included. An 8 x 48
accumulator tile would then be stored in every iteration that holds a prefetch or a branch. Its own opt-out is an
annotation that earlier passes drop, so it is set right before.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

NAME = "graphopt-cpu"


@tirx.transform.prim_func_pass(opt_level=0)
def keep_local_on_stack(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    def keep(statement: Any) -> Any:
        if statement.buffer.scope() != "local":
            return statement
        annotations = {**statement.annotations, "disable_lower_builtin": tirx.const(1, "bool")}
        return tirx.AllocBuffer(statement.buffer, annotations=annotations)

    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.AllocBuffer, keep)))


def _pipeline() -> tuple[Any, Any, Any]:
    lower, _, device = tirx.get_tir_pipeline("s_tir")
    host = [keep_local_on_stack, tirx.transform.LowerTVMBuiltin(), tirx.transform.LowerIntrin()]
    return lower, lambda: tvm.transform.Sequential(host), device


def register() -> str:
    """Make the pipeline known to TVM; returns the name to build with."""
    tirx.compilation_pipeline.register_tir_pipeline(NAME, _pipeline)
    return NAME
