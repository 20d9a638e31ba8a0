"""The runtimes that can stand beside graphopt, and the model as they take it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.errors import MissingExtraError, UnknownNameError

if TYPE_CHECKING:
    from graphopt.program import Program

PEERS = {"onnxruntime": "onnxruntime"}
"""Name -> module that must be installed."""


def check_peers(text: str) -> list[str]:
    """The names in "a,b"; raises UnknownNameError, or MissingExtraError for one that is not installed."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise UnknownNameError("runtime", name, PEERS)
        if importlib.util.find_spec(PEERS[name]) is None:
            raise MissingExtraError(f'{name} is not installed; run pip install "graphopt[bench]"')
    return list(dict.fromkeys(names))


def export_for_peers(program: Program, folder: Path) -> str:
    """The captured, unoptimized model as ONNX with the same dynamic sizes, written once; returns its path."""
    path = folder / "model.onnx"
    if not path.exists():
        program.to_onnx(str(path))
    return str(path)
