"""Artifacts that are damaged, foreign, or for another machine: one clear line each, before native code is opened."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.errors import ArtifactError, UsageError
from graphopt.runtime import InferenceSession, features, library, loading
from graphopt.runtime.archive import open_archive


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Libraries opened in the course of a test; opening them is what the checks come before."""
    opened: list[str] = []
    open_library = library.open_library

    def note(name: str, data: bytes, sha256: str) -> Any:
        opened.append(name)
        return open_library(name, data, sha256)

    monkeypatch.setattr(loading, "open_library", note)
    return opened


def refuse(path: Path | str, words: str, opened: list[str], **options: Any) -> None:
    with pytest.raises(ArtifactError, match=words) as caught:
        InferenceSession(path, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert opened == []


def member_span(artifact: Path, name: str) -> tuple[int, int]:
    whole = artifact.read_bytes()
    with zipfile.ZipFile(artifact) as found:
        item = found.getinfo(name)
    name_length, extra_length = (
        int.from_bytes(whole[item.header_offset + at : item.header_offset + at + 2], "little") for at in (26, 28)
    )
    start = item.header_offset + 30 + name_length + extra_length
    return start, start + item.file_size


def flipped(artifact: Path, position: int, target: Path) -> Path:
    data = bytearray(artifact.read_bytes())
    data[position] ^= 0x10
    target.write_bytes(data)
    return target


def test_an_unharmed_artifact_opens(artifact: Path, closed: list[str]) -> None:
    InferenceSession(artifact)
    assert closed == ["lib/cpu.so"]


@pytest.mark.parametrize("share", [k / 20 for k in range(20)] + [0.999, 0.99999])
def test_truncated(artifact: Path, tmp_path: Path, closed: list[str], share: float) -> None:
    data = artifact.read_bytes()
    path = tmp_path / "short.gopt"
    path.write_bytes(data[: int(len(data) * share)])
    refuse(path, "is truncated|is empty", closed)


@pytest.mark.parametrize("name", ["lib/cpu.so", "check.safetensors", "report.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_flipped_bit_in_a_member(artifact: Path, tmp_path: Path, closed: list[str], name: str, share: float) -> None:
    start, end = member_span(artifact, name)
    path = flipped(artifact, start + int((end - start) * share), tmp_path / "flipped.gopt")
    refuse(path, f"member {re.escape(name)} of .* was altered: its sha256 is not the manifest's; get it again", closed)


def test_a_flipped_bit_in_the_weights_names_the_tensor(artifact: Path, tmp_path: Path, closed: list[str]) -> None:
    start, _ = member_span(artifact, "weights.safetensors")
    data = artifact.read_bytes()
    place = data.index(np.arange(8, dtype=np.float32).tobytes(), start) + 6
    path = flipped(artifact, place, tmp_path / "flipped.gopt")
    refuse(path, r"member weights\.safetensors, tensor w, of .* was altered", closed)
    session = InferenceSession(path, verify="code")  # leaves weights unread
    assert session.entries == tuple(sorted(session.entries))


def test_code_mode_checks_what_compiled_code_trusts_of_weights(
    artifact: Path, tmp_path: Path, closed: list[str]
) -> None:
    start, _ = member_span(artifact, "weights.safetensors")
    data = artifact.read_bytes()
    place = data.index(b'"shape":[8]', start) + len(b'"shape":[')
    changed = tmp_path / "changed.gopt"
    changed.write_bytes(data[:place] + b"4" + data[place + 1 :])
    for mode in ("code", "full"):
        with pytest.raises(ArtifactError):
            InferenceSession(changed, verify=mode)
    swapped = data.index(b'"F32"', start)
    changed.write_bytes(data[:swapped] + b'"I32"' + data[swapped + 5 :])
    refuse(changed, "the header of weights.safetensors in .* was altered", closed, verify="code")


def test_code_mode_still_checks_the_library(artifact: Path, tmp_path: Path, closed: list[str]) -> None:
    start, _ = member_span(artifact, "lib/cpu.so")
    path = flipped(artifact, start + 1000, tmp_path / "flipped.gopt")
    refuse(path, "member lib/cpu.so of .* was altered", closed, verify="code")


def test_a_flipped_bit_in_the_manifest(artifact: Path, tmp_path: Path, closed: list[str]) -> None:
    start, end = member_span(artifact, "manifest.json")
    for place in range(start, end, 97):
        path = flipped(artifact, place, tmp_path / "flipped.gopt")
        refuse(path, r"is altered: manifest\.json has another checksum", closed)


def test_a_flipped_bit_in_the_directory_never_crashes(artifact: Path, tmp_path: Path) -> None:
    data = artifact.read_bytes()
    start = data.index(b"PK\1\2")
    for place in range(start, len(data)):
        path = flipped(artifact, place, tmp_path / "flipped.gopt")
        try:
            members = open_archive(path).members
        except ArtifactError as e:
            assert str(path) in str(e)
        else:
            assert all(len(member) <= len(data) for member in members.values())


def test_what_is_no_artifact(tmp_path: Path, closed: list[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07onnx" * 100)
    refuse(tmp_path / "model.onnx", "is no artifact; make one with `graphopt compile`", closed)
    refuse(tmp_path / "missing.gopt", r"cannot open .*missing\.gopt: No such file or directory", closed)
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", r"is no artifact: there is no manifest\.json in it", closed)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("readme", "text")
    refuse(tmp_path / "other.zip", r"is no artifact: there is no manifest\.json in it", closed)


def test_a_repacked_zip(artifact: Path, tmp_path: Path, closed: list[str]) -> None:
    for method, words in (
        (zipfile.ZIP_DEFLATED, "has a compressed or encrypted member"),
        (zipfile.ZIP_STORED, "is not at a multiple of 64 bytes: the artifact was repacked"),
    ):
        path = tmp_path / f"{method}.gopt"
        with zipfile.ZipFile(artifact) as source, zipfile.ZipFile(path, "w", method) as target:
            target.writestr("a", b"a" * 7)
            for item in source.infolist():
                target.writestr(item.filename, source.read(item))
        refuse(path, words, closed)


@pytest.mark.parametrize("name", ["../up", "/root", "a/../../b"])
def test_members_that_would_escape(tmp_path: Path, closed: list[str], name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.gopt", "w") as file:
        file.writestr(name, "x")
    refuse(tmp_path / "a.gopt", "is altered: it has a member named", closed)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(tmp_path: Path, closed: list[str]) -> None:
    with zipfile.ZipFile(tmp_path / "a.gopt", "w") as file:
        file.writestr("manifest.json", "{}")
        file.writestr("manifest.json", "{}")
    refuse(tmp_path / "a.gopt", r"is altered: it has two members named manifest\.json", closed)


def test_a_folder_with_a_missing_short_or_altered_member(parts: Any, tmp_path: Path, closed: list[str]) -> None:
    for name, change, words in (
        ("lib/cpu.so", os.remove, "has no member lib/cpu.so; it is incomplete"),
        ("weights.safetensors", lambda path: os.truncate(path, 100), "has 100 bytes instead of [0-9]+"),
        ("report.json", lambda path: path.write_text(path.read_text().replace("g", "h")), "was altered"),
        ("manifest.json", lambda path: path.write_text("{}"), r"manifest\.json is damaged \(format is missing\)"),
    ):
        folder = parts.write(f"{tmp_path}/folder/")
        change(folder / name)
        refuse(folder, words, closed)
        shutil.rmtree(folder)


def test_a_manifest_that_points_outside(parts: Any, tmp_path: Path, closed: list[str]) -> None:
    folder = parts.write(f"{tmp_path}/folder/")
    text = (folder / "manifest.json").read_text().replace("lib/cpu.so", "../cpu.so")
    (folder / "manifest.json").write_text(text)
    refuse(folder, "'../cpu.so' cannot name a member", closed)


def test_another_major_format(parts: Any, tmp_path: Path, closed: list[str]) -> None:
    folder = parts.write(f"{tmp_path}/folder/")
    data = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({"format": "2.0", "everything": "else"}))
    refuse(folder, "the artifact has format 2.0 and this graphopt reads 1.0; install a graphopt that reads it", closed)
    (folder / "manifest.json").write_text(json.dumps(data | {"format": "1.9"}))
    InferenceSession(folder)


def test_another_cpu(parts: Any, tmp_path: Path, closed: list[str]) -> None:
    (variant,) = parts.manifest.variants
    other = replace(variant, target="cpu:next", features=("x86_64", "avx4096", "warp"))
    path = parts.write(tmp_path / "a.gopt", manifest=replace(parts.manifest, variants=(other,)))
    refuse(path, r"cpu:next needs .*avx4096, warp, which this machine lacks; compile with target=\.\.\.", closed)
    parts.write(path, manifest=replace(parts.manifest, variants=(other, variant)))
    assert InferenceSession(path)._model.variant.target == "cpu"


def test_the_architecture_is_a_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "host_features", lambda: frozenset({"aarch64", "asimd"}))
    assert features.missing(("x86_64", "avx2", "asimd")) == ("x86_64", "avx2")
    assert features.missing(()) == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2\nmodel\t: x\nprocessor\t: 1\nflags\t\t: fpu avx2 amx\n", {"fpu", "avx2"}),
        ("processor\t: 0\nFeatures\t: fp asimd\n", {"fp", "asimd"}),
        ("processor\t: 0\n", set()),
    ],
)
def test_cpu_flags_are_those_of_all_processors(text: str, expected: set[str]) -> None:
    assert features.read_features(text) == expected


def test_verify_is_one_of_two_words(artifact: Path) -> None:
    with pytest.raises(UsageError, match="verify is 'none'; write 'full' or 'code'"):
        InferenceSession(artifact, verify="none")  # type: ignore[arg-type]


def test_a_library_that_is_no_library(parts: Any, tmp_path: Path) -> None:
    path = parts.write(tmp_path / "a.gopt", libraries={"lib/cpu.so": b"not ELF"})
    with pytest.raises(ArtifactError, match=r"library lib/cpu\.so cannot be opened on this machine: .*"):
        InferenceSession(path)


def test_a_library_that_holds_no_model(parts: Any, tmp_path: Path) -> None:
    other = Path(np.linalg._umath_linalg.__file__).read_bytes()
    path = parts.write(tmp_path / "a.gopt", libraries={"lib/cpu.so": other})
    with pytest.raises(ArtifactError, match=r"library lib/cpu\.so holds no compiled model"):
        InferenceSession(path)


def test_a_library_without_the_entry(parts: Any, tmp_path: Path) -> None:
    entries = {"other": parts.manifest.entries["main"]}
    variants = (replace(parts.manifest.variants[0], weights={"other": ("w", "b")}),)
    path = parts.write(tmp_path / "a.gopt", manifest=replace(parts.manifest, entries=entries, variants=variants))
    with pytest.raises(ArtifactError, match=r"library lib/cpu\.so has no function 'other'"):
        InferenceSession(path)
