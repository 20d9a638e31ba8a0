"""Tiny compiled libraries, and artifacts made of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.artifact.write import write_artifact
from graphopt.runtime.manifest import Bounds, Entry, Manifest, TensorInfo, Variant

Build = Callable[..., Any]


def build_library(path: Path) -> bytes:
    """Functions: main(x, w, b) = x * w + b; twins(x, y) = (x + y, x - y, x); count(x, total) = (x + total, total + x);

    grow(x) = x twice; fixed(x) = (x + x, a constant); halves(x) = x + x in bfloat16; scalar(x) = x + x.
    """
    import tvm
    from tvm import relax, tirx

    builder = relax.BlockBuilder()
    rows, op = tirx.Var("rows", "int64"), relax.op

    def tensor(name: str, shape: tuple[Any, ...], dtype: str = "float32") -> Any:
        return relax.Var(name, relax.TensorType(shape, dtype))

    def function(name: str, parameters: list[Any], body: Build) -> None:
        with builder.function(name, parameters):
            with builder.dataflow():
                result = body()
                fields = result if isinstance(result, tuple) else (result,)
                outputs = [builder.emit_output(builder.normalize(field)) for field in fields]
            builder.emit_func_output(tuple(outputs) if isinstance(result, tuple) else outputs[0])

    x, y = tensor("x", (rows, 8)), tensor("y", (rows, 8))
    w, b = tensor("w", (8,)), tensor("b", (8,))
    function("main", [x, w, b], lambda: op.add(op.multiply(x, w), b))
    function("twins", [x, y], lambda: (op.add(x, y), op.subtract(x, y), x))
    total = tensor("total", (8,))
    item = tensor("x", (8,))

    def count() -> tuple[Any, ...]:
        following = builder.emit(op.add(total, item))
        return following, following

    function("count", [item, total], count)
    function("grow", [x], lambda: op.concat([x, x], axis=0))
    function("fixed", [item], lambda: (op.add(item, item), relax.const(np.arange(4, dtype="float32"))))
    half = tensor("x", (rows, 8), "bfloat16")
    function("halves", [half], lambda: op.add(half, half))
    scalar = tensor("x", ())
    function("scalar", [scalar], lambda: op.add(scalar, scalar))
    compiled = tvm.compile(builder.get(), tvm.target.Target({"kind": "llvm"}))
    compiled.export_library(str(path))
    return path.read_bytes()


def infos(**shapes: Any) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name, "float32", shape) for name, shape in shapes.items())


WEIGHTS = {
    "w": np.arange(8, dtype=np.float32),
    "b": np.ones(8, np.float32),
    "state.total": np.zeros(8, np.float32),
}
ROWS = ("rows", 8)
ENTRIES = {
    "main": Entry(infos(x=ROWS), infos(y=ROWS), sizes={"rows": Bounds(1, 64)}),
    "twins": Entry(infos(x=ROWS, y=ROWS), infos(sum=ROWS, difference=ROWS, same=ROWS), sizes={"rows": Bounds(0, None)}),
    "count": Entry(infos(x=(8,)), infos(total_now=(8,)), infos(total=(8,))),
    "grow": Entry(infos(x=ROWS), infos(y=("2*rows", 8)), sizes={"rows": Bounds(1, None)}),
    "fixed": Entry(infos(x=(8,)), infos(y=(8,), table=(4,))),
    "halves": Entry(
        (TensorInfo("x", "bfloat16", ROWS),), (TensorInfo("y", "bfloat16", ROWS),), sizes={"rows": Bounds(1, None)}
    ),
    "scalar": Entry(infos(x=()), infos(y=())),
}


@dataclass(frozen=True)
class Parts:
    """Arguments of write_artifact; `write(path, **changes)` writes them and returns the path."""

    manifest: Manifest
    libraries: Mapping[str, bytes]
    weights: Mapping[str, np.ndarray]
    check: Mapping[str, np.ndarray]
    report: Mapping[str, Any]

    def write(self, path: Path | str, **changes: Any) -> Path:
        parts = replace(self, **changes)
        write_artifact(path, parts.manifest, parts.libraries, parts.weights, parts.check, parts.report)
        return Path(path)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of tvm are not ours
        library = build_library(tmp_path_factory.mktemp("library") / "cpu.so")
    weights: dict[str, tuple[str, ...]] = {name: ("w", "b") if name == "main" else () for name in ENTRIES}
    manifest = Manifest("tiny", ENTRIES, (Variant("cpu", (), "lib/cpu.so", weights),), tools={"graphopt": "0.1.0"})
    x = np.ones((2, 8), np.float32)
    check = {"main.input.x": x, "main.output.y": x * WEIGHTS["w"] + WEIGHTS["b"]}
    return Parts(manifest, {"lib/cpu.so": library}, WEIGHTS, check, {"kernels": {"multiply": "generic"}})


@pytest.fixture(scope="session")
def artifact(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.write(tmp_path_factory.mktemp("artifact") / "tiny.gopt")
