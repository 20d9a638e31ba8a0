"""Libraries of single kernels, built in child processes: what the compiler cannot take costs one candidate."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from graphopt.backends.cpu import SET_DENORMALS, own_functions, set_denormals, target_fields
from graphopt.backends.target import Target
from graphopt.backends.tuner.child import Child, ChildError
from graphopt.backends.tuner.local import half_of_memory
from graphopt.backends.tuner.measuring import REFRESH

SECONDS = 30.0  # that one kernel may take
_MOST_CHILDREN = 8


class Builder:
    """Builds kernels for `target`, several at a time."""

    def __init__(self, target: Target, seconds: float = SECONDS) -> None:
        count = min(_MOST_CHILDREN, len(os.sched_getaffinity(0)))
        self._request = {"target": target_fields(target), "machine": target.machine}
        self._seconds = seconds
        self._target = target
        self._children = [Child("graphopt.backends.tuner.compiling:serve", half_of_memory()) for _ in range(count)]
        self._free: SimpleQueue[Child] = SimpleQueue()
        for child in self._children:
            self._free.put(child)
        self._threads = ThreadPoolExecutor(count)

    def build(self, kernels: Sequence[Mapping[str, tirx.PrimFunc]]) -> list[bytes | str]:
        """A library of each, or why there is none."""
        texts = [_module_text({**own_functions(self._target, each.values()), **each}) for each in kernels]
        return list(self._threads.map(self._build, texts))

    def _build(self, text: bytes) -> bytes | str:
        child = self._free.get()
        try:
            return bytes(child.ask(self._request, [text], self._seconds)[1][0])
        except ChildError as e:
            return str(e)
        finally:
            self._free.put(child)

    def close(self) -> None:
        """End the children."""
        for child in self._children:
            child.kill()
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.close()


def _module_text(kernels: Mapping[str, tirx.PrimFunc]) -> bytes:
    functions = {name: function.with_attr("global_symbol", name) for name, function in kernels.items()}
    return str(tvm.ir.save_json(tvm.IRModule(functions))).encode()


def support_kernels(target: Target) -> dict[str, tirx.PrimFunc]:
    """What a measurer needs besides the kernels it measures."""
    return {SET_DENORMALS: set_denormals(target), REFRESH: _refresh(target)}


def _refresh(target: Target) -> tirx.PrimFunc:
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(REFRESH)
            T.func_attr({"tirx.noalias": True, "global_symbol": REFRESH})
            size = tirx.Var("size", "int64")
            data = T.arg("data", T.buffer((size,), "int32", layout=None))
            nothing = T.arg("nothing", tirx.Var("nothing", "int32"))
            each = tirx.truncdiv(size + (target.threads - 1), _int64(target.threads))
            with T.parallel(_int64(0), _int64(target.threads)) as share:
                count = tirx.max(_int64(0), tirx.min(each, size - share * each))
                with T.serial(_int64(0), count) as at:
                    T.buffer_store(data, data[share * each + at] ^ nothing, [share * each + at])
        return builder.get()


def _int64(value: int) -> Any:
    return tirx.const(value, "int64")
