"""Samples from .npz files: rows along the first axis become feeds of the sizes that the program takes."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from graphopt.data.dataset import LABEL, Sample, held_out_count
from graphopt.data.feeds import cast, check_names, read_inputs, read_label, read_tensor
from graphopt.data.npz_rows import Array, NpzFile, RowReader, open_npz
from graphopt.errors import FeedError, UsageError
from graphopt.program import Program, TensorSpec

_BATCH_SIZE = 16


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of one file."""

    file: int
    start: int
    stop: int


Group = tuple[Rows, ...]  # the rows of one feed


@dataclass(frozen=True)
class Batching:
    """How rows become feeds: `size` at once, never under `least`; `whole` inputs have a feed in every row."""

    size: int
    least: int
    whole: frozenset[str]


class NpzSource:
    """Reads the groups of rows in order, with one file open at a time."""

    def __init__(self, program: Program, files: Sequence[NpzFile], batching: Batching, groups: Sequence[Group]) -> None:
        self.program = program
        self.files = files
        self.batching = batching
        self.groups = groups
        self.inputs = tuple(spec.name for spec in _held(program, files[0]))
        self.labelled = LABEL in files[0].arrays and LABEL not in self.inputs

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        names = (*self.inputs, LABEL) if self.labelled else self.inputs
        with contextlib.ExitStack() as stack:
            opened, reader = -1, None
            for group in self.groups[start:stop]:
                pieces: dict[str, list[Array]] = {name: [] for name in names}
                for rows in group:
                    if reader is None or opened != rows.file:
                        stack.close()
                        opened, reader = rows.file, stack.enter_context(RowReader(self.files[rows.file]))
                    for name in names:
                        pieces[name].append(reader.rows(name, rows.start, rows.stop))
                yield self._sample({name: np.concatenate(found) for name, found in pieces.items()}, group)

    def _sample(self, arrays: Mapping[str, Array], group: Group) -> Sample:
        where = _place(self.files, group)
        whole = self.batching.whole
        feed = {name: arrays[name][0] if name in whole else arrays[name] for name in self.inputs}
        label = None
        if self.labelled:
            label = read_label(arrays[LABEL][0] if whole else arrays[LABEL], where)
        return Sample(read_inputs(self.program, feed, where), label)


def open_npz_data(path: str, program: Program, batch_size: int | None) -> tuple[NpzSource, int, int, tuple[str, ...]]:
    """(source, index of the first held-out feed, number of feeds, notes). Raises UsageError."""
    files = [file for file in map(open_npz, _find_files(path)) if file.count]
    if not files:
        raise UsageError(f"{path} holds no samples: the first axis of its arrays is empty; save at least two")
    for file in files:
        _check_arrays(program, file, files[0])
    batching = _choose_batching(program, files[0], batch_size)
    total = sum(file.count for file in files)
    units = total // batching.least
    split = (units - held_out_count(units)) * batching.least
    fit, left_out = _group(files, batching, 0, split)
    held_out, also = _group(files, batching, split, total)
    groups = [*fit, *held_out]
    if not groups:
        raise UsageError(f"{path} holds {total} samples, the program takes {batching.least} at once; save more")
    _check_sizes(program, files, batching, groups)
    notes = (_remainder(left_out + also, total, batching),) if left_out + also else ()
    return NpzSource(program, files, batching, groups), len(fit), len(groups), notes


def _remainder(left_out: int, total: int, batching: Batching) -> str:
    return f"{left_out} of {total} samples are left out: they do not fill a batch of {batching.least}"


def _find_files(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise UsageError(f"data {path!r} does not exist; give an .npz file or a folder of them")
    found = sorted(glob.glob(os.path.join(glob.escape(path), "*.npz")))
    if not found:
        raise UsageError(f"folder {path} holds no .npz file; write one with numpy.savez(path, name=array)")
    return found


def _check_arrays(program: Program, file: NpzFile, first: NpzFile) -> None:
    """Names, kinds and ranks by the headers alone; `first` is the file that others must be like."""
    names = {spec.name for spec in program.inputs}
    check_names(program, {name: 0 for name in file.arrays if name != LABEL or name in names}, file.path)
    if file.arrays.keys() != first.arrays.keys():
        raise FeedError(
            f"{file.path} and {first.path} do not both have labels; give all files an array 'label', or none"
        )
    for spec in _held(program, file):
        header = file.arrays[spec.name]
        where = f"{file.path}: input {spec.name!r}"
        cast(read_tensor(np.empty(0, header.dtype), where), spec.dtype, where)
        rank, rank_before = len(header.shape), len(first.arrays[spec.name].shape)
        if rank not in (len(spec.shape), len(spec.shape) + 1) or rank != rank_before:
            raise FeedError(
                f"{where} has {rank} axes, the program takes {list(spec.shape)}; write an array of "
                f"{max(1, len(spec.shape))} axes, the first one counting samples"
            )
    if LABEL not in names and LABEL in file.arrays:
        read_tensor(np.empty(0, file.arrays[LABEL].dtype), f"{file.path}: the label")


def _held(program: Program, file: NpzFile) -> list[TensorSpec]:
    """The inputs that the file has arrays for: all but bound ones that it leaves out."""
    return [spec for spec in program.inputs if spec.name in file.arrays or spec.name not in program.bound]


def _choose_batching(program: Program, file: NpzFile, batch_size: int | None) -> Batching:
    """As many rows at once as the first axis of every input allows."""
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size={batch_size} is no number of samples; write 1 or more")
    inputs = _held(program, file)
    whole = frozenset(spec.name for spec in inputs if len(file.arrays[spec.name].shape) > len(spec.shape))
    least, most = 1, None if not whole else 1
    for spec in inputs:
        if spec.name in whole:
            continue
        low, high = _bounds(program, spec.shape[0])
        least, most = max(least, low), high if most is None else most if high is None else min(most, high)
    if most is not None and least > most:
        raise FeedError(
            f"{file.path}: the inputs differ in how many samples they take at once; give every input an array with one "
            "axis more than it has, whose entries are whole feeds"
        )
    wanted = _BATCH_SIZE if batch_size is None else batch_size
    size = max(wanted if most is None else min(wanted, most), least)
    if batch_size not in (None, size):
        raise UsageError(
            f"batch_size={batch_size} is not possible, the program takes {size} samples at once; leave it out"
        )
    return Batching(size, least, whole)


def _bounds(program: Program, size: int | str) -> tuple[int, int | None]:
    """How many rows the first axis of an input takes."""
    if isinstance(size, int):
        return size, size
    if size not in program.sizes:
        raise FeedError(
            f"a first axis of {size} rows cannot be filled sample by sample; give the input an array with one axis more"
        )
    return program.sizes[size].low, program.sizes[size].high


def _group(files: Sequence[NpzFile], batching: Batching, start: int, stop: int) -> tuple[list[Group], int]:
    """Feeds of the samples `start` to `stop`, never across files whose rows differ in shape; and how many are left."""
    groups: list[Group] = []
    pending: list[Rows] = []
    left_out = 0

    def flush() -> None:
        nonlocal left_out
        count = sum(rows.stop - rows.start for rows in pending)
        if count >= batching.least:
            groups.append(tuple(pending))
        else:
            left_out += count
        pending.clear()

    offset = 0
    for index, file in enumerate(files):
        row, end = max(0, start - offset), min(file.count, stop - offset)
        offset += file.count
        if pending and _row_shapes(files[pending[0].file]) != _row_shapes(file):
            flush()
        while row < end:
            space = batching.size - sum(rows.stop - rows.start for rows in pending)
            pending.append(Rows(index, row, min(end, row + space)))
            row = pending[-1].stop
            if pending[-1].stop - pending[-1].start == space:
                flush()
    flush()
    return groups, left_out


def _row_shapes(file: NpzFile) -> dict[str, tuple[int, ...]]:
    return {name: header.shape[1:] for name, header in file.arrays.items()}


def _check_sizes(program: Program, files: Sequence[NpzFile], batching: Batching, groups: Sequence[Group]) -> None:
    """Every combination of sizes that will be fed, without reading a value."""
    seen = set()
    for group in groups:
        count = sum(rows.stop - rows.start for rows in group)
        shapes: list[tuple[int, ...]] = []
        for spec in program.inputs:
            if spec.name not in files[group[0].file].arrays:  # bound, and left out
                shapes.append(tuple(program.bound[spec.name].shape))
                continue
            inner = files[group[0].file].arrays[spec.name].shape[1:]
            shapes.append(inner if spec.name in batching.whole else (count, *inner))
        if (key := tuple(shapes)) in seen:
            continue
        seen.add(key)
        pairs = zip(program.inputs, shapes, strict=True)
        try:
            program.bind([torch.empty(shape, dtype=spec.dtype, device="meta") for spec, shape in pairs])
        except FeedError as e:
            raise FeedError(f"{_place(files, group)}: {e}") from e


def _place(files: Sequence[NpzFile], group: Group) -> str:
    """ "a.npz, samples 0 to 15"."""
    parts = []
    for rows in group:
        last = rows.stop - 1
        numbers = f"sample {last}" if last == rows.start else f"samples {rows.start} to {last}"
        parts.append(f"{files[rows.file].path}, {numbers}")
    return " and ".join(parts)
