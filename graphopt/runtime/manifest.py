"""`manifest.json`, format 1.0: what an artifact holds and what a machine must have to run it.

Shared by the writer and the runtime, so this file needs the standard library only. Sizes are integers or expressions
over the names in `Entry.sizes`. A variant's function `entry` takes the inputs, the state, then the tensors named in
`Variant.weights[entry]`, and returns the outputs, then the new state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graphopt.errors import ArtifactError

FORMAT = "1.0"
MANIFEST, WEIGHTS, CHECK, REPORT = "manifest.json", "weights.safetensors", "check.safetensors", "report.json"


@dataclass(frozen=True)
class TensorInfo:
    """dtype as numpy spells it, or "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Bounds:
    """Both included; None is no limit."""

    low: int = 1
    high: int | None = None


@dataclass(frozen=True)
class Entry:
    """`state` tensors start from the weights member's tensor "state.<name>"."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    state: tuple[TensorInfo, ...] = ()
    sizes: Mapping[str, Bounds] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One compiled library. `features` are CPU flags as the runtime spells them ("avx512f"); all are required."""

    target: str
    features: tuple[str, ...]
    library: str
    weights: Mapping[str, tuple[str, ...]]
    kernels: Mapping[str, str] = field(default_factory=dict)  # kernel name -> schedule rule; "generic" is the slow path


@dataclass(frozen=True)
class Manifest:
    """`files`: member -> {"sha256", "bytes"}; `tensors`: tensor of the weights member -> sha256."""

    name: str
    entries: Mapping[str, Entry]
    variants: tuple[Variant, ...]
    tools: Mapping[str, str] = field(default_factory=dict)
    passes: tuple[Mapping[str, Any], ...] = ()
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    format: str = FORMAT

    def to_json(self) -> str:
        """Sorted keys and no clock or path: equal manifests give equal bytes."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


def parse(text: str | bytes) -> Manifest:
    """Read and validate; raises ArtifactError naming what is missing or of another format."""
    try:
        data = json.loads(text)
        version = str(data["format"])
        if version.split(".")[0] != FORMAT.split(".")[0]:
            raise ArtifactError(f"the artifact has format {version}, this graphopt reads {FORMAT}; install a graphopt that reads it or compile again")
        return Manifest(
            name=data["name"],
            entries={name: _entry(value) for name, value in data["entries"].items()},
            variants=tuple(_variant(value) for value in data["variants"]),
            tools=data["tools"],
            passes=tuple(data["passes"]),
            files=data["files"],
            tensors=data["tensors"],
            format=version,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ArtifactError(f"{MANIFEST} is damaged ({type(e).__name__}: {e}); get the artifact again or compile it again") from e


def _tensors(items: Any) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(item["name"], item["dtype"], tuple(item["shape"])) for item in items)


def _entry(data: Any) -> Entry:
    sizes = {name: Bounds(**bounds) for name, bounds in data["sizes"].items()}
    return Entry(_tensors(data["inputs"]), _tensors(data["outputs"]), _tensors(data["state"]), sizes)


def _variant(data: Any) -> Variant:
    weights = {entry: tuple(names) for entry, names in data["weights"].items()}
    return Variant(data["target"], tuple(data["features"]), data["library"], weights, data["kernels"])
