"""The artifact that is shipped, and what every folder to ship says of itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

from graphopt.artifact.archive import Sink
from graphopt.errors import UsageError
from graphopt.package.libraries import Libraries, download_hint, elf_machine
from graphopt.runtime.archive import Archive, open_archive
from graphopt.runtime.loading import check_files
from graphopt.runtime.manifest import MANIFEST, Manifest, parse

ABOUT, MODEL, KIND = "graphopt-package.json", "model.gopt", "folder made by `graphopt package`"


@dataclass(frozen=True)
class Source:
    """An artifact of which every member was checked; `files`: path below `MODEL`, "" for a zip -> bytes."""

    archive: Archive
    manifest: Manifest
    files: Mapping[str, memoryview]


def open_source(path: str | os.PathLike[str], libraries: Libraries) -> Source:
    """Open and check; raises ArtifactError, or UsageError where no code for a CPU is for the libraries' machine.

    Code for a GPU is taken along; what runs the folder leaves it.
    """
    archive = open_archive(path)
    manifest = parse(bytes(archive.member(MANIFEST)))
    check_files(archive, manifest, manifest.files)
    if not (on_cpu := [variant for variant in manifest.variants if not variant.on_gpu]):
        raise UsageError("the artifact is for a GPU, which the folder to ship has no runtime for; compile it for a CPU")
    machines = sorted({elf_machine(archive.member(variant.library)) for variant in on_cpu})
    if libraries.machine not in machines:
        raise UsageError(
            f"the artifact is for {' and '.join(machines)} and the libraries at hand are for {libraries.machine}; "
            f"run: {download_hint(machines[0])}; then add --wheels wheels"
        )
    return Source(archive, manifest, _files(path, archive, manifest))


def _files(path: str | os.PathLike[str], archive: Archive, manifest: Manifest) -> dict[str, memoryview]:
    if os.path.isdir(path):
        return {f"/{name}": archive.member(name) for name in (MANIFEST, *manifest.files)}
    with open(path, "rb") as file:
        return {"": memoryview(file.read())}


def add_source(sink: Sink, source: Source) -> None:
    """Put the artifact into the folder as `MODEL`."""
    for name, data in source.files.items():
        add(sink, MODEL + name, data)


def add(sink: Sink, name: str, data: bytes | memoryview) -> None:
    """Put a file into the folder."""
    sink.add(name, len(data), [data])


def add_about(sink: Sink, source: Source, libraries: Libraries, **more: str) -> None:
    """`ABOUT`, by which a folder is known as one that may be replaced."""
    about = {
        "model": source.manifest.name,
        "machine": libraries.machine,
        libraries.ffi.name: libraries.ffi.version,
        libraries.tvm.name: libraries.tvm.version,
        **more,
    }
    add(sink, ABOUT, (json.dumps(about, indent=1, sort_keys=True) + "\n").encode())
