"""`manifest.json`, format 1.0: what an artifact holds and what a machine must have to run it.

Shared by the writer and the runtime, so this file needs the standard library only. Sizes are integers or expressions
over the names in `Entry.sizes`. A variant's function `entry` takes the inputs, the state, then the tensors named in
`Variant.weights[entry]`, and returns the outputs, then the new state but for what it writes in place.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from graphopt.errors import ArtifactError
from graphopt.runtime import gpu

FORMAT = "1.0"
MANIFEST, WEIGHTS, CHECK, REPORT = "manifest.json", "weights.safetensors", "check.safetensors", "report.json"
T = TypeVar("T")


@dataclass(frozen=True)
class TensorInfo:
    """dtype as numpy spells it, or "bfloat16".

    `bound` are the elements, the last axis fastest, of the one value that an input may have; None where any will do.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    bound: tuple[bool | int | float, ...] | None = None


@dataclass(frozen=True)
class Bounds:
    """Both included; None is no limit."""

    low: int = 1
    high: int | None = None


@dataclass(frozen=True)
class Entry:
    """`state` tensors start from the weights member's tensor "state.<name>".

    The function writes into those that `written` names, and does not return them; they start as zeros where the weights
    member has no such tensor.

    `exits` names the output that tells which exit each sample took; it and the outputs after it are given by name only.
    An entry with `stages`, names of other entries, has no function of its own: these run one after another on the
    samples that are left, of which the size `rows` counts them.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    state: tuple[TensorInfo, ...] = ()
    sizes: Mapping[str, Bounds] = field(default_factory=dict)
    exits: str | None = None
    stages: tuple[str, ...] = ()
    rows: str | None = None
    written: tuple[str, ...] = ()

    @property
    def returned(self) -> tuple[TensorInfo, ...]:
        """The state that the function returns anew."""
        return tuple(item for item in self.state if item.name not in self.written)


GENERIC = "generic"  # the rule of kernels that nothing better took
WHY, SLOW = "why", "slow"  # what a configuration says in words


@dataclass(frozen=True)
class KernelInfo:
    """One kernel. `rule` is the schedule rule that wrote it, "generic" the slow path; `configuration` what it chose,
    where there is more than numbers to say "why", and "slow": what takes long whatever the machine.

    `flops` (operations on floats, a multiply-add is two) and `bytes` (read and written, each once) are those of one
    call: integers or expressions over the entry's sizes, None where no expression says them. `weight_bytes` is the part
    of `bytes` that is read from weights. `nodes`: entry -> names of the program's nodes that it computes, those inside
    a branch with the branch's path before the name. A node that takes several kernels is in each, and so is one that
    every reader computes anew; views and what is known when compiling are in none.
    """

    rule: str
    configuration: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    flops: int | str | None = None
    bytes: int | str | None = None
    weight_bytes: int | str | None = None
    nodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def slow(self) -> str | None:
        """Why it is slow whatever the machine makes of it, or None; only measuring tells what else is."""
        if self.rule == GENERIC:
            return "generic: no schedule rule took it"
        told = self.configuration.get(SLOW)
        return None if told is None else str(told)


@dataclass(frozen=True)
class Variant:
    """One compiled library. `features` are CPU flags as the runtime spells them ("avx512f"); all are required.

    One that begins with "cuda:" names the architectures of GPUs that the library has code for ("cuda:sm_80+sm_90").
    """

    target: str
    features: tuple[str, ...]
    library: str
    weights: Mapping[str, tuple[str, ...]]
    kernels: Mapping[str, KernelInfo] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return any(feature.startswith(gpu.PREFIX) for feature in self.features)


@dataclass(frozen=True)
class Manifest:
    """`files`: member -> {"sha256", "bytes"}, of weights also the "header"'s sha256; `tensors`: weight -> sha256."""

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
    """Read and validate every field; raises ArtifactError naming what is damaged or of another format."""
    try:
        data = json.loads(text)
        version = _format(data)
        manifest = Manifest(
            name=_string(data["name"]),
            entries=_mapping(data["entries"], _entry),
            variants=_list(data["variants"], _variant),
            tools=_mapping(data["tools"], _string),
            passes=_list(data["passes"], lambda item: _mapping(item, _anything)),
            files=_mapping(data["files"], _file),
            tensors=_mapping(data["tensors"], _hash),
            format=version,
        )
        _check_whole(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = f"{e.args[0]} is missing" if isinstance(e, KeyError) else str(e) or type(e).__name__
        raise ArtifactError(f"{MANIFEST} is damaged ({reason}); get the artifact again or compile it again") from e
    return manifest


def _format(data: Any) -> str:
    version = _string(data["format"])
    if version.split(".")[0] != FORMAT.split(".")[0]:
        raise ArtifactError(
            f"the artifact has format {version[:20]} and this graphopt reads {FORMAT}; "
            "install a graphopt that reads it or compile again"
        )
    return version


def _check_whole(manifest: Manifest) -> None:
    if not manifest.entries or not manifest.variants:
        raise ValueError("no entry or no variant")
    if WEIGHTS not in manifest.files:
        raise ValueError(f"files lacks {WEIGHTS}")
    for name in (f"state.{item.name}" for entry in manifest.entries.values() for item in entry.returned):
        if name not in manifest.tensors:
            raise ValueError(f"tensors lacks {name}")
    for entry in manifest.entries.values():
        _check_exits(entry, manifest.entries)
    for variant in manifest.variants:
        if variant.library not in manifest.files:
            raise ValueError(f"files lacks {variant.library}")
        if set(variant.weights) != {name for name, entry in manifest.entries.items() if not entry.stages}:
            raise ValueError(f"variant {variant.target} has other entries than the manifest")
        unknown = {name for names in variant.weights.values() for name in names} - set(manifest.tensors)
        if unknown:
            raise ValueError(f"tensors lacks {min(unknown)}")


def _check_exits(entry: Entry, entries: Mapping[str, Entry]) -> None:
    if entry.exits is not None and entry.exits not in (item.name for item in entry.outputs):
        raise ValueError(f"no output is called {entry.exits[:40]!r}")
    if unknown := set(entry.stages) - set(entries):
        raise ValueError(f"entries lacks {min(unknown)}")
    if any(entries[name].stages for name in entry.stages):
        raise ValueError("a stage has stages")
    if entry.stages and (entry.rows is None or entry.exits != entry.outputs[-1].name or entry.state):
        raise ValueError("an entry with stages has no rows, exits that are not its last output, or state")
    known = {item.name for item in entry.inputs}
    for name in entry.stages:
        if not known >= {item.name for item in entries[name].inputs}:
            raise ValueError(f"stage {name} reads what none before it gives")
        own = [(item.name, item.dtype) for item in entries[name].outputs]
        answers = [(item.name, item.dtype) for item in entry.outputs[:-1]]
        flags = own[len(answers) : len(answers) + 1]
        if own[: len(answers)] != answers or (name != entry.stages[-1] and [kind for _, kind in flags] != ["bool"]):
            raise ValueError(f"stage {name} does not give answers and flags")
        known |= {item.name for item in entries[name].outputs}


def _anything(value: Any) -> Any:
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} should be a string")
    return value


def _mapping(value: Any, convert: Callable[[Any], T]) -> dict[str, T]:
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:40]!r} should be an object")
    return {name: convert(item) for name, item in value.items()}


def _list(value: Any, convert: Callable[[Any], T]) -> tuple[T, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{str(value)[:40]!r} should be a list")
    return tuple(convert(item) for item in value)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{str(value)[:40]!r} should be a whole number")
    return value


def _hash(value: Any) -> str:
    if not re.fullmatch("[0-9a-f]{64}", _string(value)):
        raise ValueError(f"{value[:80]!r} should be a sha256")
    return str(value)


def _file(data: Any) -> Mapping[str, Any]:
    found: dict[str, Any] = {"sha256": _hash(data["sha256"]), "bytes": _count(data["bytes"])}
    return found | {"header": _hash(data["header"])} if "header" in data else found


def _size(value: Any) -> int | str:
    return value if isinstance(value, str) else _count(value)


def _tensors(items: Any) -> tuple[TensorInfo, ...]:
    found = _list(items, _tensor)
    if len({item.name for item in found}) != len(found):
        raise ValueError("two tensors of one entry have the same name")
    return found


def _tensor(item: Any) -> TensorInfo:
    shape = _list(item["shape"], _size)
    bound = None if item.get("bound") is None else _list(item["bound"], _number)
    if bound is not None and (any(isinstance(size, str) for size in shape) or math.prod(shape) != len(bound)):
        raise ValueError(f"{str(item['name'])[:40]!r} is bound to a value of another shape")
    return TensorInfo(_string(item["name"]), _string(item["dtype"]), shape, bound)


def _number(value: Any) -> bool | int | float:
    if not isinstance(value, bool | int | float):
        raise ValueError(f"{str(value)[:40]!r} should be a number or a truth value")
    return value


def _bounds(data: Any) -> Bounds:
    bounds = Bounds(_count(data["low"]), None if data["high"] is None else _count(data["high"]))
    if bounds.high is not None and bounds.high < bounds.low:
        raise ValueError(f"a size cannot be from {bounds.low} to {bounds.high}")
    return bounds


def _entry(data: Any) -> Entry:
    sizes = _mapping(data["sizes"], _bounds)
    exits, rows = (None if data.get(name) is None else _string(data[name]) for name in ("exits", "rows"))
    stages = _list(data.get("stages", []), _string)
    inputs, outputs, state = (_tensors(data[name]) for name in ("inputs", "outputs", "state"))
    written = _list(data.get("written", []), _string)
    if unknown := set(written) - {item.name for item in state}:
        raise ValueError(f"no state is called {min(unknown)[:40]!r}")
    return Entry(inputs, outputs, state, sizes, exits, stages, rows, written)


def _scalar(value: Any) -> bool | int | float | str:
    if not isinstance(value, bool | int | float | str):
        raise ValueError(f"{str(value)[:40]!r} should be a number, a string or a truth value")
    return value


def _kernel(data: Any) -> KernelInfo:
    flops, total, weights = (
        None if data[name] is None else _size(data[name]) for name in ("flops", "bytes", "weight_bytes")
    )
    nodes = _mapping(data["nodes"], lambda names: _list(names, _string))
    return KernelInfo(_string(data["rule"]), _mapping(data["configuration"], _scalar), flops, total, weights, nodes)


def _variant(data: Any) -> Variant:
    weights = _mapping(data["weights"], lambda names: _list(names, _string))
    features, kernels = _list(data["features"], _string), _mapping(data["kernels"], _kernel)
    return Variant(_string(data["target"]), features, _string(data["library"]), weights, kernels)
