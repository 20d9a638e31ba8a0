"""Two steps of torch.export whose time grows with the square of the number of weights, done in linear time.

For every weight, torch lists all weights of the signature again, and compares the name of each module on its path with
all its siblings, in search of second calls ("block@1") that an exported program does not have. A model of 5,000 blocks
would spend most of its import there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import _trace, _unlift, exported_program
from torch.export.graph_signature import ExportGraphSignature

_LOCK = threading.RLock()
_EXPORTING: tuple[Any, ...] = (_trace, exported_program)
_UNLIFTING: Any = _unlift


@contextmanager
def linear_export() -> Iterator[None]:
    """While this is entered, torch.export does the two steps as written here."""
    with _LOCK:
        populate, assign = _EXPORTING[0]._populate_param_buffer_metadata_to_new_gm, _UNLIFTING._assign_attr

        def populate_once(known: Any, module: Any, signature: ExportGraphSignature) -> None:
            populate(known, module, _Names(signature.inputs_to_parameters, signature.inputs_to_buffers))

        def assign_directly(value: Any, module: torch.nn.Module, target: str, *args: Any, **kwargs: Any) -> None:
            path, _, name = target.rpartition(".")
            if "@" in path:
                assign(value, module, target, *args, **kwargs)
            else:
                assign(value, _submodule(module, path), name, *args, **kwargs)

        _set(populate_once, assign_directly)
        try:
            yield
        finally:
            _set(populate, assign)


@dataclass(frozen=True)
class _Names:
    """The two tables of a signature that are read, made once."""

    inputs_to_parameters: Any
    inputs_to_buffers: Any


def _submodule(module: torch.nn.Module, path: str) -> torch.nn.Module:
    for part in path.split(".") if path else ():
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    return module


def _set(populate: Any, assign: Any) -> None:
    for owner in _EXPORTING:
        owner._populate_param_buffer_metadata_to_new_gm = populate
    _UNLIFTING._assign_attr = assign
