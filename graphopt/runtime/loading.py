"""From a path to something that can run: every check happens before native code is opened."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from graphopt.errors import ArtifactError, UsageError
from graphopt.runtime import gpu
from graphopt.runtime.archive import Archive, open_archive
from graphopt.runtime.features import missing
from graphopt.runtime.library import find_function, load_gpu_runtime, open_library
from graphopt.runtime.manifest import CHECK, MANIFEST, REPORT, WEIGHTS, Entry, Manifest, Variant, parse
from graphopt.runtime.sizes import fits
from graphopt.runtime.tensors import copy_to_gpu, to_device, widen
from graphopt.runtime.weights import ALIGNMENT, Stored, header_sha256, read_tensors, state_name

Verify = Literal["full", "code"]
CHECK_MACHINE = "graphopt_check_machine"


@dataclass(frozen=True)
class Model:
    """A verified artifact with its code open. Immutable, so that sessions share it from any thread.

    `tensors` are the weights as tvm_ffi tensors over the mapped file; `constants` are shapes of tensors inside the
    library, which a function might hand out; `addresses` is where the weights are mapped.
    """

    archive: Archive
    manifest: Manifest
    variant: Variant
    library: Any
    tensors: dict[str, Any]
    constants: frozenset[tuple[int, ...]]
    addresses: range
    _gpu: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _copying: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def weight(self, name: str) -> Any:
        """The tensor where the variant's code reads it: on a GPU one copy, which all sessions share."""
        if not self.variant.on_gpu:
            return self.tensors[name]
        with self._copying:
            if name not in self._gpu:
                self._gpu[name] = copy_to_gpu(self.tensors[name])
            return self._gpu[name]

    def samples(self, entry: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The inputs and outputs that were recorded when the artifact was compiled, by name."""
        self._check(CHECK)
        stored = read_tensors(CHECK, self.archive.member(CHECK))
        given, expected = f"{entry}.input.", f"{entry}.output."
        inputs = {name.removeprefix(given): item.array() for name, item in stored.items() if name.startswith(given)}
        outputs = {
            name.removeprefix(expected): widen(item.array(), item.dtype)
            for name, item in stored.items()
            if name.startswith(expected)
        }
        return inputs, outputs

    def report(self) -> Any:
        """What the compiler wrote down."""
        self._check(REPORT)
        return json.loads(bytes(self.archive.member(REPORT)))

    def _check(self, name: str) -> None:
        _check_size(self.archive, self.manifest, name)
        _check_hash(self.archive, self.manifest, name, self.archive.member(name))


def load(path: str | os.PathLike[str], verify: Verify) -> Model:
    """Open an artifact. "full" hashes every member, "code" the library and the report, leaving weights unread.

    Raises ArtifactError when it is no artifact, damaged, of another format or for another machine.
    """
    if verify not in ("full", "code"):
        raise UsageError(f"verify is {verify!r}; write 'full' or 'code'")
    archive = open_archive(path)
    manifest = parse(bytes(archive.member(MANIFEST)))
    runnable = runnable_variants(manifest.variants)
    check_files(archive, manifest, manifest.files if verify == "full" else {REPORT} & set(manifest.files))
    stored = read_tensors(WEIGHTS, archive.member(WEIGHTS))
    _check_header(archive, manifest)
    for variant in runnable:
        _check_tensors(manifest, variant, stored)
    variant, library = _open_best(archive, manifest, runnable)
    tensors = {name: to_device(item.array(), item.dtype) for name, item in _used(manifest, variant, stored)}
    addresses = _addresses(archive.member(WEIGHTS))
    return Model(archive, manifest, variant, library, tensors, _constant_shapes(library), addresses)


def check_files(archive: Archive, manifest: Manifest, hashed: Iterable[str]) -> None:
    """Raises ArtifactError where a member is absent or has another size, or one of `hashed` another sha256."""
    for name in manifest.files:
        _check_size(archive, manifest, name)
    for name in hashed:
        _check_hash(archive, manifest, name, archive.member(name))


def runnable_variants(variants: Iterable[Variant]) -> list[Variant]:
    """Those whose features this machine has all of, the best first; raises ArtifactError naming what is missing."""
    variants, problems, found = tuple(variants), [], []
    for variant in variants:
        lacking = missing(variant.features)
        if not lacking:
            found.append(variant)
        problems.append(f"{variant.target} needs {', '.join(map(_in_words, lacking))}")
    if found:
        return found
    other = "a GPU" if any(variant.on_gpu for variant in variants) else "another CPU"
    raise ArtifactError(
        f"the artifact was compiled for {other}: {'; '.join(problems)}, which this machine lacks; "
        "compile with target=... for this machine, or run it on one that has them"
    )


def _in_words(feature: str) -> str:
    archs = feature.removeprefix(gpu.PREFIX)
    return feature if archs == feature else f"a GPU that runs code for {archs.replace('+', ' or ')}"


def _open_best(archive: Archive, manifest: Manifest, runnable: list[Variant]) -> tuple[Variant, Any]:
    """The first variant that finds all it needs; raises ArtifactError saying what the last one lacks."""
    *better, last = runnable
    for variant in better:
        code = _code(archive, manifest, variant)
        with suppress(ArtifactError):
            return variant, _open(manifest, variant, code)
    return last, _open(manifest, last, _code(archive, manifest, last))


def _code(archive: Archive, manifest: Manifest, variant: Variant) -> bytes:
    """The library's bytes; raises ArtifactError where they were altered, whatever other variants there are."""
    code = bytes(archive.member(variant.library))  # a copy: the file could change between this check and the opening
    _check_hash(archive, manifest, variant.library, code)
    return code


def _open(manifest: Manifest, variant: Variant, code: bytes) -> Any:
    """The library; raises ArtifactError where this machine has not all that it needs."""
    if variant.on_gpu:
        load_gpu_runtime()
    library = open_library(variant.library, code, manifest.files[variant.library]["sha256"])
    _check_machine(library)
    return library


def _check_machine(library: Any) -> None:
    """What the library needs of the machine besides features, if it knows more than its manifest."""
    check = find_function(library, CHECK_MACHINE)
    if check is None:
        return
    try:
        check()
    except Exception as e:
        raise ArtifactError(str(e).strip().splitlines()[0]) from e


def _check_size(archive: Archive, manifest: Manifest, name: str) -> None:
    if name not in manifest.files:
        raise ArtifactError(f"{archive.path} has no {name}; compile it again")
    found, expected = len(archive.member(name)), manifest.files[name]["bytes"]
    if found != expected:
        raise ArtifactError(f"member {name} of {archive.path} has {found} bytes instead of {expected}; get it again")


def _check_hash(archive: Archive, manifest: Manifest, name: str, data: memoryview | bytes) -> None:
    if hashlib.sha256(data).hexdigest() == manifest.files[name]["sha256"]:
        return
    where = f"member {name}"
    if name == WEIGHTS:
        stored = read_tensors(name, memoryview(data))
        wrong = sorted(key for key, item in stored.items() if item.sha256() != manifest.tensors.get(key))
        where += f", tensor {wrong[0]}," if wrong else ""
    raise ArtifactError(f"{where} of {archive.path} was altered: its sha256 is not the manifest's; get it again")


def _check_header(archive: Archive, manifest: Manifest) -> None:
    """Compiled code trusts the dtypes and shapes of weights, so these are checked even where weights stay unread."""
    expected = manifest.files[WEIGHTS].get("header")  # absent where the code itself checks them
    if expected is not None and header_sha256(archive.member(WEIGHTS)) != expected:
        raise ArtifactError(f"the header of {WEIGHTS} in {archive.path} was altered; get the artifact again")


def _addresses(data: memoryview) -> range:
    start: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    return range(start, start + data.nbytes)


def _used(manifest: Manifest, variant: Variant, stored: dict[str, Stored]) -> list[tuple[str, Stored]]:
    names = {name for names in variant.weights.values() for name in names}
    names |= {state_name(item.name) for entry in manifest.entries.values() for item in entry.state}
    return [(name, stored[name]) for name in sorted(names) if name in stored]  # written state may start as zeros


def _check_tensors(manifest: Manifest, variant: Variant, stored: dict[str, Stored]) -> None:
    if set(stored) != set(manifest.tensors):
        odd = min(set(stored) ^ set(manifest.tensors))
        raise ArtifactError(f"{MANIFEST} and {WEIGHTS} disagree on tensor {odd}; get the artifact again")
    for name, item in _used(manifest, variant, stored):
        if _addresses(item.data).start % ALIGNMENT and item.data.nbytes:
            raise ArtifactError(f"tensor {name} is not at a multiple of {ALIGNMENT} bytes: the artifact was repacked")
    for entry in manifest.entries.values():
        _check_state(entry, stored)


def _check_state(entry: Entry, stored: dict[str, Stored]) -> None:
    for item in entry.state:
        initial = stored.get(state_name(item.name))
        if initial is None and all(isinstance(size, int) for size in item.shape):
            continue
        if initial is None or initial.dtype != item.dtype or not fits(initial.shape, item.shape):
            raise ArtifactError(f"{MANIFEST} and {WEIGHTS} disagree on state {item.name}; get the artifact again")


def _constant_shapes(library: Any) -> frozenset[tuple[int, ...]]:
    """Shapes of the tensors in the VM's constant pool; its text form is the only way to ask.

    A tensor stands there as its shape alone, [7, 5]; a shape as shapetuple[7, 5], and texts may hold param[0].
    """
    pool = next((line for line in str(library["stats"]()).splitlines() if "Constant pool" in line), "")
    shapes = re.findall(r"(?:(?<=, )|(?<=: \[))\[((?:\d+(?:, ?\d+)*)?)\]", pool)
    return frozenset(tuple(int(size) for size in shape.split(",") if size.strip()) for shape in shapes)
