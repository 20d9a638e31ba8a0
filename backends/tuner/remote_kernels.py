"""What measures on a device that has nothing of graphopt: functions built beside the kernel and sent there with it.

Arrays are memory in words of 32 bits. A whole turn is one call, so that no message goes over the network between what
is timed; of the device it asks for the functions of POSIX alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from graphopt.backends.target import Target
from graphopt.backends.tuner.measuring import Argument, Case
from graphopt.runtime.dtypes import DTYPES

FILL = "graphopt_fill"  # (words int32 [n], source int32 [m]): the source again and again, written by all threads
READ = "graphopt_read"  # (path int8 [p], data int8 [n], at int64, count int64 [1]): bytes read from there, or -1

PAGE = 4096  # bytes
_SCATTER = 1000003  # a prime: places that follow each other in time lie apart
_MONOTONIC = 1  # CLOCK_MONOTONIC of Linux
_READ_ONLY = 0  # O_RDONLY
_BILLION = 1000000000


def timed(number: int) -> str:
    """(words of each array of the case, nanoseconds int64 [n], first int64, int32 0): n calls of the kernel, timed.

    Inputs are written again before each call. The words of a weight hold one or more places for it, `place_words`
    apart; call c takes place (first + c) * `_SCATTER`, modulo their number.
    """
    return f"graphopt_timed_{number}"


def words(argument: Argument) -> int:
    """How many an array takes."""
    return max(1, -(-math.prod(argument.shape) * DTYPES[argument.dtype].carrier.itemsize // 4))


def place_words(argument: Argument) -> int:
    """How many words one place of a weight takes: whole pages."""
    return -(-4 * words(argument) // PAGE) * PAGE // 4


def measuring_kernels(function: str, cases: Sequence[Case], target: Target) -> dict[str, tirx.PrimFunc]:
    """`FILL`, and the functions `timed` of a kernel that has the name `function` in the same library."""
    found = {timed(number): _timed(number, function, case, target) for number, case in enumerate(cases)}
    return {FILL: _fill(target), **found}


def _timed(number: int, function: str, case: Case, target: Target) -> tirx.PrimFunc:
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(timed(number))
            T.func_attr({"global_symbol": timed(number)})
            arrays = {place: _words(f"words{place}") for place, each in enumerate(case) if each.role != "size"}
            taken = T.arg("taken", T.buffer((_variable("count"),), "int64", layout=None))
            first = T.arg("first", _variable("first"))
            nothing = T.arg("nothing", tirx.Var("nothing", "int32"))
            begin = T.alloc_buffer((2,), "int64", scope="local", layout=None)
            end = T.alloc_buffer((2,), "int64", scope="local", layout=None)
            with T.serial(_int64(0), taken.shape[0]) as call:
                for place, each in enumerate(case):
                    if each.role == "input":
                        _write_again(arrays[place], nothing, target)
                passed = [_passed(each, arrays.get(place), first + call) for place, each in enumerate(case)]
                T.evaluate(_clock(begin))
                T.evaluate(tirx.call_cpacked(function, *passed))
                T.evaluate(_clock(end))
                seconds, rest = end[0] - begin[0], end[1] - begin[1]
                T.buffer_store(taken, seconds * _int64(_BILLION) + rest, [call])
        return builder.get()


def _words(name: str) -> Any:
    return T.arg(name, T.buffer((_variable(f"{name}_size"),), "int32", layout=None))


def _write_again(data: Any, nothing: Any, target: Target) -> None:
    """As it is, which the compiler cannot know."""
    _in_shares(data.shape[0], target, lambda at: T.buffer_store(data, data[at] ^ nothing, [at]))


def _fill(target: Target) -> tirx.PrimFunc:
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(FILL)
            T.func_attr({"tirx.noalias": True, "global_symbol": FILL})
            data, source = _words("data"), _words("source")
            many = source.shape[0]
            _in_shares(data.shape[0], target, lambda at: T.buffer_store(data, source[tirx.truncmod(at, many)], [at]))
        return builder.get()


def read_kernel() -> tirx.PrimFunc:
    """The function `READ`."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(READ)
            T.func_attr({"global_symbol": READ})
            path = T.arg("path", T.buffer((_variable("length"),), "int8", layout=None))
            data = T.arg("data", T.buffer((_variable("room"),), "int8", layout=None))
            at = T.arg("at", _variable("at"))
            count = T.arg("count", T.buffer((tirx.const(1, "int64"),), "int64", layout=None))
            start, room = tirx.address_of(data[0]), data.shape[0]
            file = T.bind(tirx.call_extern("int32", "open", tirx.address_of(path[0]), tirx.const(_READ_ONLY, "int32")))
            T.buffer_store(count, tirx.call_extern("int64", "pread", file, start, room, at), [0])
            T.evaluate(tirx.call_extern("int32", "close", file))
        return builder.get()


def _passed(argument: Argument, data: Any, call: Any) -> Any:
    if argument.role == "size":
        return _int64(argument.number)
    start = _int64(0)
    if argument.role == "weight":
        size = _int64(place_words(argument))
        start = tirx.truncmod(call * _int64(_SCATTER), tirx.max(tirx.truncdiv(data.shape[0], size), _int64(1))) * size
    shape = tvm.ir.Call(tvm.ir.Op.get("tirx.tvm_stack_make_shape"), list(map(_int64, argument.shape)), ret_ty="handle")
    zero = tirx.const(0, argument.dtype)
    none = tirx.const(0, "int32")
    return tirx.tvm_stack_make_array(tirx.address_of(data[start]), shape, none, len(argument.shape), zero, none)


def _in_shares(size: Any, target: Target, body: Callable[[Any], None]) -> None:
    """`body(position)` for each of the positions up to `size`, in as many shares as there are threads."""
    each = tirx.truncdiv(size + (target.threads - 1), _int64(target.threads))
    with T.parallel(_int64(0), _int64(target.threads)) as share:
        count = tirx.max(_int64(0), tirx.min(each, size - share * each))
        with T.serial(_int64(0), count) as at:
            body(share * each + at)


def _clock(stamp: Any) -> Any:
    return tirx.call_extern("int32", "clock_gettime", tirx.const(_MONOTONIC, "int32"), tirx.address_of(stamp[0]))


def _variable(name: str) -> Any:
    return tirx.Var(name, "int64")


def _int64(value: int) -> Any:
    return tirx.const(value, "int64")
