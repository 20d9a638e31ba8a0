"""Makes a `.pt2` that torch may load of one that nobody vouches for: no pickle, no custom object, a checked graph."""

from __future__ import annotations

import io
import json
import math
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import CaptureError
from graphopt.untrusted.limits import Limits
from graphopt.untrusted.pt2_graph import clean_graph

CLEAN, SAMPLES = "clean.pt2", "samples.pt"
_SIDECAR = "extra/graphopt.json"
_SAVE_AGAIN = "save it again with torch.export.save of this torch version"
_PAYLOAD = re.compile(r"(?:weight|tensor)_\d+", re.ASCII)
_CHUNK = 1 << 22
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError)
_ITEM_BYTES = {3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 13: 2, 28: 2}  # torch's numbers of types
_PLAIN_GLOBALS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(?:tensor_v2|parameter)|torch \w+Storage")


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


def clean_file(path: Path, folder: Path, limits: Limits) -> dict[str, Any]:
    """Write `CLEAN`, and `SAMPLES` where its inputs hold plain tensors only, into `folder`.

    Returns {"inputs": names, "outputs": names, "sidecar": JSON value or None}. Raises CaptureError and OSError.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return _clean(_open(file, limits), folder)
    except CaptureError as error:
        raise CaptureError(f"{path}: {error}") from error
    except _DAMAGED as error:
        raise CaptureError(f"{path} is no .pt2 file, or a truncated or damaged one; {_SAVE_AGAIN}") from error


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


def _clean(archive: _Archive, folder: Path) -> dict[str, Any]:
    names = [m.removeprefix("models/").removesuffix(".json") for m in archive.members if m.startswith("models/")]
    if any(member.startswith("data/aotinductor/") for member in archive.members):
        raise CaptureError("it holds compiled code (AOTInductor); give the .pt2 that torch.export.save wrote")
    if len(names) != 1:
        raise CaptureError(f"it holds {len(names)} models; save one model a file")
    name = names[0]
    graph, inputs, outputs = clean_graph(archive.read(f"models/{name}.json"), archive.limits)
    kept = {f"models/{name}.json": json.dumps(graph).encode(), f"data/sample_inputs/{name}.pt": b""}
    del graph
    payloads: set[str] = set()
    spare = archive.limits.max_constant_bytes
    for kind in ("weights", "constants"):
        config = archive.read_json(f"data/{kind}/{name}_{kind}_config.json")
        for target, entry in _entries(config, kind):
            member = _payload(target, entry, kind, archive)
            spare -= _described_only(target, entry, kind, archive.members[member].file_size)
            if spare < 0:
                raise CaptureError(
                    f"{kind}: {target!r} describes more bytes than the file holds, over the limit; "
                    "raise Limits.max_constant_bytes"
                )
            payloads.add(member)
        kept[f"data/{kind}/{name}_{kind}_config.json"] = json.dumps(config).encode()
    for member in ("archive_format", "archive_version", "byteorder", ".data/version"):
        if member in archive.members:
            kept[member] = archive.read(member)
    _write(folder / CLEAN, archive, kept, payloads)
    _keep_samples(folder / SAMPLES, archive, f"data/sample_inputs/{name}.pt")
    sidecar = archive.read_json(_SIDECAR) if _SIDECAR in archive.members else None
    return {"inputs": inputs, "outputs": outputs, "sidecar": sidecar}


def _entries(config: Any, kind: str) -> list[tuple[str, Any]]:
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise CaptureError(f"the list of {kind} is damaged; {_SAVE_AGAIN}")
    return list(config["config"].items())


def _payload(target: str, entry: Any, kind: str, archive: _Archive) -> str:
    """The member that holds the raw bytes of one weight or constant."""
    if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
        raise CaptureError(f"{kind}: {target!r} is stored as a pickle, which can run code; {_SAVE_AGAIN}")
    member = entry.get("path_name")
    if not isinstance(member, str) or not _PAYLOAD.fullmatch(member):
        raise CaptureError(f"{kind}: {target!r} is a custom object; only tensors can be read safely")
    path = f"data/{kind}/{member}"
    if path not in archive.members:
        raise CaptureError(f"{kind}: the data of {target!r} is missing; {_SAVE_AGAIN}")
    return path


def _described_only(target: str, entry: Any, kind: str, held: int) -> int:
    """Bytes that the tensor has when it is written out and the file does not hold: an expanded weight has them."""
    meta = entry.get("tensor_meta") or {}
    lists = [meta.get("sizes", []), meta.get("strides", []), [meta.get("storage_offset", {"as_int": 0})]]
    for number in (item for part in lists for item in (part if isinstance(part, list) else [None])):
        size = number.get("as_int") if isinstance(number, dict) else None
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise CaptureError(f"{kind}: {target!r} has no plain size; {_SAVE_AGAIN}")
    elements: int = math.prod(size["as_int"] for size in lists[0])
    dtype = meta.get("dtype")
    item_bytes: int = _ITEM_BYTES.get(dtype, 1) if isinstance(dtype, int) else 1
    return max(0, elements * item_bytes - held)


def _write(path: Path, archive: _Archive, kept: Mapping[str, bytes], payloads: set[str]) -> None:
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


def _keep_samples(path: Path, archive: _Archive, member: str) -> None:
    """Copy the sample inputs where they are plain tensors; examples are drawn where they are not."""
    if member not in archive.members or not 0 < archive.members[member].file_size <= archive.limits.max_graph_bytes:
        return
    content = archive.read(member)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as inner:
            infos = inner.infolist()
            if sum(info.file_size for info in infos) > archive.limits.max_graph_bytes:
                return
            pickles = [inner.read(info) for info in infos if info.filename.endswith(".pkl")]
            if all(map(_makes_tensors_only, pickles)):
                path.write_bytes(content)
    except _DAMAGED:
        return


def _makes_tensors_only(pickled: bytes) -> bool:
    """Whether a pickle names no class or function but those that tensors in tuples, lists and dicts need."""
    for code, argument, _ in pickletools.genops(pickled):
        if code.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            return False
        if code.name == "GLOBAL" and not _PLAIN_GLOBALS.fullmatch(str(argument)):
            return False
    return True
