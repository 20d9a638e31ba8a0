"""What a `.pt2` written by graphopt says beyond the graph: names, sizes, domains, values. Read as untrusted data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram

from graphopt.capture.exits import describe_exits, read_exits
from graphopt.capture.exported import Known, user_values
from graphopt.errors import CaptureError
from graphopt.program import Domain, Program, SizeRange

SIDECAR = "graphopt.json"
_FORMAT = 1


def describe(program: Program) -> dict[str, Any]:
    """The JSON value that `read_sidecar` reads back."""
    return {
        "format": _FORMAT,
        "name": program.name,
        "inputs": [
            {
                "name": spec.name,
                "shape": list(spec.shape),
                "domain": [spec.domain.kind, spec.domain.low, spec.domain.high],
                "bound": bound_values(program).get(spec.name),
            }
            for spec in program.inputs
        ],
        "outputs": [spec.name for spec in program.outputs],
        "sizes": {name: [bounds.low, bounds.high] for name, bounds in program.sizes.items()},
        "history": [dict(item) for item in program.history],
        "metadata": dict(program.metadata),
        "notes": list(program.notes),
        "exits": describe_exits(program.exits),
    }


def bound_values(program: Program) -> dict[str, list[Any]]:
    """The elements of each bound input's value, the last axis fastest."""
    return {name: value.reshape(-1).tolist() for name, value in program.bound.items()}


def bound_value(values: Any, dtype: torch.dtype, shape: Sequence[Any]) -> torch.Tensor:
    """What `bound_values` gave for an input of this type and shape. Raises ValueError or TypeError for other things."""
    if not isinstance(values, list) or not all(isinstance(item, (bool, int, float)) for item in values):
        raise TypeError("no value")
    sizes = [size for size in shape if isinstance(size, int)]
    if len(sizes) != len(shape) or math.prod(sizes) != len(values):
        raise ValueError("a value of another shape")
    try:
        result = torch.tensor(values, dtype=dtype)
    except (RuntimeError, OverflowError) as error:
        raise ValueError("a value of another type") from error
    if result.tolist() != values:
        raise ValueError("a value of another type")
    return result.reshape(sizes)


def read_sidecar(value: Any, exported: ExportedProgram, known: Known) -> Known:
    """Add names, sizes and domains to what is known. Raises CaptureError where they do not fit the program."""
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise CaptureError(f"{SIDECAR} in the .pt2 has another format; save it again with this version of graphopt")
    try:
        name = _text(value["name"])
        inputs = [_text(entry["name"]) for entry in value["inputs"]]
        outputs = [_text(name) for name in value["outputs"]]
        sizes = {_text(name): _bounds(low, high) for name, (low, high) in value["sizes"].items()}
        history = tuple(_record(item) for item in value.get("history", ()))
        metadata = {_text(key): str(said) for key, said in value.get("metadata", {}).items()}
        exits = read_exits(value.get("exits"), len(outputs))
        domains = {_text(entry["name"]): _domain(entry["domain"]) for entry in value["inputs"]}
        values = user_values(exported, inputs)
        bound = {
            entry["name"]: bound_value(entry["bound"], values[entry["name"]].dtype, values[entry["name"]].shape)
            for entry in value["inputs"]
            if entry.get("bound") is not None
        }
        notes = tuple(_text(note) for note in value.get("notes", ()))
        symbols: dict[str, str] = {}
        for entry in value["inputs"]:
            symbols.update(_symbols(values[entry["name"]], entry["shape"], sizes))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CaptureError(f"{SIDECAR} in the .pt2 is damaged; save it again with graphopt") from error
    if len(outputs) != len(known.outputs or outputs):
        raise CaptureError(f"{SIDECAR} in the .pt2 names {len(outputs)} outputs, which is not what its graph has")
    known = replace(known, inputs=inputs, outputs=outputs, symbols=symbols, sizes=sizes, domains=domains)
    return replace(known, name=name, history=history, metadata=metadata, bound=bound, notes=notes, exits=exits)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > 1000:
        raise TypeError("not a name")
    return value


def _record(value: Any) -> dict[str, Any]:
    """One pass that was run; whatever JSON it holds is only shown."""
    if not isinstance(value, dict):
        raise TypeError("no record")
    return {**value, "name": _text(value["name"])}


def _bounds(low: Any, high: Any) -> SizeRange:
    if type(low) is not int or (high is not None and type(high) is not int):
        raise TypeError("bounds are integers")
    return SizeRange(low, high)


def _domain(value: Any) -> Domain:
    kind, low, high = value
    if kind not in ("any", "mask", "ids") or type(low) is not int or type(high) is not int or low > high:
        raise ValueError("no domain")
    return Domain(kind, low, high)


def _symbols(value: torch.Tensor, shape: Any, sizes: Mapping[str, SizeRange]) -> dict[str, str]:
    """Symbols of an input's sizes that are plain names."""
    found: dict[str, str] = {}
    for size, name in zip(value.shape, shape, strict=True):
        if isinstance(size, torch.SymInt) and name in sizes and size.node.expr.is_Symbol:
            found[str(size.node.expr)] = str(name)
    return found
