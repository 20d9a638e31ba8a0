from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pytest
import safetensors.numpy

from graphopt.artifact.safetensors import lay_out
from graphopt.errors import ArtifactError
from graphopt.runtime.weights import read_tensors


def written(tensors: Mapping[str, np.ndarray]) -> bytes:
    file = lay_out(tensors)
    data = b"".join(bytes(chunk) for chunk in file.chunks())
    assert len(data) == file.size
    return data


def header(data: bytes) -> dict[str, dict[str, object]]:
    return dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


SAMPLES: dict[str, np.ndarray] = {
    "b.odd": np.arange(7, dtype=np.int8),
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "flag": np.array([True, False]),
    "scalar": np.array(3.5),
    "none": np.zeros((0, 4), np.float16),
}


def test_the_safetensors_package_reads_what_we_write() -> None:
    tensors = safetensors.numpy.load(written(SAMPLES))
    for name, array in SAMPLES.items():
        np.testing.assert_array_equal(tensors[name], array)
        assert tensors[name].dtype == array.dtype


def test_every_tensor_starts_at_a_multiple_of_64_bytes() -> None:
    data = written(SAMPLES)
    start = 8 + int.from_bytes(data[:8], "little")
    for name, item in header(data).items():
        if not name.startswith("__"):
            begin = item["data_offsets"][0]  # type: ignore[index]
            assert (start + begin) % 64 == 0, name


def test_the_order_of_the_mapping_does_not_matter() -> None:
    assert written(SAMPLES) == written(dict(reversed(SAMPLES.items())))


def test_the_same_memory_is_stored_once() -> None:
    weight = np.arange(1000, dtype=np.float32)
    data = written({"a": weight, "b": weight, "c": weight.copy()})
    assert [name for name in header(data) if not name.startswith("__")] == ["a", "c"]
    assert header(data)["__metadata__"] == {"alias.b": "a"}
    assert read_tensors("w", memoryview(data))["b"].array().tolist() == weight.tolist()


@pytest.mark.parametrize("view", [slice(0, 4), slice(4, 8)])
def test_memory_that_only_overlaps_is_stored_apart(view: slice) -> None:
    weight = np.arange(8, dtype=np.float32)
    tensors = read_tensors("w", memoryview(written({"all": weight, "some": weight[view], "turned": weight[::-1]})))
    np.testing.assert_array_equal(tensors["some"].array(), weight[view])
    np.testing.assert_array_equal(tensors["turned"].array(), weight[::-1])


def test_strided_and_big_endian_arrays_are_written_in_order() -> None:
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    tensors = safetensors.numpy.load(written({"turned": turned, "swapped": turned.astype(">f4")}))
    np.testing.assert_array_equal(tensors["turned"], turned)
    np.testing.assert_array_equal(tensors["swapped"], turned)


def test_bfloat16_keeps_its_name() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    stored = read_tensors("w", memoryview(written({"half": np.array([1.5], ml_dtypes.bfloat16)})))["half"]
    assert (stored.dtype, stored.array().tolist()) == ("bfloat16", [0x3FC0])


@pytest.mark.parametrize("name", ["__pad.0", "__metadata__"])
def test_names_of_the_format_itself_are_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match="rename it"):
        lay_out({name: np.zeros(1)})


def test_a_dtype_without_a_spelling_is_refused() -> None:
    with pytest.raises(ArtifactError, match="cannot hold dtype complex64; it holds float64, float32"):
        lay_out({"z": np.zeros(1, np.complex64)})


@pytest.mark.parametrize("place", range(0, 100, 7))
def test_a_damaged_header_never_reads_outside(place: int) -> None:
    data = bytearray(written({"a": np.arange(32, dtype=np.float32)}))
    for value in (0, 0xFF, data[place] ^ 1):
        damaged = data[:place] + bytes([value]) + data[place + 1 :]
        try:
            tensors = read_tensors("w", memoryview(damaged))
        except ArtifactError as e:
            assert "member w is damaged" in str(e)
        else:
            assert all(item.data.nbytes == item.array().nbytes for item in tensors.values())
