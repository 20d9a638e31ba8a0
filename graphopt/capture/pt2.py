"""Reads a `.pt2` without running anything in it.

`torch.export.load` unpickles whatever a `.pt2` holds. This reader opens the zip itself, refuses pickled weights and
objects, checks the graph (see `pt2_graph`), and gives torch a cleaned copy that holds no pickle at all.
"""

from __future__ import annotations

import errno
import io
import json
import pickle
import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from graphopt.capture.exported import Known
from graphopt.capture.limits import Limits
from graphopt.capture.pt2_graph import clean_graph
from graphopt.capture.quiet import quiet
from graphopt.capture.sidecar import SIDECAR, read_sidecar
from graphopt.errors import CaptureError

_SAVE_AGAIN = "save it again with torch.export.save of this torch version"
_PAYLOAD = re.compile(r"(?:weight|tensor)_\d+", re.ASCII)
_CHUNK = 1 << 22
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_UNREADABLE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    AttributeError,
)


@dataclass(frozen=True)
class _Archive:
    """Members by their path below the archive's top folder."""

    file: zipfile.ZipFile
    members: Mapping[str, zipfile.ZipInfo]
    limits: Limits

    def read(self, path: str) -> bytes:
        if path not in self.members:
            raise CaptureError(f"not a .pt2 model: {path} is missing; {_SAVE_AGAIN}")
        info = self.members[path]
        if info.file_size > self.limits.max_graph_bytes:
            raise CaptureError(f"{path} has {info.file_size} bytes, over the limit; raise Limits.max_graph_bytes")
        return self.file.read(info)

    def read_json(self, path: str) -> Any:
        try:
            return json.loads(self.read(path))
        except (ValueError, RecursionError) as error:
            raise CaptureError(f"{path} in the .pt2 is damaged; {_SAVE_AGAIN}") from error


def read_pt2(path: Path, limits: Limits) -> tuple[ExportedProgram, Known]:
    """The exported program in a `.pt2` file and the names that it holds. Raises CaptureError."""
    if not path.is_file():
        raise CaptureError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; give the path of a .pt2 file")
    try:
        with zipfile.ZipFile(path) as file:
            return _read(_open(file, limits))
    except CaptureError as error:
        raise CaptureError(f"{path}: {error}") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise CaptureError(f"{path} is no .pt2 file, or a truncated or damaged one; {_SAVE_AGAIN}") from error
    except OSError as error:
        raise CaptureError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(file: zipfile.ZipFile, limits: Limits) -> _Archive:
    infos = file.infolist()
    if len(infos) > limits.max_members:
        raise CaptureError(f"{len(infos)} members are over the limit; raise Limits.max_members")
    if sum(info.file_size for info in infos) > limits.max_bytes:
        raise CaptureError("its uncompressed size is over the limit; raise Limits.max_bytes")
    members: dict[str, zipfile.ZipInfo] = {}
    tops = set()
    for info in infos:
        parts = info.filename.split("/")
        if ".." in parts or info.filename.startswith("/") or "\\" in info.filename or ":" in info.filename:
            raise CaptureError(f"the member name {info.filename[:60]!r} leads out of the archive")
        tops.add(parts[0])
        name = "/".join(parts[1:])
        if name in members:
            raise CaptureError(f"two members are called {name!r}")
        members[name] = info
    if len(tops) != 1:
        raise CaptureError("not a .pt2 model: its members are not in one folder")
    archive = _Archive(file, members, limits)
    if "archive_format" not in members or archive.read("archive_format").strip() != b"pt2":
        raise CaptureError(f"not a .pt2 model; {_SAVE_AGAIN}")
    return archive


def _read(archive: _Archive) -> tuple[ExportedProgram, Known]:
    names = [m.removeprefix("models/").removesuffix(".json") for m in archive.members if m.startswith("models/")]
    if any(member.startswith("data/aotinductor/") for member in archive.members):
        raise CaptureError("it holds compiled code (AOTInductor); give the .pt2 that torch.export.save wrote")
    if len(names) != 1:
        raise CaptureError(f"it holds {len(names)} models; save one model a file")
    name = names[0]
    graph, inputs, outputs = clean_graph(archive.read(f"models/{name}.json"))
    kept = {f"models/{name}.json": json.dumps(graph).encode(), f"data/sample_inputs/{name}.pt": b""}
    payloads: set[str] = set()
    for kind in ("weights", "constants"):
        config = archive.read_json(f"data/{kind}/{name}_{kind}_config.json")
        payloads |= {f"data/{kind}/{member}" for member in _check_payloads(config, kind, archive)}
        kept[f"data/{kind}/{name}_{kind}_config.json"] = json.dumps(config).encode()
    for member in ("archive_format", "archive_version", "byteorder", ".data/version"):
        if member in archive.members:
            kept[member] = archive.read(member)
    exported = _load_clean(archive, kept, payloads)
    examples = _sample_inputs(archive, name)
    known = Known(inputs=inputs, outputs=outputs, examples=examples)
    extra = f"extra/{SIDECAR}"
    if extra in archive.members:
        known = read_sidecar(archive.read_json(extra), exported, known)
    return exported, known


def _check_payloads(config: Any, kind: str, archive: _Archive) -> set[str]:
    """File names of the raw tensors that a weights or constants configuration lists."""
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise CaptureError(f"the list of {kind} is damaged; {_SAVE_AGAIN}")
    members = set()
    for target, entry in config["config"].items():
        if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
            raise CaptureError(f"{kind}: {target!r} is stored as a pickle, which can run code; {_SAVE_AGAIN}")
        member = entry.get("path_name")
        if not isinstance(member, str) or not _PAYLOAD.fullmatch(member):
            raise CaptureError(f"{kind}: {target!r} is a custom object; only tensors can be read safely")
        if f"data/{kind}/{member}" not in archive.members:
            raise CaptureError(f"{kind}: the data of {target!r} is missing; {_SAVE_AGAIN}")
        meta = entry.get("tensor_meta") or {}
        numbers = [*meta.get("sizes", ()), *meta.get("strides", ()), meta.get("storage_offset", {"as_int": 0})]
        for number in numbers:
            if not isinstance(number, dict) or type(number.get("as_int")) is not int or number["as_int"] < 0:
                raise CaptureError(f"{kind}: {target!r} has no plain size; {_SAVE_AGAIN}")
        members.add(member)
    return members


def _load_clean(archive: _Archive, kept: Mapping[str, bytes], payloads: set[str]) -> ExportedProgram:
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "clean.pt2"
        try:
            _write_clean(path, archive, kept, payloads)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise CaptureError(
                f"the temporary folder {tempfile.gettempdir()} has no room for a copy of it ({error.strerror}); "
                "free space there, or set TMPDIR to another folder"
            ) from error
        try:
            with quiet():
                return torch.export.load(path)
        except Exception as error:
            lines = str(error).strip().splitlines()
            reason = lines[0][:200] if lines else type(error).__name__
            raise CaptureError(f"torch cannot load it ({reason}); {_SAVE_AGAIN}") from error


def _write_clean(path: Path, archive: _Archive, kept: Mapping[str, bytes], payloads: set[str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as clean:
        for member, content in kept.items():
            clean.writestr(f"clean/{member}", content)
        for member in sorted(payloads):
            with (
                archive.file.open(archive.members[member]) as source,
                clean.open(f"clean/{member}", "w", force_zip64=True) as sink,
            ):
                while chunk := source.read(_CHUNK):
                    sink.write(chunk)


def _sample_inputs(archive: _Archive, name: str) -> list[torch.Tensor] | None:
    """The tensors among the sample inputs; None where there are none that load without running code."""
    member = f"data/sample_inputs/{name}.pt"
    if member not in archive.members or archive.members[member].file_size == 0:
        return None
    content = io.BytesIO(archive.read(member))
    try:
        with zipfile.ZipFile(content) as inner:
            if sum(info.file_size for info in inner.infolist()) > archive.limits.max_graph_bytes:
                return None
        content.seek(0)
        with quiet():
            sample = torch.load(content, weights_only=True, map_location="cpu")
    except _UNREADABLE:
        return None  # examples are drawn instead
    leaves = [leaf for leaf in pytree.tree_leaves(sample) if isinstance(leaf, torch.Tensor)]
    return leaves or None
