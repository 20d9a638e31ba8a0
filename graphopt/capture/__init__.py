"""Capture: a torch module, an exported program, an ONNX model or a `.pt2` file becomes a Program in normal form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

import graphopt.operators  # noqa: F401  defines what programs and files may call
from graphopt.capture.exported import Known, from_exported
from graphopt.capture.module import from_module
from graphopt.capture.raising import raised_from_torch
from graphopt.errors import CaptureError, UsageError
from graphopt.optional import missing_extra
from graphopt.program import Program
from graphopt.untrusted.limits import Limits

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Limits", "capture"]


def capture(
    source: torch.nn.Module | ExportedProgram | ModelProto | str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    dynamic_shapes: Mapping[str, Any] | None = None,
    name: str | None = None,
    limits: Limits = Limits(),  # noqa: B008  frozen
) -> Program:
    """Capture a model with eval semantics; the source is left as it was.

    source: an nn.Module, GraphModule, ExportedProgram or onnx.ModelProto, or the path of an `.onnx` or `.pt2` (read
        without running code in it).
    example_inputs: a tuple, or a dict from forward's argument names, of tensors or arrays; other values and None are
        baked in. A `.pt2` or ExportedProgram may bring its own; without any, and for ONNX, values are drawn. An input
        of an `.onnx` whose value decides a shape, an axis or a count is bound to its example: see `Program.bound`.
    dynamic_shapes: {input name: {axis: name or torch.export.Dim}}; axes of one name have one size. For a file,
        ExportedProgram or ModelProto it names the sizes that are dynamic already.
    Warns with CaptureWarning where an `.onnx` fixes a size that it or `dynamic_shapes` leaves open, or makes two one.
    Raises CaptureError when the source is no model, cannot be read safely or cannot be captured as asked, and
    UnknownNameError for an input that forward does not have.
    """
    if not isinstance(limits, Limits):
        raise UsageError(f"limits is {type(limits).__name__}; write limits=graphopt.Limits(max_nodes=...)")
    if type(source).__name__ == "ModelProto":
        return _onnx(source, example_inputs, dynamic_shapes, name or "model", limits)
    if isinstance(source, ExportedProgram):
        known = Known()
        return _exported(source, known, example_inputs, dynamic_shapes, name or "model", limits)
    if isinstance(source, torch.nn.Module):
        name = name or type(source).__name__
        return raised_from_torch(from_module(source, example_inputs, dynamic_shapes, name=name, limits=limits))
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.suffix == ".onnx":
            return _onnx(path, example_inputs, dynamic_shapes, name or path.stem, limits)
        from graphopt.capture.pt2 import read_pt2

        exported, known = read_pt2(path, limits)
        return _exported(exported, known, example_inputs, dynamic_shapes, name or known.name or path.stem, limits)
    raise CaptureError(
        f"cannot capture a {type(source).__name__}; give a torch module, an ExportedProgram, an onnx.ModelProto, "
        "or the path of an .onnx or .pt2"
    )


def _onnx(
    source: Any, example_inputs: Any, dynamic_shapes: Mapping[str, Any] | None, name: str, limits: Limits
) -> Program:
    try:
        from graphopt.capture.onnx import from_onnx
    except ImportError as error:
        raise missing_extra("importing ONNX", error) or error from error
    return from_onnx(source, example_inputs, dynamic_shapes, name=name, limits=limits)


def _exported(
    source: ExportedProgram,
    known: Known,
    example_inputs: Any,
    dynamic_shapes: Mapping[str, Any] | None,
    name: str,
    limits: Limits,
) -> Program:
    from graphopt.capture.exported import with_request

    known = with_request(source, known, example_inputs, dynamic_shapes)
    return raised_from_torch(from_exported(source, known, name=name, limits=limits))
