"""What the pipeline's own passes make of buffers: one dimension, truth values as bytes, arguments declared."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from graphopt.backends.tir_pipeline import flatten, register


def choose() -> Any:
    """out[i, j] = tile[j, i] where tile[j, i] = 1 if mask[i, j] and 2 if not; set[i, j] = not mask[i, j]."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("choose")
            T.func_attr({"tirx.noalias": True, "global_symbol": "choose"})
            mask = T.arg("mask", T.buffer([2, 3], "bool", layout=None))
            out = T.arg("out", T.buffer([2, 3], "float32", layout=None))
            unset = T.arg("unset", T.buffer([2, 3], "bool", layout=None))
            plain = T.decl_buffer([6], "bool", data=mask.data, layout=None)
            tile = T.alloc_buffer((3, 2), "float32", scope="local", layout=None)
            for i in range(2):
                for j in range(3):
                    T.buffer_store(tile, tirx.Select(plain[i * 3 + j], 1.0, 2.0), [j, i])
                    T.buffer_store(out, tile[j, i], [i, j])
                    T.buffer_store(unset, tirx.Not(mask[i, j]), [i, j])
        return builder.get()


def test_flat_buffers_compute_the_same() -> None:
    library = tirx.build(tvm.IRModule({"choose": choose()}), "llvm", pipeline=register())
    mask = np.array([[True, False, True], [False, False, True]])
    out, unset = tvm.runtime.tensor(np.zeros((2, 3), np.float32)), tvm.runtime.tensor(np.zeros((2, 3), np.bool_))
    library["choose"](tvm.runtime.tensor(mask), out, unset)
    assert np.array_equal(out.numpy(), np.where(mask, 1.0, 2.0))
    assert np.array_equal(unset.numpy(), ~mask)


def test_every_access_has_one_index() -> None:
    module = flatten(tvm.IRModule({"choose": choose()}))
    ranks = set()

    def note(access: Any) -> None:
        ranks.add(len(access.indices))

    body = module["choose"].body
    tvm_ffi.structural_walk(body, (tvm.ir.TensorLoad, note))
    tvm_ffi.structural_walk(body, (tirx.BufferStore, note))
    assert ranks == {1}
