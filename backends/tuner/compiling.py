"""The child that generates code: a module of kernels in, a shared library out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from graphopt.backends.linker import link
from graphopt.backends.tuner.child import Blob
from graphopt.runtime.library import hidden

with hidden("torch"):  # TVM imports it when it can, which costs seconds
    import tvm
    from tvm import tirx

    from graphopt.backends.tir_pipeline import register


def serve(value: Any, blobs: list[Blob]) -> tuple[Any, list[Blob]]:
    """value: {"target": TVM's target, "machine": name}; the blob is the module as TVM writes it."""
    module = tvm.ir.load_json(bytes(blobs[0]).decode())
    native = tvm.target.Target(value["target"])
    with native, tvm.transform.PassContext(opt_level=3):
        built = tirx.build(module, native, pipeline=register())
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "kernels.so")

        def linker(output: str, objects: list[str], **_: Any) -> None:
            link(list(objects), output, value["machine"])

        built.export_library(path, fcompile=linker, workspace_dir=folder)
        return None, [Path(path).read_bytes()]
