"""From kernels as loops to kernels as blocks of threads.

A rule writes one parallel loop of independent tasks, in the form that a CPU runs too. Two kinds become two launches:

- Plain tasks: each becomes one thread.
- A task with loops marked by `threads` becomes one block. A marked loop is a phase, in which each thread makes one
  iteration; all threads have finished a phase before the next begins. What stands around phases is computed by every
  thread. Memory that a task allocates outside of phases has a first axis: 1 long for what the threads share, as long
  as there are threads for what each keeps in registers.

So a phase may read what others wrote in phases before, never in its own; run as loops, one iteration after the other,
a kernel gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx.script.builder import ir as T

PHASE = "graphopt.threads"
_THREADS = 128  # of a block of plain tasks
_FEW_THREADS, _FEW_TASKS = 32, 1 << 13  # so that fewer tasks still reach every multiprocessor


def threads(count: int) -> AbstractContextManager[Any]:
    """A phase of a task's block: each of its `count` threads makes one iteration."""
    return T.serial(tirx.const(0, "int64"), tirx.const(count, "int64"), annotations={PHASE: count})


@tirx.transform.prim_func_pass(opt_level=0)
def launch(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    """Every kernel as launches; functions for the host stay as they are."""
    if function.attrs["target"].kind.name != "cuda":
        return function
    body = tvm_ffi.structural_map(function.body, [(tirx.For, _scalar), (tirx.Evaluate, _without_prefetch)])
    if not _has_tasks(body):
        return function.with_body(_launched(tirx.const(1, "int64"), 1, lambda block, thread: body))
    return function.with_body(_placed(body, {}))


def _scalar(loop: Any) -> Any:
    """Lanes one after the other: the compiler unrolls them."""
    if loop.kind != tirx.ForKind.VECTORIZED:
        return loop
    return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)


def _without_prefetch(statement: Any) -> Any:
    """A warp hides what it waits for behind others."""
    called = isinstance(statement.value, tvm.ir.Call) and getattr(statement.value.op, "name", "") == "tirx.prefetch"
    return tirx.Evaluate(tirx.const(0, "int32")) if called else statement


def _has_tasks(body: Any) -> bool:
    return _any(body, lambda loop: loop.kind == tirx.ForKind.PARALLEL)


def _any(body: Any, wanted: Callable[[Any], bool]) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(body, (tirx.For, lambda loop: found.append(loop) if wanted(loop) else None))
    return bool(found)


def _placed(statement: Any, known: dict[Any, Any]) -> Any:
    """The statement on the host, its parallel loops as launches; `known` are the host's variables.

    TVM moves allocations to the start of a function, where none of these is bound, so that sizes are written without.
    """
    if isinstance(statement, tirx.For) and statement.kind == tirx.ForKind.PARALLEL:
        loop = tirx.For(
            statement.loop_var, statement.min, _without(statement.extent, known), statement.kind, statement.body
        )
        return _blocks(loop) if _any(loop.body, _is_phase) else _tasks(loop)
    if isinstance(statement, tirx.Bind):
        known[statement.var] = _without(statement.value, known)
    if isinstance(statement, (tirx.DeclBuffer, tirx.AllocBuffer, tirx.Bind)):
        return statement
    if isinstance(statement, tirx.SeqStmt):
        return tirx.SeqStmt([_placed(each, known) for each in statement.seq])
    if isinstance(statement, tirx.IfThenElse):
        other = statement.else_case
        then, other = _placed(statement.then_case, known), other and _placed(other, known)
        return tirx.IfThenElse(statement.condition, then, other)
    if isinstance(statement, tirx.For) and _has_tasks(statement.body):
        return tirx.For(
            statement.loop_var, statement.min, statement.extent, statement.kind, _placed(statement.body, known)
        )
    if isinstance(statement, tirx.Evaluate):
        return statement
    return _launched(tirx.const(1, "int64"), 1, lambda block, thread: statement)


def _without(size: Any, known: dict[Any, Any]) -> Any:
    return (
        tvm_ffi.structural_map(size, [(tvm.ir.Var, lambda variable: known.get(variable, variable))]) if known else size
    )


def _launched(blocks: Any, count: int, body: Callable[[Any, Any], Any]) -> Any:
    block, thread = tirx.Var("block", "int32"), tirx.Var("thread", "int32")
    inner = _extent(thread, "threadIdx.x", tirx.const(count, "int32"), body(block, thread))
    return _extent(block, "blockIdx.x", blocks.astype("int32"), inner)


def _extent(variable: Any, tag: str, extent: Any, body: Any) -> Any:
    axis = tirx.IterVar(tvm.ir.Range(0, extent), variable, tirx.IterVar.ThreadIndex, tag)
    return tirx.AttrStmt(axis, "thread_extent", extent, body)


# Plain tasks ----------------------------------------------------------------------------------------------------------
def _tasks(loop: Any) -> Any:
    extent = loop.extent
    few = isinstance(extent, tirx.IntImm) and int(extent) < _FEW_TASKS
    count = _FEW_THREADS if few else _THREADS
    work, allocated = _own_memory(loop)

    def body(block: Any, thread: Any) -> Any:
        task = loop.min + block.astype("int64") * count + thread.astype("int64")
        return tirx.IfThenElse(task < loop.min + extent, tirx.SeqStmt([tirx.Bind(loop.loop_var, task), work]), None)

    launched = _launched(tirx.truncdiv(extent + (count - 1), tirx.const(count, "int64")), count, body)
    return tirx.SeqStmt([*allocated, launched]) if allocated else launched


def _own_memory(loop: Any) -> tuple[Any, list[Any]]:
    """The body of a loop of tasks, and what is allocated before: each task's part of working memory.

    Tasks are along the last axis, so that threads beside each other touch memory beside each other.
    """
    memory, allocated = _Memory(), []

    def kept(statement: Any) -> Any:
        buffer = statement.buffer
        if buffer.scope() != "global":
            return statement
        made = memory.moved(buffer, [*buffer.shape, loop.extent], "global", after=loop.loop_var - loop.min)
        allocated.append(tirx.AllocBuffer(made, annotations=statement.annotations))
        return tirx.Evaluate(tirx.const(0, "int32"))

    return memory.used(tvm_ffi.structural_map(loop.body, (tirx.AllocBuffer, kept))), allocated


class _Memory:
    """Buffers of a kernel that lie somewhere else, lose their first axis or get another at the end."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Any, Callable[[list[Any]], list[Any]]]] = {}

    def moved(self, buffer: Any, shape: Any, scope: str, after: Any = None) -> Any:
        """The buffer in its place: with `after`, that is the index along a new last axis, else the first one goes."""
        made = tirx.decl_buffer(list(shape), buffer.dtype, buffer.name, scope=scope, layout=None)
        self._made[buffer] = made, (lambda at: at[1:]) if after is None else (lambda at: [*at, after])
        return made

    def used(self, body: Any) -> Any:
        """The body with every access to what was moved."""

        def load(item: Any) -> Any:
            if item.source not in self._made:
                return item
            made, place = self._made[item.source]
            return tirx.BufferLoad(made, place(list(item.indices)))

        def store(item: Any) -> Any:
            if item.buffer not in self._made:
                return item
            made, place = self._made[item.buffer]
            return tirx.BufferStore(made, item.value, place(list(item.indices)))

        return tvm_ffi.structural_map(body, [(tvm.ir.TensorLoad, load), (tirx.BufferStore, store)])


# Blocks ---------------------------------------------------------------------------------------------------------------
def _is_phase(loop: Any) -> bool:
    return PHASE in loop.annotations


def _blocks(loop: Any) -> Any:
    counts: list[int] = []

    def count_of(found: Any) -> None:
        if _is_phase(found):
            counts.append(int(found.annotations[PHASE]))

    tvm_ffi.structural_walk(loop.body, (tirx.For, count_of))
    (count,) = set(counts)

    def body(block: Any, thread: Any) -> Any:
        memory, inside = _Memory(), _inside_phases(loop.body)

        def phase(found: Any) -> Any:
            if not _is_phase(found):
                return found
            barrier = tirx.Evaluate(tirx.call_intrin("int32", "tirx.tvm_storage_sync", tvm.ir.StringImm("shared")))
            return tirx.SeqStmt([tirx.Bind(found.loop_var, thread.astype("int64")), found.body, barrier])

        def placed(statement: Any) -> Any:
            buffer = statement.buffer
            if buffer in inside:
                return statement
            first, *rest = buffer.shape
            scope = "shared" if int(first) == 1 else "local"
            assert int(first) in (1, count), f"{buffer.name} is neither shared by the threads nor one for each"
            return tirx.AllocBuffer(memory.moved(buffer, rest, scope), annotations=statement.annotations)

        made = tvm_ffi.structural_map(loop.body, (tirx.AllocBuffer, placed))
        made = tvm_ffi.structural_map(memory.used(made), (tirx.For, phase))
        return tirx.SeqStmt([tirx.Bind(loop.loop_var, loop.min + block.astype("int64")), made])

    return _launched(loop.extent, count, body)


def _inside_phases(body: Any) -> set[Any]:
    """Buffers that are allocated in a phase: those of one thread already."""
    found: set[Any] = set()

    def note(loop: Any) -> None:
        if _is_phase(loop):
            tvm_ffi.structural_walk(loop.body, (tirx.AllocBuffer, lambda statement: found.add(statement.buffer)))

    tvm_ffi.structural_walk(body, (tirx.For, note))
    return found
