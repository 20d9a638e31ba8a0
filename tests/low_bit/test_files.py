"""Files of others, written here bit by bit, give the numbers that their formats say; torn ones one sentence."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.artifact.safetensors import lay_out
from graphopt.errors import CaptureError, UsageError
from graphopt.low_bit import Grid, LowBitWeight, load_weights, read_awq, read_gguf, read_gptq, rounded, save_weights
from graphopt.low_bit.tensor_file import open_tensors

Arrays = dict[str, np.ndarray]


def write_tensors(path: Path, tensors: Arrays) -> Path:
    path.write_bytes(b"".join(bytes(part) for part in lay_out(tensors).chunks()))
    return path


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of each row one after another, by arithmetic on whole numbers."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * place) for place, code in enumerate(row))
        count = len(row) * bits // 32
        rows.append([number >> (32 * place) & 0xFFFFFFFF for place in range(count)])
    return np.array(rows, np.uint32).astype(np.int32)


def layer(bits: int, rows: int = 32, columns: int = 64, group: int = 32, seed: int = 0) -> Any:
    """Codes [N, K], zeros and scales [G, N]; the first zero is 1 and the last the largest."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 1 << bits, (rows, columns))
    zeros = generator.integers(1, 1 << bits, (columns // group, rows))
    zeros[0, 0], zeros[-1, -1] = 1, (1 << bits) - 1
    return codes, zeros, generator.random((columns // group, rows)).astype(np.float16)


def numbers(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, index: np.ndarray) -> Tensor:
    wide = scales.astype(np.float64).T[:, index] * (codes - zeros.T[:, index])
    return torch.from_numpy(wide.astype(np.float32))


def gptq(bits: int, version: int, index: np.ndarray | None = None) -> tuple[Arrays, Tensor]:
    codes, zeros, scales = layer(bits)
    tensors = {
        "a.qweight": np.ascontiguousarray(words(codes, bits).T),
        "a.qzeros": words(zeros - (version == 1), bits),
        "a.scales": scales,
    }
    if index is not None:
        tensors["a.g_idx"] = index.astype(np.int32)
    return tensors, numbers(codes, zeros, scales, np.arange(64) // 32 if index is None else index)


SHUFFLED = np.random.default_rng(3).permutation(np.arange(64) // 32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("index", [None, np.arange(64) // 32, SHUFFLED])
def test_gptq(bits: int, version: Any, index: Any, tmp_path: Path) -> None:
    """Codes of three bits lie across words."""
    tensors, wanted = gptq(bits, version, index)
    (found,) = read_gptq(write_tensors(tmp_path / "m.safetensors", tensors), version=version).items()
    assert found[0] == "a.weight" and (found[1].bits, found[1].group) == (bits, 32)
    assert (found[1].permutation is not None) == (index is SHUFFLED)
    torch.testing.assert_close(found[1].dequantize(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("columns", "group"), [(96, 64), (80, 32)])
def test_a_last_group_of_gptq_may_be_short(columns: int, group: int, shuffled: bool, tmp_path: Path) -> None:
    """Also where the number of groups divides the inputs: 96 in groups of 64 are not two of 48."""
    generator = np.random.default_rng(0)
    index = np.arange(columns) // group
    groups = int(index.max()) + 1
    if shuffled:
        index = generator.permutation(index)
    codes, zeros = generator.integers(0, 16, (32, columns)), generator.integers(1, 16, (groups, 32))
    scales = generator.random((groups, 32)).astype(np.float16)
    tensors = {
        "a.qweight": np.ascontiguousarray(words(codes, 4).T),
        "a.qzeros": words(zeros - 1, 4),
        "a.scales": scales,
        "a.g_idx": index.astype(np.int32),
    }
    found = read_gptq(write_tensors(tmp_path / "m.safetensors", tensors))["a.weight"]
    assert found.group == group and (found.permutation is not None) == shuffled
    torch.testing.assert_close(found.dequantize(), numbers(codes, zeros, scales, index), rtol=1e-6, atol=1e-7)
    if columns % groups:
        del tensors["a.g_idx"]
        with pytest.raises(CaptureError, match="3 groups do not divide its 80 inputs, and no g_idx says"):
            read_gptq(write_tensors(tmp_path / "m.safetensors", tensors))


def awq() -> tuple[Arrays, Tensor]:
    codes, zeros, scales = layer(4)
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])

    def interleaved(value: np.ndarray) -> np.ndarray:
        return words(value.reshape(len(value), -1, 8)[:, :, order].reshape(len(value), -1), 4)

    tensors = {"b.c.qweight": interleaved(codes.T), "b.c.qzeros": interleaved(zeros), "b.c.scales": scales}
    return tensors, numbers(codes, zeros, scales, np.arange(64) // 32)


def test_awq(tmp_path: Path) -> None:
    tensors, wanted = awq()
    found = read_awq(write_tensors(tmp_path / "m.safetensors", tensors))["b.c.weight"]
    assert found.bits == 4 and found.group == 32
    torch.testing.assert_close(found.dequantize(), wanted, rtol=1e-6, atol=1e-7)


def test_scales_may_be_bfloat16(tmp_path: Path) -> None:
    tensors, _ = awq()
    import ml_dtypes

    tensors["b.c.scales"] = tensors["b.c.scales"].astype(ml_dtypes.bfloat16)
    found = read_awq(write_tensors(tmp_path / "m.safetensors", tensors))["b.c.weight"]
    assert np.array_equal(found.scale.numpy(), tensors["b.c.scales"].astype(np.float32).T)


def change(name: str, value: Any) -> Callable[[Arrays], None]:
    return lambda tensors: tensors.__setitem__(f"a.{name}", value)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tensors: tensors.pop("a.scales"), "layer a: it has no scales"),
        (lambda tensors: tensors.pop("a.qweight"), "holds no tensor named LAYER.qweight"),
        (change("qzeros", np.zeros((2, 5), np.int32)), r"qzeros \[2, 5\] do not hold codes of 2, 3, 4 or 8 bits"),
        (change("qweight", np.zeros((8, 31), np.int32)), r"qweight \[8, 31\] does not hold 4 bits for 32 outputs"),
        (change("qweight", np.zeros((8, 32), np.float32)), "qweight is float32, not int32"),
        (change("scales", np.zeros((2, 32, 1), np.float16)), "where 2 axes are needed"),
        (change("scales", np.full((2, 32), np.inf, np.float16)), "layer a: scale and zero .* infinities or NaN"),
        (change("g_idx", np.zeros(64, np.int32)), "g_idx names groups 0 to 0, not 0 to 1"),
        (change("g_idx", (np.arange(64) > 20).astype(np.int32)), "g_idx does not put 21 inputs into each"),
        (change("g_idx", np.zeros(5, np.int32)), "g_idx has 5 entries for 64 inputs"),
    ],
)
def test_checkpoints_whose_tensors_do_not_fit(edit: Any, words: str, tmp_path: Path) -> None:
    tensors, _ = gptq(4, 1)
    edit(tensors)
    with pytest.raises(CaptureError, match=words):
        read_gptq(write_tensors(tmp_path / "m.safetensors", tensors))


def gguf(
    tensors: list[tuple[str, int, tuple[int, int], bytes]], alignment: int | None = None, apart: bool = True
) -> bytes:
    """A file of version 3 with some keys of every kind, and blocks as they are given; else all are said to be first."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = [
        text("general.name") + struct.pack("<I", 8) + text("small"),
        text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.5, 1.5),
        text("flag") + struct.pack("<I?", 7, True),
    ]
    if alignment is not None:
        keys.append(text("general.alignment") + struct.pack("<II", 4, alignment))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys)
    step, body = alignment or 32, b""
    for name, kind, (rows, columns), data in tensors:
        body += bytes(-len(body) % step)
        head += text(name) + struct.pack("<IQQIQ", 2, columns, rows, kind, len(body) if apart else 0)
        body += data
    return head + bytes(-len(head) % step) + body


def blocks(kind: int, rows: int = 3, columns: int = 64) -> tuple[bytes, Tensor]:
    """Random blocks and what they stand for, by the formula, block by block."""
    generator = np.random.default_rng(kind)
    data, numbers = b"", []
    for place in range(rows * columns // 32):
        scale = np.float16(0 if place == 1 else generator.normal())
        least = np.float16(generator.normal())
        if kind == 8:
            codes = generator.integers(-128, 128, 32)
            data += scale.tobytes() + codes.astype(np.int8).tobytes()
            numbers.append(float(scale) * codes)
            continue
        codes = generator.integers(0, 16, 32)
        halves = (codes[:16] | codes[16:] << 4).astype(np.uint8).tobytes()
        data += scale.tobytes() + (least.tobytes() if kind == 3 else b"") + halves
        numbers.append(float(scale) * (codes - 8) if kind == 2 else float(scale) * codes + float(least))
    return data, torch.from_numpy(np.concatenate(numbers).reshape(rows, columns)).float()


@pytest.mark.parametrize("alignment", [None, 64])
def test_gguf(alignment: Any, tmp_path: Path) -> None:
    cases = {2: blocks(2), 3: blocks(3), 8: blocks(8)}
    tensors = [(f"blk.{kind}.weight", kind, (3, 64), data) for kind, (data, _) in cases.items()]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([*tensors, ("norm", 0, (1, 2), bytes(8))], alignment))
    found = read_gguf(path)
    assert sorted(found) == [f"blk.{kind}.weight" for kind in cases]
    for kind, (_, wanted) in cases.items():
        torch.testing.assert_close(found[f"blk.{kind}.weight"].dequantize(), wanted, rtol=1e-5, atol=1e-5)
        assert found[f"blk.{kind}.weight"].bits == (8 if kind == 8 else 4)


def test_a_gguf_torn_anywhere_is_one_sentence(tmp_path: Path) -> None:
    whole = gguf([("w", 2, (3, 64), blocks(2)[0])])
    path = tmp_path / "m.gguf"
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(CaptureError, match=r"^.*m\.gguf") as raised:
            read_gguf(path)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("seed", range(8))
def test_a_gguf_with_altered_bytes_is_read_or_refused(seed: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(seed)
    path = tmp_path / "m.gguf"
    for _ in range(40):
        data = bytearray(gguf([("w", 2, (3, 64), blocks(2)[0])]))
        for place in generator.integers(0, len(data), 3):
            data[place] = int(generator.integers(0, 256))
        path.write_bytes(data)
        try:
            assert read_gguf(path)
        except CaptureError as error:
            assert str(error).startswith(str(path))


@pytest.mark.parametrize(
    ("data", "words"),
    ids=["magic", "version", "count", "size", "blocks", "kind", "scale", "twice", "overlap", "name"],
    argvalues=[
        (b"GGUX" + bytes(40), "no GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "it is GGUF 1, and 2 and 3 are read"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "announces 1152921504606846976 entries"),
        (gguf([("w", 2, (1 << 40, 64), bytes(36))]), "ends behind byte"),
        (gguf([("w", 2, (1, 48), bytes(36))]), "no whole number of blocks"),
        (gguf([("w", 12, (1, 64), bytes(36))]), "holds no matrix in Q4_0"),
        (gguf([("w", 2, (1, 32), struct.pack("<e", float("inf")) + bytes(16))]), "infinite"),
        (gguf([("w", 2, (1, 32), bytes(18))] * 2), "two tensors have the name w"),
        (gguf([(n, 2, (1, 64), bytes(36)) for n in "ab"], apart=False), "tensor a and tensor b share bytes"),
        (gguf([("w" * 1000, 2, (1, 48), bytes(36))]), "tensor w{80} is 1 x 48"),
    ],
)
def test_a_gguf_that_asks_for_too_much(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CaptureError, match=words):
        read_gguf(tmp_path / "m.gguf")


def test_no_file_and_no_safetensors(tmp_path: Path) -> None:
    for read in (read_gptq, read_awq, read_gguf, load_weights):
        with pytest.raises(CaptureError, match="cannot be read: No such file"):
            read(tmp_path / "none")
    tensors, _ = awq()
    whole = write_tensors(tmp_path / "m.safetensors", tensors).read_bytes()
    for end in (0, 7, 60, len(whole) // 2):
        (tmp_path / "m.safetensors").write_bytes(whole[:end])
        with pytest.raises(CaptureError, match="safetensors"):
            read_awq(tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="version=3 of the GPTQ format"):
        read_gptq(tmp_path / "m.safetensors", version=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "bits"), [("affine", 1), ("affine", 3), ("odd", 5), ("bitmod", 4), ("nf4", 4)])
def test_weights_come_back_from_their_own_file(kind: Any, bits: int, tmp_path: Path) -> None:
    value = torch.randn(5, 72, generator=torch.Generator().manual_seed(0))
    plain = rounded(value, Grid(kind, bits), 32)
    order = torch.randperm(72, generator=torch.Generator().manual_seed(1))
    parts = (plain.codes, plain.scale, bits, 32, plain.zero, plain.codebook, plain.tag, order)
    weights = {"a.b": plain, "c": LowBitWeight(*parts)}
    save_weights(weights, tmp_path / "w.safetensors")
    found = load_weights(tmp_path / "w.safetensors")
    assert list(found) == ["a.b", "c"]
    for name, weight in weights.items():
        assert torch.equal(found[name].codes, weight.codes) and found[name].group == 32
        assert torch.equal(found[name].dequantize(), weight.dequantize())
    assert (tmp_path / "w.safetensors").stat().st_size < 2 * 5 * 72 * bits // 8 + 8192


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        (
            "codebook",
            np.array(1, np.int8),
            r"codebook .* with tags is int8 \[C, 2\^bits\], not int8\[\]",
        ),
        ("codes", np.zeros(5 * 72 * 4 // 8, np.int8), "w.codes are int8, not uint8"),
        ("codes", np.zeros(5 * 72 * 4 // 8, np.float32), "w.codes are float32, not uint8"),
    ],
)
def test_parts_of_another_form_are_one_sentence(part: str, value: np.ndarray, words: str, tmp_path: Path) -> None:
    weight = rounded(torch.randn(5, 72, generator=torch.Generator().manual_seed(0)), Grid("bitmod", 4), 32)
    save_weights({"w": weight}, tmp_path / "w.safetensors")
    tensors = {name: stored.array() for name, stored in open_tensors(tmp_path / "w.safetensors").items()}
    write_tensors(tmp_path / "w.safetensors", {**tensors, f"w.{part}": value})
    with pytest.raises(CaptureError, match=words):
        load_weights(tmp_path / "w.safetensors")
