"""Writes a program as `.pt2` (with everything a program knows) or `.onnx`; whole files or none."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.utils._pytree import tree_leaves

from graphopt.capture.lift import lift
from graphopt.capture.onnx.metadata import write_bound, write_exits, write_provenance
from graphopt.capture.quiet import quiet
from graphopt.capture.sidecar import SIDECAR, describe
from graphopt.errors import UsageError, WriteError
from graphopt.program import Program

_BFLOAT16_OPSET = 22
_INLINE_BYTES = 3 << 29  # 1.5 GB: a protobuf message must stay under 2 GB


def save_program(program: Program, path: str | os.PathLike[str]) -> None:
    """Write a `.pt2` that `torch.export.load` and `capture` read, with names, sizes, domains, state and provenance.

    Raises UsageError for another suffix, WriteError when the file cannot be written.
    """
    exported = lift(program)
    extra = {SIDECAR: json.dumps(describe(program), indent=1)}

    def write(target: Path) -> None:
        with target.open("wb") as file:
            sink = _Sink(file)
            with quiet():
                torch.export.save(exported, cast(IO[bytes], sink), extra_files=extra)
            if sink.error is not None:
                raise sink.error

    write_whole(Path(path), ".pt2", write)


class _Sink(io.RawIOBase):
    """Passes bytes on and keeps the first error: torch's C++ zip writer ends the process when a write fails."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True  # torch asks, and rewinds once everything is written

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)


def save_onnx(program: Program, path: str | os.PathLike[str]) -> None:
    """Write an `.onnx` with the program's names; weights over 1.5 GB go to a file beside it.

    Raises UsageError for another suffix, a program with state, or an operator without an ONNX form; WriteError when the
    file cannot be written.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise UsageError("writing .onnx needs onnx and onnxscript: pip install graphopt[onnx]") from error
    if program.state:
        name = program.state[0].spec.name
        raise UsageError(f"{program.name} has state ({name}), which .onnx cannot hold; save a .pt2")
    model = _onnx_model(program)

    def write(target: Path) -> None:
        if model.ByteSize() > _INLINE_BYTES:
            onnx.save_model(model, str(target), save_as_external_data=True, location=f"{target.name}.data")
        else:
            target.write_bytes(model.SerializeToString(deterministic=True))

    write_whole(Path(path), ".onnx", write)


def _onnx_model(program: Program) -> Any:
    from graphopt.capture.onnx import (
        write_elements,
        write_gating,
        write_low_bit,
        write_quantization,
        write_recurrent,
        write_sorting,
    )
    from graphopt.capture.onnx.explicit_quantization import explicit

    program = explicit(program)
    modules = (write_quantization, write_recurrent, write_gating, write_low_bit, write_elements, write_sorting)
    translations = {target: write for module in modules for target, write in module.TRANSLATIONS.items()}
    for node in (node for _, module in program.graphs() for node in module.graph.nodes):
        if getattr(node.target, "namespace", "") == "graphopt" and node.target not in translations:
            raise UsageError(
                f"{program.name} has no ONNX form: {node.name} is {node.target}, which ONNX has no operator for; "
                "save a .pt2, or write the .onnx before the pass that made it"
            )
    try:
        with quiet():
            converted = torch.onnx.export(
                lift(program),
                (),
                dynamo=True,
                verbose=False,
                input_names=[spec.name for spec in program.inputs],
                opset_version=_opset(program),
                custom_translation_table=translations,
            )
            assert converted is not None and converted.exported_program is not None
            model = converted.model_proto
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UsageError):  # of a translation of ours
            cause = cause.__cause__
        lines = [line for line in str(cause or error).splitlines() if line.strip()]
        reason = lines[-1].strip()[:200] if lines else type(error).__name__
        raise UsageError(f"{program.name} has no ONNX form: {reason}") from error
    write_provenance(model, converted.exported_program.graph_module, program.metadata)
    write_bound(model, program)
    write_exits(model, program.exits)
    _merge_matrices(model.graph)
    write_low_bit.pack_weights(model.graph)
    _name_outputs(model.graph, [spec.name for spec in program.outputs])
    _name_sizes(model, program)
    return model


def _opset(program: Program) -> int | None:
    """None: the exporter's own choice, which has neither bfloat16 convolutions and pools nor codes in blocks."""
    from graphopt.capture.onnx import write_low_bit, write_quantization

    for _, module in program.graphs():
        for node in module.graph.nodes:
            if any(getattr(value, "dtype", None) is torch.bfloat16 for value in tree_leaves(node.meta.get("val"))):
                return _BFLOAT16_OPSET
    coded = write_quantization.TRANSLATIONS.keys() | write_low_bit.TRANSLATIONS.keys()
    return write_quantization.OPSET if any(node.target in coded for node in program.nodes()) else None


def _merge_matrices(graph: Any) -> None:
    """Hold equal matrices once: the exporter transposes a weight that layers share for each of its readers.

    Vectors stay apart: fresh norms are equal by chance, and readers of the file would take them for shared.
    """
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    merged: dict[str, str] = {}
    results = {value.name for value in graph.output}
    for tensor in graph.initializer:
        if len(tensor.dims) > 1 and tensor.raw_data and tensor.name not in results:
            key = tensor.data_type, tuple(tensor.dims), hashlib.sha256(tensor.raw_data).digest()
            if (name := first.setdefault(key, tensor.name)) != tensor.name:
                merged[tensor.name] = name
    for number in reversed(range(len(graph.initializer))):
        if graph.initializer[number].name in merged:
            del graph.initializer[number]
    for number in reversed(range(len(graph.value_info))):
        if graph.value_info[number].name in merged:
            del graph.value_info[number]
    _rename(graph, merged)


def _name_outputs(graph: Any, names: Sequence[str]) -> None:
    """Give outputs their names; an inner value or a weight that has one of them steps aside.

    The exporter's own renaming leaves two values of one name, which ONNX Runtime refuses; an output that is an input
    is a node from its name to its name.
    """
    for number in reversed(range(len(graph.node))):
        if graph.node[number].op_type == "Identity" and graph.node[number].input == graph.node[number].output:
            del graph.node[number]
    outer = {value.name for value in (*graph.input, *graph.initializer)}
    inner = {name for node in graph.node for name in node.output}
    current = [value.name for value in graph.output]
    direct = [own not in outer and current.count(own) == 1 for own in current]
    weights = {value.name for value in graph.initializer}
    renamed = {name: _free(f"{name}_inner", outer | inner) for name in names if name in inner | weights}
    renamed |= {own: name for own, name, is_direct in zip(current, names, direct, strict=True) if is_direct}
    _rename(graph, renamed)
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for value, own, name, is_direct in zip(graph.output, current, names, direct, strict=True):
        if not is_direct:  # an input, a weight, or the same value twice
            graph.node.add(op_type="Identity", input=[renamed.get(own, own)], output=[name])
        value.name = name


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _rename(graph: Any, names: dict[str, str]) -> None:
    """In the nodes of the graph and of its branches, and in what is said of their types."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for branch in (attribute.g, *attribute.graphs):
                _rename(branch, names)
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)


def _name_sizes(model: Any, program: Program) -> None:
    """Use the program's size names for those of torch, which also occur inside expressions."""
    names = dict(program.symbols)
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b") if names else None
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if pattern is not None and dimension.dim_param:
                dimension.dim_param = pattern.sub(lambda match: names[match.group()], dimension.dim_param)
    for kind, specs in ((graph.input, program.inputs), (graph.output, program.outputs)):
        for value, spec in zip(kind, specs, strict=True):
            for dimension, size in zip(value.type.tensor_type.shape.dim, spec.shape, strict=False):
                if isinstance(size, str):
                    dimension.dim_param = size


def write_whole(path: Path, suffix: str, write: Callable[[Path], None]) -> None:
    """Write into a folder beside `path`, then move the files into place: readers see all of it or nothing."""
    if path.suffix != suffix:
        raise UsageError(f"{path} must end in {suffix}")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=path.parent))
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}") from error
    try:
        write(folder / path.name)
        files = sorted(folder.iterdir(), key=lambda file: file.name == path.name)  # the model itself last
        for file in files:
            os.replace(file, path.parent / file.name)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
