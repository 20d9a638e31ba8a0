"""The ONNX model behind a path or a ModelProto, checked for what every later step takes for granted.

A file is first walked through in a limited child process (see `graphopt.untrusted.onnx_file`).
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from graphopt.capture.onnx.functions import inlined
from graphopt.capture.onnx.graphs import DOMAINS, all_nodes
from graphopt.errors import CaptureError
from graphopt.untrusted.child import run_child
from graphopt.untrusted.limits import Limits
from graphopt.untrusted.onnx_file import MOST_BYTES

LEAST_OPSET = 7


def read_model(source: Any, limits: Limits) -> tuple[Any, Path | None]:
    """(ModelProto, folder of its external data); a ModelProto given is only read. Raises CaptureError."""
    if not isinstance(source, (str, os.PathLike)):
        model, folder = source, None
    else:
        path = Path(source)
        model, folder = _load(path, limits), path.parent
    if not model.graph.node and not model.graph.output:
        raise CaptureError("the ONNX model has no graph; the file is empty or no ONNX model")
    if not all(isinstance(text, str) for text in _texts(model.graph)):
        raise CaptureError("a name in the ONNX model is no text; the file is damaged")
    if model.functions:
        model = inlined(model, limits)
    count = sum(1 for _ in all_nodes(model.graph))
    if count > limits.max_nodes:
        raise CaptureError(f"the model has {count} nodes, over the limit of {limits.max_nodes}; raise Limits.max_nodes")
    return model, folder


def _load(path: Path, limits: Limits) -> Any:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CaptureError(f"{path} is no file; give the path of an .onnx file")
        if found.st_size > limits.max_bytes:
            raise CaptureError(
                f"{path} has {found.st_size} bytes, over the limit of {limits.max_bytes}; raise Limits.max_bytes"
            )
        if found.st_size > MOST_BYTES:
            raise CaptureError(
                f"{path} has {found.st_size} bytes, and no ONNX file has over {MOST_BYTES}; save its weights beside it "
                "with onnx.save_model(model, path, save_as_external_data=True)"
            )
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            run_child("graphopt.untrusted.onnx_file:check_file", path, Path(folder), limits)
        return onnx.load_model(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise CaptureError(f"{path} is no ONNX model, or is damaged") from error
    except OSError as error:
        raise CaptureError(f"{path} cannot be read: {error.strerror or error}") from error


def _texts(graph: Any) -> Iterator[Any]:
    """Every name that is read; protobuf gives bytes where a text is no UTF-8."""
    for node in all_nodes(graph):
        yield from (node.op_type, node.domain, node.name, *node.input, *node.output)
        yield from (entry.name for entry in node.attribute)
    for value in (*graph.input, *graph.output):
        yield value.name
        yield from (size.dim_param for size in value.type.tensor_type.shape.dim)
    yield from (proto.name for proto in graph.initializer)


def opset_of(model: Any) -> int:
    """The version of the standard operators. Raises CaptureError where it is missing, too old or too new."""
    versions = [entry.version for entry in model.opset_import if entry.domain in DOMAINS]
    names = {node.op_type for node in all_nodes(model.graph) if node.domain in DOMAINS}
    newest = onnx.defs.onnx_opset_version()
    if not versions:
        if names:
            raise CaptureError("the ONNX model does not say its opset; export it again")
        return newest
    if versions[0] > newest:
        raise CaptureError(
            f"the ONNX model has opset {versions[0]}, and the installed onnx knows {newest}; install a newer onnx, or "
            f"export the model with opset_version={newest}"
        )
    if versions[0] < LEAST_OPSET and any(_has_changed(name, versions[0]) for name in names):
        raise CaptureError(
            f"the ONNX model has opset {versions[0]}; graphopt imports {LEAST_OPSET} and later: export it with "
            "opset_version=18, or convert it with onnx.version_converter"
        )
    return int(versions[0])


def _has_changed(name: str, opset: int) -> bool:
    """Whether an operator is not what it was in an opset before the least one."""
    try:
        since, now = (onnx.defs.get_schema(name, version).since_version for version in (opset, LEAST_OPSET))
    except onnx.defs.SchemaError:
        return True
    return bool(since != now)
