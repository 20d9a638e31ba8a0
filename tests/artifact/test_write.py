from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graphopt.artifact.write import write_artifact
from graphopt.errors import ArtifactError, UnknownNameError
from graphopt.runtime.archive import open_archive
from graphopt.runtime.manifest import Bounds, Entry, KernelInfo, Manifest, TensorInfo, Variant, parse

X = TensorInfo("x", "float32", ("n", 2))
ENTRY = Entry((X,), (X,), (TensorInfo("total", "float32", (2,)),), {"n": Bounds(1, 8)})
KERNELS = {
    "gemm": KernelInfo("packed-gemm", {"rows": 8, "split": "rows"}, "2*n", "8*n + 4", 4, {"main": ("linear", "relu")}),
    "odd": KernelInfo("generic"),
}
MANIFEST = Manifest("tiny", {"main": ENTRY}, (Variant("cpu", ("avx2",), "lib/cpu.so", {"main": ("w",)}, KERNELS),))
LIBRARIES = {"lib/cpu.so": b"\x7fELF"}
WEIGHTS = {"w": np.ones(3, np.float32), "state.total": np.zeros(2, np.float32)}


def write(path: Path | str, manifest: Manifest = MANIFEST, weights: dict[str, np.ndarray] = WEIGHTS) -> None:
    write_artifact(path, manifest, LIBRARIES, weights, {"main.input.x": np.ones((1, 2), np.float32)}, {"b": 1, "a": 2})


def test_the_manifest_lists_every_file_and_tensor(tmp_path: Path) -> None:
    write(tmp_path / "a.gopt")
    archive = open_archive(tmp_path / "a.gopt")
    manifest = parse(bytes(archive.member("manifest.json")))
    assert set(manifest.files) == set(archive.members) - {"manifest.json"}
    for name, item in manifest.files.items():
        data = archive.member(name)
        assert (item["sha256"], item["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    weights = archive.member("weights.safetensors")
    header = weights[: 8 + int.from_bytes(weights[:8], "little")]
    assert manifest.files["weights.safetensors"]["header"] == hashlib.sha256(header).hexdigest()
    assert manifest.tensors["w"] == hashlib.sha256(WEIGHTS["w"].tobytes()).hexdigest()
    assert replace(manifest, files={}, tensors={}) == MANIFEST


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.gopt")
    write(tmp_path / "b.gopt", weights=dict(reversed(WEIGHTS.items())))
    assert (tmp_path / "a.gopt").read_bytes() == (tmp_path / "b.gopt").read_bytes()


def test_a_folder_holds_the_same_members(tmp_path: Path) -> None:
    write(tmp_path / "a.gopt")
    write(f"{tmp_path}/a/")
    for name, data in open_archive(tmp_path / "a.gopt").members.items():
        assert (tmp_path / "a" / name).read_bytes() == data


def test_parts_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    variant = MANIFEST.variants[0]
    with pytest.raises(UnknownNameError, match=r"unknown library 'lib/gpu.so'; did you mean 'lib/cpu.so'\?"):
        write(tmp_path / "a", replace(MANIFEST, variants=(replace(variant, library="lib/gpu.so"),)))
    with pytest.raises(UnknownNameError, match="unknown weight 'v'"):
        write(tmp_path / "a", replace(MANIFEST, variants=(replace(variant, weights={"main": ("v",)}),)))
    with pytest.raises(UnknownNameError, match=r"unknown initial state 'state\.total'"):
        write(tmp_path / "a", weights={"w": WEIGHTS["w"]})
    with pytest.raises(ArtifactError, match=r"state total is float32 \[3\], the manifest says float32 \[2\]"):
        write(tmp_path / "a", weights={**WEIGHTS, "state.total": np.zeros(3, np.float32)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("format",), "2.0", "the artifact has format 2.0 and this graphopt reads 1.0; install a graphopt"),
        (("entries",), {}, "no entry or no variant"),
        (("variants",), None, "'None' should be a list"),
        (("name",), 3, "'3' should be a string"),
        (("files", "lib/cpu.so", "bytes"), -1, "'-1' should be a whole number"),
        (("files", "lib/cpu.so", "sha256"), "abc", "'abc' should be a sha256"),
        (("files",), {}, "files lacks weights.safetensors"),
        (("tensors",), {}, "tensors lacks state.total"),
        (("entries", "main", "sizes", "n"), {"low": 3, "high": 2}, "a size cannot be from 3 to 2"),
        (("entries", "main", "inputs"), [{"name": "x", "shape": []}], "dtype is missing"),
        (("entries", "main", "inputs", 0, "shape"), [True], "'True' should be a whole number"),
        (("variants", 0, "weights"), {}, "variant cpu has other entries than the manifest"),
        (("variants", 0, "library"), "lib/x.so", "files lacks lib/x.so"),
        (("variants", 0, "kernels", "odd"), "generic", "string indices must be integers"),
        (("variants", 0, "kernels", "odd", "flops"), -1, "'-1' should be a whole number"),
        (("variants", 0, "kernels", "odd", "rule"), None, "'None' should be a string"),
        (("variants", 0, "kernels", "gemm", "configuration"), {"rows": [8]}, "'[8]' should be a number, a string or"),
        (("variants", 0, "kernels", "gemm", "nodes", "main"), "linear", "'linear' should be a list"),
    ],
)
def test_a_tampered_manifest_says_what_is_wrong(
    tmp_path: Path, where: tuple[str | int, ...], value: object, words: str
) -> None:
    write(tmp_path / "a.gopt")
    data = json.loads(bytes(open_archive(tmp_path / "a.gopt").member("manifest.json")))
    item = data
    for key in where[:-1]:
        item = item[key]
    item[where[-1]] = value
    with pytest.raises(ArtifactError) as caught:
        parse(json.dumps(data))
    assert words in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff", b'"x"', b"[" * 100_000])
def test_what_is_no_manifest_at_all(text: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged"):
        parse(text)


def test_a_newer_minor_format_with_more_fields_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.gopt")
    data = json.loads(bytes(open_archive(tmp_path / "a.gopt").member("manifest.json")))
    data |= {"format": "1.7", "added": 1}
    data["entries"]["main"]["sizes"]["n"]["added"] = 1
    assert parse(json.dumps(data)).format == "1.7"
