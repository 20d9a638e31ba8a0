"""Kernels that do nothing but work: multiply-adds in registers, and reading memory from one end to the other.

How fast they run is the most that any kernel can ask of this machine: the roofs of a roofline (Williams, Waterman and
Patterson, 2009).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from graphopt.backends import amx
from graphopt.backends.cpu import build
from graphopt.backends.instructions import multiply_pairs
from graphopt.backends.target import Target, resolve_target

MULTIPLY_ADD, READ = "graphopt_multiply_add", "graphopt_read"
MULTIPLY_PAIRS = "graphopt_multiply_bfloat16"  # where the target has an instruction for it
MULTIPLY_TILES = "graphopt_multiply_tiles"  # where it has tiles
TILE_OPERATIONS = len(amx.PRODUCTS) * 2 * amx.ROWS * amx.BRAIN.depth * amx.COLUMNS  # of one round of one share
_READS = 8  # vectors of partial sums: independent, so that additions wait for memory only


def build_roofs(threads: int) -> bytes:
    """A library for this CPU with functions over `threads` shares; `result` is float32 [threads, lanes].

    graphopt_multiply_add(rounds, result): each share does `rounds` times `operations(target)` operations.
    graphopt_multiply_bfloat16: the same with pairs of bfloat16, so twice the operations.
    graphopt_multiply_tiles: `TILE_OPERATIONS` on tiles of bfloat16.
    graphopt_read(rounds, data, result): reads `rounds` times data, float32 [n], n a multiple of 8 lanes times threads.
    Raises CompileError where building fails.
    """
    target = target_here(threads)
    functions = {relax.GlobalVar(MULTIPLY_ADD): _multiply_add(target), relax.GlobalVar(READ): _read(target)}
    if target.pairs:
        functions[relax.GlobalVar(MULTIPLY_PAIRS)] = _multiply_pairs(target)
    if target.amx:
        functions[relax.GlobalVar(MULTIPLY_TILES)] = _multiply_tiles(target)
    return build(tvm.IRModule(functions), target)


def target_here(threads: int) -> Target:
    """The best this CPU has."""
    return resolve_target("cpu", threads)


def operations(target: Target) -> int:
    """Of one round of one share: three in four registers get a multiply-add in every lane."""
    return 2 * _accumulators(target) * target.lanes


def _accumulators(target: Target) -> int:
    return 3 * target.registers // 4


def _multiply_add(target: Target) -> tirx.PrimFunc:
    with IRBuilder() as builder:
        with _function(MULTIPLY_ADD):
            rounds = T.arg("rounds", tirx.Var("rounds", "int64"))
            result = T.arg("result", T.buffer((target.threads, target.lanes), "float32", layout=None))
            with T.parallel(_int64(0), _int64(target.threads)) as share:
                totals = _totals(_accumulators(target), target)
                with T.serial(_int64(0), rounds):
                    for number in range(_accumulators(target)):
                        with T.vectorized(_int64(0), _int64(target.lanes)) as lane:
                            value = totals[number, lane] * _float32(0.999) + _float32(1e-4)
                            T.buffer_store(totals, value, [number, lane])
                _store_sum(totals, _accumulators(target), result, share, target)
        return builder.get()


def _multiply_pairs(target: Target) -> tirx.PrimFunc:
    with IRBuilder() as builder:
        with _function(MULTIPLY_PAIRS):
            rounds = T.arg("rounds", tirx.Var("rounds", "int64"))
            result = T.arg("result", T.buffer((target.threads, target.lanes), "float32", layout=None))
            whole = tirx.Ramp(_int64(0), _int64(1), target.lanes)
            with T.parallel(_int64(0), _int64(target.threads)) as share:
                totals = _totals(_accumulators(target), target)
                with T.serial(_int64(0), rounds):
                    for number in range(_accumulators(target)):
                        pairs = tirx.reinterpret(f"uint32x{target.lanes}", totals[number, whole])
                        value = multiply_pairs(totals[number, whole], pairs, pairs)
                        T.buffer_store(totals, value, [number, whole])
                _store_sum(totals, _accumulators(target), result, share, target)
        return builder.get()


def _multiply_tiles(target: Target) -> tirx.PrimFunc:
    """Of zeros; each share stores a row of a tile, whose multiplications no compiler leaves out."""
    with IRBuilder() as builder:
        with _function(MULTIPLY_TILES):
            rounds = T.arg("rounds", tirx.Var("rounds", "int64"))
            result = T.arg("result", T.buffer((target.threads, target.lanes), "float32", layout=None))
            amx.require()
            tiles = sorted({tile for product in amx.PRODUCTS for tile in product})
            with T.parallel(_int64(0), _int64(target.threads)) as share:
                sizes = T.alloc_buffer((amx.CONFIGURATION_BYTES,), "uint8", scope="local", layout=None)
                sums = T.alloc_buffer((amx.ROWS, amx.COLUMNS), "float32", scope="local", layout=None)
                amx.write_configuration(sizes, dict.fromkeys(tiles, amx.ROWS))
                amx.configure(tirx.address_of(sizes[0]))
                with T.serial(_int64(0), rounds):
                    for product in amx.PRODUCTS:
                        amx.multiply(amx.BRAIN, *product)
                amx.store(amx.PRODUCTS[0][0], tirx.address_of(sums[0, 0]), _int64(amx.ROW_BYTES))
                amx.release()
                with T.vectorized(_int64(0), _int64(target.lanes)) as lane:
                    T.buffer_store(result, sums[0, lane], [share, lane])
        return builder.get().with_attr(amx.USES_TILES, True)


def _read(target: Target) -> tirx.PrimFunc:
    lanes, step = target.lanes, _READS * target.lanes
    with IRBuilder() as builder:
        with _function(READ):
            rounds = T.arg("rounds", tirx.Var("rounds", "int64"))
            size = tirx.Var("size", "int64")
            data = T.arg("data", T.buffer((size,), "float32", layout=None))
            result = T.arg("result", T.buffer((target.threads, lanes), "float32", layout=None))
            steps = tirx.truncdiv(size, _int64(step * target.threads))
            with T.parallel(_int64(0), _int64(target.threads)) as share:
                totals = _totals(_READS, target)
                with T.serial(_int64(0), rounds), T.serial(_int64(0), steps) as at:
                    start = (share * steps + at) * step
                    for number in range(_READS):
                        with T.vectorized(_int64(0), _int64(lanes)) as lane:
                            value = totals[number, lane] + data[start + number * lanes + lane]
                            T.buffer_store(totals, value, [number, lane])
                _store_sum(totals, _READS, result, share, target)
        return builder.get()


@contextmanager
def _function(name: str) -> Iterator[None]:
    with T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        yield


def _totals(count: int, target: Target) -> Any:
    totals = T.alloc_buffer((count, target.lanes), "float32", scope="local", layout=None)
    for number in range(count):
        with T.vectorized(_int64(0), _int64(target.lanes)) as lane:
            T.buffer_store(totals, _float32(number), [number, lane])
    return totals


def _store_sum(totals: Any, count: int, result: Any, share: Any, target: Target) -> None:
    """Every total is part of the result, or the compiler would leave it out."""
    for number in range(1, count):
        with T.vectorized(_int64(0), _int64(target.lanes)) as lane:
            T.buffer_store(totals, totals[0, lane] + totals[number, lane], [0, lane])
    with T.vectorized(_int64(0), _int64(target.lanes)) as lane:
        T.buffer_store(result, totals[0, lane], [share, lane])


def _int64(value: int) -> Any:
    return tirx.const(value, "int64")


def _float32(value: float) -> Any:
    return tirx.const(value, "float32")
