"""Reads a `.pt2` without running anything in it.

`torch.export.load` unpickles whatever a `.pt2` holds, and trusts its graph. A limited child process reads the file
first and writes a cleaned copy without any pickle (see `graphopt.untrusted.pt2_file`); torch loads that.
"""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.capture.exported import Known
from graphopt.capture.linear_export import linear_export
from graphopt.capture.quiet import quiet
from graphopt.capture.sidecar import read_sidecar
from graphopt.errors import CaptureError
from graphopt.untrusted.child import run_child
from graphopt.untrusted.limits import Limits
from graphopt.untrusted.pt2_file import CLEAN, SAMPLES

_READER = "graphopt.untrusted.pt2_file:clean_file"
_UNREADABLE = (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, EOFError, AttributeError)


def read_pt2(path: Path, limits: Limits) -> tuple[ExportedProgram, Known]:
    """The exported program in a `.pt2` file and the names that it holds. Raises CaptureError."""
    if not path.is_file():
        raise CaptureError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; give the path of a .pt2 file")
    with tempfile.TemporaryDirectory(prefix="graphopt-") as name:
        folder = Path(name)
        found = run_child(_READER, path, folder, limits)
        try:
            exported = _load(folder / CLEAN)
            examples = _sample_inputs(folder / SAMPLES, limits)
            known = Known(inputs=found["inputs"], outputs=found["outputs"], examples=examples)
            if found["sidecar"] is not None:
                known = read_sidecar(found["sidecar"], exported, known)
        except CaptureError as error:
            raise CaptureError(f"{path}: {error}") from error
    return exported, known


def _load(path: Path) -> ExportedProgram:
    try:
        with quiet(), linear_export():
            return torch.export.load(path)
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        raise CaptureError(
            f"torch cannot load it ({reason}); save it again with torch.export.save of this torch version"
        ) from error


def _sample_inputs(path: Path, limits: Limits) -> list[torch.Tensor] | None:
    """The tensors among the sample inputs; None where there are none that load without running code."""
    if not path.exists():
        return None
    try:
        with quiet():
            sample = torch.load(path, weights_only=True, map_location="cpu")
    except _UNREADABLE:
        return None  # examples are drawn instead
    leaves = [leaf for leaf in pytree.tree_leaves(sample) if isinstance(leaf, torch.Tensor)]
    if sum(leaf.numel() * leaf.element_size() for leaf in leaves) > limits.max_graph_bytes:
        return None  # a few bytes spread over many by strides of zero
    return leaves or None
