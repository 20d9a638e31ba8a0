"""`write_artifact`: the one place that puts manifest, libraries, weights, samples and report together."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from graphopt.artifact.archive import Sink, create
from graphopt.artifact.safetensors import lay_out
from graphopt.errors import ArtifactError, UnknownNameError
from graphopt.runtime.archive import check_name
from graphopt.runtime.dtypes import name_of
from graphopt.runtime.manifest import CHECK, MANIFEST, REPORT, WEIGHTS, Manifest, parse
from graphopt.runtime.sizes import fits
from graphopt.runtime.weights import state_name


def write_artifact(
    path: str | os.PathLike[str],
    manifest: Manifest,
    libraries: Mapping[str, bytes],
    weights: Mapping[str, np.ndarray],
    check: Mapping[str, np.ndarray],
    report: Mapping[str, Any],
) -> None:
    """Write an artifact at `path` (a folder if it ends in "/"), filling in the manifest's `files` and `tensors`.

    Equal arguments give equal bytes. `check` holds "<entry>.input.<name>" and "<entry>.output.<name>". Raises
    WriteError when the disk refuses (nothing half-written stays) and ArtifactError when the parts do not fit together.
    """
    _check_parts(manifest, libraries, weights)
    files: dict[str, Mapping[str, Any]] = {}
    with create(path) as sink:
        for name in sorted(libraries):
            _add(sink, files, name, libraries[name])
        stored = lay_out(weights)
        digest = sink.add(WEIGHTS, stored.size, stored.chunks())
        files[WEIGHTS] = {"sha256": digest, "bytes": stored.size, "header": stored.header_sha256}
        samples = lay_out(check)
        files[CHECK] = {"sha256": sink.add(CHECK, samples.size, samples.chunks()), "bytes": samples.size}
        _add(sink, files, REPORT, (json.dumps(report, indent=1, sort_keys=True) + "\n").encode())
        text = replace(manifest, files=files, tensors=stored.sha256).to_json().encode()
        parse(text)  # what is written must be readable
        sink.add(MANIFEST, len(text), [text])


def _add(sink: Sink, files: dict[str, Mapping[str, Any]], name: str, data: bytes) -> None:
    files[name] = {"sha256": sink.add(name, len(data), [data]), "bytes": len(data)}


def _check_parts(manifest: Manifest, libraries: Mapping[str, bytes], weights: Mapping[str, np.ndarray]) -> None:
    for name in libraries:
        check_name(name)
        if name in (MANIFEST, WEIGHTS, CHECK, REPORT):
            raise ArtifactError(f"a library cannot be named {name}; name it lib/<target>.so")
    for variant in manifest.variants:
        if variant.library not in libraries:
            raise UnknownNameError("library", variant.library, libraries)
        for name in (name for names in variant.weights.values() for name in names):
            if name not in weights:
                raise UnknownNameError("weight", name, weights)
    _check_state(manifest, weights)


def _check_state(manifest: Manifest, weights: Mapping[str, np.ndarray]) -> None:
    for entry in manifest.entries.values():
        for item in entry.state:
            initial = weights.get(state_name(item.name))
            if initial is None and item.name in entry.written:
                continue
            if initial is None:
                raise UnknownNameError("initial state", state_name(item.name), weights)
            if name_of(initial.dtype) != item.dtype or not fits(initial.shape, item.shape):
                found, expected = f"{initial.dtype} {list(initial.shape)}", f"{item.dtype} {list(item.shape)}"
                raise ArtifactError(f"the initial value of state {item.name} is {found}, the manifest says {expected}")
