"""What is sent to a device, run here: it calls the kernel as often as asked, at other places, and reads files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from graphopt.backends.target import resolve_target
from graphopt.backends.tuner.building import Builder
from graphopt.backends.tuner.measuring import Argument, Case
from graphopt.backends.tuner.remote_kernels import FILL, READ, measuring_kernels, place_words, read_kernel, timed
from graphopt.runtime.library import open_kernels
from graphopt.runtime.tensors import aligned_copy, to_device

TARGET = resolve_target("cpu", 1)
ROWS, COLUMNS = 3, 1500
DTYPES = ("float32", "bfloat16", "float16", "int8", "bool")


def add_or_copy(dtype: str) -> tirx.PrimFunc:
    """x + weight of float32, the weight of others, in every row; the number of rows is an argument."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(dtype)
            T.func_attr({"global_symbol": dtype})
            rows = tirx.Var("rows", "int64")
            x = T.arg("x", T.buffer((rows, COLUMNS), "float32", layout=None))
            weight = T.arg("weight", T.buffer((COLUMNS,), dtype, layout=None))
            count = T.arg("count", tirx.Var("count", "int64"))
            out = T.arg("out", T.buffer((rows, COLUMNS), dtype, layout=None))
            zero, columns = (tirx.const(size, "int64") for size in (0, COLUMNS))
            with T.serial(zero, count) as i, T.serial(zero, columns) as j:
                T.buffer_store(out, x[i, j] + weight[j] if dtype == "float32" else weight[j], [i, j])
        return builder.get()


def case_of(dtype: str) -> Case:
    shape = (ROWS, COLUMNS)
    size, weight = Argument("size", "int64", number=ROWS), Argument("weight", dtype, (COLUMNS,))
    return (Argument("input", "float32", shape), weight, size, Argument("output", dtype, shape))


@pytest.fixture(scope="module")
def libraries() -> Iterator[dict[str, Any]]:
    builder = Builder(TARGET)
    try:
        modules = [{name: add_or_copy(name), **measuring_kernels(name, [case_of(name)], TARGET)} for name in DTYPES]
        built = builder.build([*modules, {READ: read_kernel()}])
    finally:
        builder.close()
    assert not [each for each in built if isinstance(each, str)], built
    opened = [open_kernels("t", each, hashlib.sha256(each).hexdigest()) for each in built if isinstance(each, bytes)]
    yield dict(zip((*DTYPES, READ), opened, strict=True))


def function_of(library: Any, name: str) -> Callable[..., None]:
    """Of numpy arrays, whose memory it takes as it is, and numbers."""
    found = library.get_function(name, query_imports=True)

    def call(*arguments: Any) -> None:
        found(*(each if isinstance(each, int) else to_device(each, each.dtype.name) for each in arguments))

    return call


def memory(words: int, value: int = 0) -> np.ndarray:
    return aligned_copy(np.full(words, value, np.int32), np.dtype(np.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_is_timed_with_weights_of_every_place(libraries: dict[str, Any], dtype: str) -> None:
    case = case_of(dtype)
    size, places = place_words(case[1]), 3
    weights = memory(places * size)
    for place in range(places):
        weights[place * size :][:size].view(np.uint8)[:] = place % 2 if dtype == "bool" else place
    x, out = memory(ROWS * COLUMNS), memory(ROWS * COLUMNS, -1)
    run = function_of(libraries[dtype], timed(0))
    seen = []
    for first in range(places):
        taken = aligned_copy(np.full(4, -1, np.int64), np.dtype(np.int64))
        run(x, weights, out, taken[:1], first, 0)
        assert taken[0] > 0 and (taken[1:] == -1).all()
        written = out.view(np.uint8)[: ROWS * COLUMNS * (4 if dtype == "float32" else 1)]
        assert len(set(written.tolist())) == 1
        seen.append(int(written[0]))
        run(x, weights, out, taken, first, 0)
        assert (taken > 0).all()
    assert seen[0] == 0 and sorted(seen) == ([0, 0, 1] if dtype == "bool" else [0, 1, 2])
    assert not x.any()


def test_fewer_words_than_a_place_are_one_place(libraries: dict[str, Any]) -> None:
    weights, x, out = (memory(ROWS * COLUMNS, value) for value in (0, 0, -1))
    weights[:COLUMNS].view(np.float32)[:] = np.arange(COLUMNS)
    x.view(np.float32)[:] = 0.5
    taken = aligned_copy(np.zeros(2, np.int64), np.dtype(np.int64))
    function_of(libraries["float32"], timed(0))(x, weights[:COLUMNS], out, taken, 7, 0)
    assert (out.view(np.float32).reshape(ROWS, COLUMNS) == np.arange(COLUMNS) + 0.5).all()


def test_memory_is_filled_again_and_again(libraries: dict[str, Any]) -> None:
    data, source = memory(10), aligned_copy(np.arange(4, dtype=np.int32), np.dtype(np.int32))
    function_of(libraries["float32"], FILL)(data, source)
    assert data.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_files_are_read_from_any_place(libraries: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    read = function_of(libraries[READ], READ)
    data, count = np.zeros(8, np.int8), np.zeros(1, np.int64)
    data, count = (aligned_copy(each, each.dtype) for each in (data, count))

    def found(path: str, at: int) -> bytes | None:
        name = np.frombuffer(path.encode() + b"\0", np.int8)
        read(name, data, at, count)
        return data[: count[0]].tobytes() if count[0] >= 0 else None

    path = str(tmp_path / "file")
    assert [found(path, at) for at in (0, 8, 10)] == [b"01234567", b"89", b""]
    assert found(f"{path}.no", 0) is None and found("/proc/cpuinfo", 0) == Path("/proc/cpuinfo").read_bytes()[:8]
