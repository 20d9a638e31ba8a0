from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from graphopt.data.dataset import View, held_out_count, open_data
from graphopt.errors import FeedError, UsageError
from tests.models import program
from tests.passes.checking import captured


def rows(count: int) -> list[dict[str, Any]]:
    """Feeds of one row for the model "mlp"; row i is full of i."""
    return [{"x": np.full((1, 16), index, np.float32)} for index in range(count)]


def firsts(view: View) -> list[int]:
    return [int(sample.inputs[0].flatten()[0]) for sample in view]


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (2, 1), (4, 1), (9, 1), (10, 2), (14, 2), (15, 3)])
def test_the_last_fifth_is_held_out_rounded_down(count: int, held_out: int) -> None:
    data = open_data(rows(count), program("mlp"))
    assert held_out == held_out_count(count) == len(data.held_out)
    for _ in range(2):
        assert (firsts(data.fit), firsts(data.held_out)) == (
            list(range(count - held_out)),
            list(range(count - held_out, count)),
        )
    assert bool(data.notes) == (count == 1)


def test_labels_come_with_their_feeds() -> None:
    data = open_data([(feed, index) for index, feed in enumerate(rows(5))], program("mlp"))
    assert data.labelled
    assert [int(sample.label) for sample in data.fit if sample.label is not None] == [0, 1, 2, 3]


def test_a_data_loader() -> None:
    pairs = [({"x": torch.full((16,), float(index))}, index) for index in range(12)]
    loader: Any = DataLoader(pairs, batch_size=2)  # type: ignore[arg-type]
    data = open_data(loader, program("mlp"))
    assert (firsts(data.fit), firsts(data.held_out)) == ([0, 2, 4, 6, 8], [10])
    (sample,) = data.held_out
    assert sample.label is not None and sample.label.tolist() == [10, 11]


class Endless:
    """A map-style data set whose items do not end with an IndexError."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": np.full((1, 16), index, np.float32)}


def test_a_data_set_of_items_by_number() -> None:
    data = open_data(Endless(), program("mlp"))
    assert (firsts(data.fit), firsts(data.held_out)) == ([0, 1, 2, 3], [4])


def test_a_shuffling_loader_is_refused() -> None:
    loader: Any = DataLoader(rows(200), batch_size=None, shuffle=True)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="shuffle=False"):
        data = open_data(loader, program("mlp"))
        list(data.held_out)


class Changing:
    """Gives other feeds from its third pass on."""

    def __init__(self, later: list[dict[str, Any]]) -> None:
        self.passes = 0
        self.later = later

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.passes += 1
        return iter(rows(5) if self.passes < 3 else self.later)


@pytest.mark.parametrize(("later", "words"), [(rows(5)[::-1], "another sample 4"), (rows(3), "5 samples .* and 4")])
def test_what_changes_between_passes_is_refused(later: list[dict[str, Any]], words: str) -> None:
    data = open_data(Changing(later), program("mlp"))
    with pytest.raises(UsageError, match=words):
        list(data.held_out)


def test_a_generator_is_refused() -> None:
    with pytest.raises(UsageError, match=r"generator, which can be read only once; write list\(data\)"):
        open_data((feed for feed in rows(3)), program("mlp"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "holds no samples"),
        ({"x": np.zeros((4, 16), np.float32)}, "data is one dict"),
        (7, "data is int"),
        ([np.zeros((1, 16), np.float32)], "sample 0 is ndarray; write {'x': array}"),
        ([*rows(2), {"y": np.zeros((1, 16))}], "sample 2 lacks 'x' and has 'y'"),
        ([*rows(2), {"x": np.zeros((1, 16)), "y": 1}], "sample 2 has 'y'"),
        ([{"x": np.zeros((16,), np.float32)}], r"write array\[None\]"),
        ([{"x": np.zeros((1, 15), np.float32)}], "sample 0: axis 1 of input 'x' must be 16, got 15"),
        ([{"x": np.zeros((1, 16), np.complex64)}], "complex64, the program takes float32"),
        ([{"x": np.full((1, 16), 2**24 + 1)}], "int64 with values that float32 cannot hold"),
        ([{"x": np.full((1, 16), 1e300)}], "float64 with values that float32 cannot hold"),
        ([{"x": np.full((1, 16), np.nan)}], "sample 0: input 'x' holds NaN"),
        ([{"x": np.full((1, 16), "a")}], "no plain number"),
        ([{"x": [[1.0], [1.0, 2.0]]}], "unequal rows"),
        ([{"x": torch.eye(16).to_sparse()}], "to_dense"),
        ([(rows(1)[0], np.nan)], "sample 0: the label is not finite"),
        ([(rows(1)[0], "cat")], "the label is <U3"),
        ([(rows(1)[0], 1), rows(1)[0]], "sample 1 has no label"),
    ],
)
def test_what_cannot_be_used(data: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_data(data, program("mlp"))


@pytest.mark.parametrize(
    "array", [np.ones((1, 16)), np.ones((1, 16), np.uint8), np.ones((1, 16), ">f4"), np.ones((1, 16), bool)]
)
def test_casts_that_keep_values(array: Any) -> None:
    (sample,) = open_data([{"x": array}], program("mlp")).fit
    assert sample.inputs[0].dtype == torch.float32 and bool((sample.inputs[0] == 1).all())


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.zeros((2, 3), np.float32), "float32, the program takes int64"),
        (np.array([[20]]), "the id 20, the program takes 0 to 19"),
        (np.array([[2**63]], np.uint64), "uint64 with values that int64 cannot hold"),
    ],
)
def test_ids_must_be_ids(ids: Any, words: str) -> None:
    with pytest.raises(FeedError, match=words):
        open_data([{"ids": ids}], program("tied"))


def test_narrow_ids_are_widened() -> None:
    for dtype in (np.int32, np.uint16, np.uint64):
        (sample,) = open_data([{"ids": np.array([[1, 19]], dtype)}], program("tied")).fit
        assert sample.inputs[0].tolist() == [[1, 19]] and sample.inputs[0].dtype == torch.int64


def test_samples_are_copies() -> None:
    feeds = rows(1)
    data = open_data(feeds, program("mlp"))
    for sample in data.fit:
        sample.inputs[0].fill_(9)
    assert feeds[0]["x"].max() == 0


Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(name: str = "data.npz", compressed: bool = False, **arrays: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
        return str(path)

    return write


def counting(count: int, *shape: int) -> Any:
    return np.broadcast_to(np.arange(count, dtype=np.float32).reshape(count, *(1,) * len(shape)), (count, *shape))


def batches(view: View) -> list[list[int]]:
    return [sample.inputs[0].reshape(len(sample.inputs[0]), -1)[:, 0].int().tolist() for sample in view]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_npz_file_in_batches(save: Save, compressed: bool, order: Any) -> None:
    x = np.asarray(counting(11, 16), order=order)
    data = open_data(save(x=x, label=np.arange(11), compressed=compressed), program("mlp"), batch_size=4)
    for _ in range(2):
        assert batches(data.held_out) == [[9, 10]]
        assert batches(data.fit) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert [sample.label.tolist() for sample in data.held_out if sample.label is not None] == [[9, 10]]
    assert not data.notes


def test_a_batch_is_sixteen_unless_said(save: Save) -> None:
    data = open_data(save(x=counting(40, 16)), program("mlp"))
    assert [len(batch) for batch in batches(data.fit)] == [16, 16]


def test_a_fixed_batch_is_filled_and_its_remainder_said(save: Save) -> None:
    fixed = captured(torch.nn.Linear(2, 2), torch.zeros(3, 2))
    name = fixed.inputs[0].name
    data = open_data(save(**{name: counting(17, 2)}), fixed)
    assert (batches(data.fit), batches(data.held_out)) == (
        [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]],
        [[12, 13, 14]],
    )
    assert data.notes == ("2 of 17 samples are left out: they do not fill a batch of 3",)
    with pytest.raises(UsageError, match="batch_size=2 is not possible, the program takes 3"):
        open_data(save(**{name: counting(17, 2)}), fixed, batch_size=2)


def test_a_folder_of_files(save: Save, tmp_path: Path) -> None:
    save("many/a.npz", x=counting(3, 16))
    save("many/b.npz", x=counting(0, 16))
    save("many/c.npz", x=counting(7, 16) + 3)
    data = open_data(tmp_path / "many", program("mlp"), batch_size=5)
    assert (batches(data.fit), batches(data.held_out)) == ([[0, 1, 2, 3, 4], [5, 6, 7]], [[8, 9]])


def test_rows_of_other_sizes_are_never_in_one_batch(save: Save, tmp_path: Path) -> None:
    save("many/a.npz", ids=np.zeros((3, 7), int))
    save("many/b.npz", ids=np.zeros((2, 4), int))
    data = open_data(str(tmp_path / "many"), program("tied"))
    assert [tuple(sample.inputs[0].shape) for view in (data.fit, data.held_out) for sample in view] == [
        (3, 7),
        (1, 4),
        (1, 4),
    ]


def test_entries_that_are_whole_feeds(save: Save) -> None:
    data = open_data(save(x=counting(5, 2, 16), label=np.arange(10).reshape(5, 2)), program("mlp"))
    assert [tuple(sample.inputs[0].shape) for sample in data.fit] == [(2, 16)] * 4
    assert [sample.label.tolist() for sample in data.held_out if sample.label is not None] == [[8, 9]]


class Scaled(torch.nn.Module):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * scale


def test_an_input_without_batch_axis(save: Save) -> None:
    scaled = captured(Scaled(), torch.zeros(3, 2), torch.tensor(1.0), dynamic={"x": {0: "batch"}})
    data = open_data(save(x=counting(5, 2), scale=np.arange(5.0)), scaled)
    assert [(tuple(sample.inputs[0].shape), float(sample.inputs[1])) for sample in data.fit] == [
        ((1, 2), float(scale)) for scale in range(4)
    ]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"y": counting(5, 16)}, "data.npz lacks 'x' and has 'y'"),
        ({"x": counting(5, 16), "label": np.arange(4)}, r"differ in length \(x 5, label 4\)"),
        ({"x": counting(5)}, "has 1 axes, the program takes"),
        ({"x": counting(5, 15)}, "samples 0 to 3: axis 1 of input 'x' must be 16, got 15"),
        ({"x": counting(0, 16)}, "holds no samples"),
        ({"x": counting(5, 16).astype(complex)}, "complex128, the program takes float32"),
        ({"x": np.float32(1)}, "has no axes"),
        ({}, "holds no arrays"),
        ({"x": np.array([{}, {}])}, "holds Python objects"),
        ({"x": counting(5, 16), "label": np.array(list("abcde"))}, "the label is <U1"),
    ],
)
def test_files_that_cannot_be_used(save: Save, arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_data(save(**arrays), program("mlp"))


def test_files_must_be_alike(save: Save, tmp_path: Path) -> None:
    save("many/a.npz", x=counting(3, 16), label=np.arange(3))
    save("many/b.npz", x=counting(3, 16))
    with pytest.raises(FeedError, match=r"b.npz and .*a.npz do not both have labels"):
        open_data(str(tmp_path / "many"), program("mlp"))


def test_values_are_checked_when_they_are_read(save: Save) -> None:
    x = counting(10, 16).copy()
    x[9, 3] = np.nan
    data = open_data(save(x=x, label=np.where(np.arange(10) == 1, np.inf, 0)), program("mlp"), batch_size=2)
    with pytest.raises(FeedError, match=r"data\.npz, samples 8 to 9: input 'x' holds NaN"):
        list(data.held_out)
    with pytest.raises(FeedError, match=r"data\.npz, samples 0 to 1: the label is not finite"):
        list(data.fit)


def test_paths_that_are_no_data(tmp_path: Path) -> None:
    text = tmp_path / "text.npz"
    text.write_text("x")
    (tmp_path / "empty").mkdir()
    cases = {"none.npz": "does not exist", "text.npz": "no .npz of plain arrays", "empty": "holds no .npz file"}
    for name, words in cases.items():
        with pytest.raises(UsageError, match=words):
            open_data(str(tmp_path / name), program("mlp"))


def test_a_file_cut_short_or_altered(save: Save) -> None:
    path = Path(save(x=counting(50, 16)))
    content = bytearray(path.read_bytes())
    data = open_data(path, program("mlp"))
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=re.escape("no .npz of plain arrays (Bad CRC")):
        list(data.held_out)
    path.write_bytes(content[:500])
    with pytest.raises(UsageError, match=re.escape("no .npz of plain arrays")):
        list(data.fit)


def test_a_folder_is_never_in_memory_at_once(save: Save, tmp_path: Path) -> None:
    wide = captured(torch.nn.Linear(5_000, 1), torch.zeros(2, 5_000), dynamic={"input": {0: "batch"}})
    for index in range(4):
        save(f"many/{index}.npz", compressed=index % 2 == 0, input=np.zeros((100, 5_000), np.float32))
    data = open_data(str(tmp_path / "many"), wide, batch_size=2)
    tracemalloc.start()
    total = sum(sample.inputs[0].numel() for view in (data.fit, data.held_out) for sample in view)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 2_000_000 and peak < 1_000_000  # bytes: the files hold 8 million
