"""Tensors in files beside the model: mapped, of any size, and never from elsewhere."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from graphopt import Program
from graphopt.capture import Limits, capture
from graphopt.errors import CaptureError
from tests.capture.onnx.tiny import model_of


def external(name: str, shape: list[int], location: str, offset: int | str = 0) -> TensorProto:
    proto = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    length = 4 * int(np.prod(shape))
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        proto.external_data.add(key=key, value=value)
    return proto


def adding(folder: Path, *tensors: TensorProto) -> Path:
    """x + every tensor."""
    names = ["x", *(f"s{index}" for index in range(len(tensors)))]
    nodes = [
        helper.make_node("Add", [names[index], tensor.name], [names[index + 1]]) for index, tensor in enumerate(tensors)
    ]
    model = model_of(nodes, {"x": ("float32", ("n", 4))}, [names[-1]])
    model.graph.initializer.extend(tensors)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def one(folder: Path, location: str, offset: int | str = 0) -> Path:
    return adding(folder, external("w", [4], location, offset))


def refused(path: Path, words: str, limits: Limits = Limits()) -> None:  # noqa: B008  frozen
    with pytest.raises(CaptureError, match=words) as caught:
        capture(path, limits=limits)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The model's folder, beside something that is none of its business."""
    (tmp_path / "secret").write_bytes(bytes(16))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "m.data").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    return tmp_path / "model"


def added(program: Program) -> list[float]:
    values: list[float] = program(torch.zeros(1, 4))[0][0].tolist()
    return values


def test_data_are_mapped_and_never_written(folder: Path) -> None:
    data = (folder / "m.data").read_bytes()
    program = capture(one(folder, "m.data"))
    program.graph_module.w.data.add_(1)  # type: ignore[operator]
    assert added(program) == [1, 2, 3, 4]
    assert (folder / "m.data").read_bytes() == data


def test_offsets_folders_and_links_within_the_folder(folder: Path) -> None:
    (folder / "deeper").mkdir()
    (folder / "deeper" / "m.data").write_bytes((folder / "m.data").read_bytes())
    (folder / "link").symlink_to("deeper")
    for location in ("m.data", "./m.data", "deeper/m.data", "link/m.data"):
        assert added(capture(one(folder, location, 16))) == [4, 5, 6, 7]
    assert added(capture(one(folder, "m.data", 6)))[0] != 0  # not at a multiple of four bytes


def test_data_that_lie_elsewhere(folder: Path) -> None:
    outside = "tensor 'w' lies outside the model's folder"
    refused(one(folder, "../secret"), outside)
    refused(one(folder, "deeper/../../secret"), outside)
    refused(one(folder, "deeper/../m.data"), outside)
    refused(one(folder, str(folder.parent / "secret")), outside)
    refused(one(folder, str(folder / "m.data")), outside)
    (folder / "link").symlink_to(folder.parent / "secret")
    refused(one(folder, "link"), outside)
    (folder / "up").symlink_to("..")
    refused(one(folder, "up/secret"), outside)


def test_a_hard_link_may_lead_elsewhere(folder: Path) -> None:
    os.link(folder.parent / "secret", folder / "linked")
    refused(one(folder, "linked"), "has 2 names .hard links.*make it a copy")
    (folder.parent / "secret").unlink()
    assert added(capture(one(folder, "linked"))) == [0, 0, 0, 0]


def test_a_link_that_appears_late_is_not_followed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the check of the path and its opening."""
    exists = os.path.exists

    def swap(path: str) -> bool:
        found = exists(path)
        (folder / "m.data").unlink()
        (folder / "m.data").symlink_to(folder.parent / "secret")
        return found

    path = one(folder, "m.data")
    monkeypatch.setattr(os.path, "exists", swap)
    refused(path, "in a way that cannot be read")


def test_what_is_no_file(folder: Path) -> None:
    refused(one(folder, "gone"), "which does not exist beside the model")
    refused(one(folder, "m.data/inner"), "does not exist beside the model|cannot be read")
    refused(one(folder, ""), "which is no file")
    refused(one(folder, "."), "which is no file")
    refused(one(folder, "m.data\0"), "null character")
    os.mkfifo(folder / "pipe")
    refused(one(folder, "pipe"), "which is no file")


@pytest.mark.parametrize("offset", [20, -4, 1 << 62, "9" * 5000, "", "first"])
def test_offsets_that_cannot_be(folder: Path, offset: int | str) -> None:
    refused(one(folder, "m.data", offset), "it is damaged|in a way that cannot be read")


def test_lengths_that_do_not_fit(folder: Path) -> None:
    proto = external("w", [4], "m.data")
    proto.external_data[2].value = "8"
    refused(adding(folder, proto), "needs 16 bytes")
    refused(adding(folder, external("w", [1 << 31, 1 << 31], "m.data")), r"raise Limits\.max_bytes")


def test_no_model_without_a_path_has_other_files(folder: Path) -> None:
    model = onnx.load(one(folder, "m.data"), load_external_data=False)
    with pytest.raises(CaptureError, match="give the path of the model"):
        capture(model)


def test_tensors_that_read_the_same_bytes_count_each(folder: Path) -> None:
    names = ("w", "v", "u")
    path = adding(folder, *(external(name, [4], "m.data") for name in names))
    assert added(capture(path)) == [0, 3, 6, 9]
    (folder / "m.data").write_bytes(bytes(1 << 20))
    path = adding(folder, *(external(name, [1 << 16, 4], "m.data") for name in names))
    refused(path, r"tensors in other files take over 3000000 bytes; raise Limits\.max_bytes", Limits(max_bytes=3000000))


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_many_tensors_take_one_descriptor(folder: Path, few_descriptors: None) -> None:
    path = adding(folder, *(external(f"w{index}", [4], "m.data") for index in range(100)))
    program = capture(path)
    assert added(program) == [0, 100, 200, 300]


def test_data_over_two_gigabytes_are_not_read(folder: Path) -> None:
    """A sparse file of 3 GiB, of which the last row is written."""
    rows, path = (3 << 30) // 4096, folder / "large.data"
    with path.open("wb") as file:
        file.truncate(3 << 30)
        file.seek((3 << 30) - 4096)
        file.write(np.arange(1024, dtype=np.float32).tobytes())
    node = helper.make_node("Gather", ["table", "ids"], ["r"])
    model = model_of([node], {"ids": ("int64", ("n",))}, ["r"])
    model.graph.initializer.append(external("table", [rows, 1024], "large.data"))
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    program = capture(folder / "m.onnx")
    assert program.inputs[0].domain.high == rows - 1
    assert program(torch.tensor([rows - 1]))[0][0, 1000] == 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kilobytes
    path.unlink()
