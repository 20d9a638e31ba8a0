"""TVM's lowering of kernels, less what costs most and changes nothing, and with passes of our own in its place.

`LowerTVMBuiltin` turns every buffer of 1024 bytes and more into a call for workspace, scope "local" included. An 8 x 48
accumulator tile would then be stored in every iteration that holds a prefetch or a branch. Its own opt-out is an
annotation that earlier passes drop, so it is set right before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from graphopt.backends.code_instructions import round_whole
from graphopt.backends.instructions import round_natively
from graphopt.backends.table_instructions import look_up_natively

NAME = "graphopt-cpu"


@tirx.transform.prim_func_pass(opt_level=0)
def flatten(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """Every buffer in one dimension, truth values as bytes; buffers are compact and start at their data."""
    flat = _Flat()
    callbacks = [
        (tirx.AllocBuffer, flat.allocation),
        (tirx.DeclBuffer, flat.declaration),
        (tvm.ir.TensorLoad, flat.load),
        (tirx.BufferStore, flat.store),
    ]
    return function.with_body(flat.declared(tvm_ffi.structural_map(function.body, callbacks)))


class _Flat:
    """The statements of one function over flat buffers, each made once."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}
        self._inside: set[Any] = set()  # those that the body allocates or declares

    def buffer(self, buffer: Any) -> Any:
        if len(buffer.shape) == 1 and not _is_bool(buffer):
            return buffer
        if buffer not in self._made:
            size: Any = tirx.const(1, "int64")
            for extent in buffer.shape:
                size = size * extent
            dtype = "int8" if _is_bool(buffer) else buffer.dtype
            self._made[buffer] = tirx.decl_buffer(
                [size], dtype, buffer.name, data=buffer.data, scope=buffer.scope(), layout=None
            )
        return self._made[buffer]

    def declared(self, body: Any) -> Any:
        """The body after declarations of the arguments that it reads and writes by more indices than one."""
        missing = [(buffer, flat) for buffer, flat in self._made.items() if buffer not in self._inside]
        if not missing:
            return body
        return tirx.SeqStmt([*(tirx.DeclBuffer(flat, data=buffer.data) for buffer, flat in missing), body])

    def allocation(self, statement: Any) -> Any:
        self._inside.add(statement.buffer)
        flat = self.buffer(statement.buffer)
        return statement if flat is statement.buffer else tirx.AllocBuffer(flat, annotations=statement.annotations)

    def declaration(self, statement: Any) -> Any:
        self._inside.add(statement.buffer)
        flat = self.buffer(statement.buffer)
        return statement if flat is statement.buffer else tirx.DeclBuffer(flat, data=statement.data)

    def load(self, load: Any) -> Any:
        buffer = load.source
        if (flat := self.buffer(buffer)) is buffer:
            return load
        value = tirx.BufferLoad(flat, [_position(buffer, load.indices)])
        return value.astype("bool") if _is_bool(buffer) else value

    def store(self, store: Any) -> Any:
        buffer = store.buffer
        if (flat := self.buffer(buffer)) is buffer:
            return store
        value = store.value.astype("int8") if _is_bool(buffer) else store.value
        return tirx.BufferStore(flat, value, [_position(buffer, store.indices)])


def _is_bool(buffer: Any) -> bool:
    return str(buffer.dtype) == "bool"


def _position(buffer: Any, indices: Any) -> Any:
    """Row-major, in elements."""
    if not len(indices):
        return tirx.const(0, "int64")
    position = indices[0]
    for extent, index in zip(list(buffer.shape)[1:], list(indices)[1:], strict=True):
        position = position * extent + index
    return position


@tirx.transform.prim_func_pass(opt_level=0)
def keep_local_on_stack(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    def keep(statement: Any) -> Any:
        if statement.buffer.scope() != "local":
            return statement
        annotations = {**statement.annotations, "disable_lower_builtin": tirx.const(1, "bool")}
        return tirx.AllocBuffer(statement.buffer, annotations=annotations)

    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.AllocBuffer, keep)))


def lower_loops(
    first: Sequence[Any] = (), of_vectors: Sequence[Any] = (), last: Sequence[Any] = ()
) -> tvm.transform.Pass:
    """Loops over buffers to functions that code is generated from: vectors, 32-bit indices where they suffice, packed
    arguments. A family adds passes: before all others, once loops are vectors, and once expressions are what they stay.
    """
    tir, blocks = tirx.transform, s_tir.transform
    return tvm.transform.Sequential(
        [
            *first,
            blocks.CanonicalizeLoop(),
            blocks.LowerOpaqueBlock(),  # loops of one iteration become their bodies
            blocks.StmtSimplify(),
            flatten,
            tir.NarrowDataType(32),
            tir.VectorizeLoop(),
            *of_vectors,
            round_whole,
            tir.StorageRewrite(),
            blocks.HoistIfThenElse(),
            tir.UnrollLoop(),
            blocks.RenormalizeSplitPattern(),
            tir.StmtSimplify(),
            tir.RemoveNoOp(),
            blocks.RewriteUnsafeSelect(),
            tir.CommonSubexprElim(),
            *last,
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
    host = [keep_local_on_stack, tirx.transform.LowerTVMBuiltin(), tirx.transform.LowerIntrin()]
    lowered = lower_loops(of_vectors=(round_natively, look_up_natively))
    return lowered, lambda: tvm.transform.Sequential(host), lambda: tvm.transform.Sequential([])


def register() -> str:
    """Make the pipeline known to TVM; returns the name to build with."""
    tirx.compilation_pipeline.register_tir_pipeline(NAME, _pipeline)
    return NAME
