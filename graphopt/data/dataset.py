"""Data that passes learn from and programs are measured on: samples, of which the last fifth is held out."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from graphopt.data.feeds import read_inputs, read_label
from graphopt.errors import FeedError, UsageError
from graphopt.program import Program

LABEL = "label"
_FORMS = "a list or DataLoader of {input name: array} or (dict, label), an .npz file, or a folder of them"


@dataclass(frozen=True)
class Sample:
    """One feed that the program takes: its inputs in order, batch axis included, and the label of that feed."""

    inputs: tuple[torch.Tensor, ...]
    label: torch.Tensor | None = None


class Source(Protocol):
    """Where samples come from: the same ones in the same order on every pass, or a UsageError."""

    def read(self, start: int, stop: int) -> Iterator[Sample]: ...


@dataclass(frozen=True)
class View:
    """Samples `start` to `stop` of a source; iterates as often as one likes and keeps no sample."""

    source: Source
    start: int
    stop: int

    def __iter__(self) -> Iterator[Sample]:
        return self.source.read(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Dataset:
    """Samples in two parts that share none: `fit` to learn from, `held_out` to measure on.

    The last fifth is held out, rounded down, and at least one sample where there are two or more. `notes` says what
    was left out. `labelled` is whether every sample has a label; otherwise none has.
    """

    fit: View
    held_out: View
    labelled: bool
    notes: tuple[str, ...] = ()

    def for_fitting(self) -> Dataset:
        """`fit` alone in two parts, for a pass that learns: what is held out here was never learned from.

        Raises UsageError where there is nothing to hold out.
        """
        if len(self.fit) < 2:
            raise UsageError(f"fitting needs two samples besides those held out, got {len(self.fit)}; give more data")
        first = self.fit.stop - held_out_count(len(self.fit))
        source = self.fit.source
        return Dataset(View(source, self.fit.start, first), View(source, first, self.fit.stop), self.labelled)


def held_out_count(samples: int) -> int:
    """How many of the last samples are held out: a fifth rounded down, at least one where there are two or more."""
    return max(1, samples // 5) if samples > 1 else 0


def open_data(data: Any, program: Program, *, batch_size: int | None = None) -> Dataset:
    """The data set that `data` means for `program`.

    `data` is one of
    - what can be iterated again and again, such as a list or a DataLoader that does not shuffle, of {input name: array
      or tensor} or (dict, label): each item is one feed with its batch axis, and the last fifth of the items is held
      out. It is read once here, so that every fault of it shows now; a later pass must give the same again.
    - an .npz file or a folder of them, in the order of their names: arrays by input name and optionally `label`, their
      first axis counting samples. Rows become the batch axis: as many at once as a fixed one has, or `batch_size` (16)
      where it may change. An array with one axis more than its input holds a whole feed in each entry, and samples
      are then given one by one. The last fifth of the samples is held out. Rows are read when they are needed.

    Floating-point values are rounded to the input's type; integers and booleans go into every type that holds them
    exactly. Raises UsageError, or FeedError with the file or sample (counted from 0), for anything else.
    """
    if isinstance(data, (str, os.PathLike)):
        from graphopt.data.npz_data import open_npz_data

        source, first_held_out, count, notes = open_npz_data(os.fspath(data), program, batch_size)
        return _split(source, first_held_out, count, source.labelled, notes)
    if batch_size is not None:
        raise UsageError("batch_size is for .npz files: items of other data are feeds already; leave it out")
    items = _Items(data, program, _check_iterable(data))
    if not items.digests:
        raise UsageError(f"data holds no samples; give {_FORMS}")
    for _ in items.read(0, 1):  # a shuffled or used-up iterable rarely survives this
        pass
    count = len(items.digests)
    return _split(items, count - held_out_count(count), count, items.labelled, ())


def _split(source: Source, first: int, count: int, labelled: bool, notes: tuple[str, ...]) -> Dataset:
    if first == count:
        notes = (*notes, "too few samples to hold any out, so nothing can be measured; give at least two feeds")
    return Dataset(View(source, 0, first), View(source, first, count), labelled, notes)


def _check_iterable(data: Any) -> Iterable[Any]:
    if isinstance(data, Mapping):
        raise UsageError("data is one dict; write [dict, ...] with a dict for each feed, or save it with numpy.savez")
    if isinstance(data, Iterator):
        raise UsageError(
            f"data is a {type(data).__name__}, which can be read only once; write list(data), or a class whose "
            "__iter__ starts anew"
        )
    if isinstance(data, Iterable):
        return data
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _Indexed(data)
    raise UsageError(f"data is {type(data).__name__}; give {_FORMS}")


class _Indexed:
    """A torch data set of items by number: its length ends it, since its items need not."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (self.data[index] for index in range(len(self.data)))


class _Items:
    """An iterable of feeds, and a digest of each: what is held out must be the same samples on every pass."""

    def __init__(self, data: Any, program: Program, items: Iterable[Any]) -> None:
        self.data = items
        self.program = program
        self.labelled = False
        self.digests: list[bytes] = []
        for index, item in enumerate(iter(items)):
            sample = self._read_item(item, index)
            labelled = sample.label is not None
            if index and labelled != self.labelled:
                which = "no label, those before it have one" if self.labelled else "a label, those before it have none"
                raise FeedError(f"data, sample {index} has {which}; give all of them a label, or none")
            self.labelled = labelled
            self.digests.append(_digest(sample))

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        position = start
        for item in itertools.islice(iter(self.data), start, stop):
            sample = self._read_item(item, position)
            if _digest(sample) != self.digests[position]:
                raise UsageError(
                    f"data gives another sample {position} than on its first pass, so that held-out samples would be "
                    "fitted on; turn shuffling and random augmentation off (shuffle=False)"
                )
            position += 1
            yield sample
        if position < stop:
            raise UsageError(
                f"data gave {len(self.digests)} samples on its first pass and {position} on a later one; "
                "write list(data), or a class whose __iter__ starts anew"
            )

    def _read_item(self, item: Any, index: int) -> Sample:
        where = f"data, sample {index}"
        feed, label = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
        if not isinstance(feed, Mapping):
            names = ", ".join(f"{spec.name!r}: array" for spec in self.program.inputs)
            raise FeedError(f"{where} is {type(item).__name__}; write {{{names}}}, or that and a label: (dict, label)")
        return Sample(read_inputs(self.program, feed, where), None if label is None else read_label(label, where))


def _digest(sample: Sample) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (*sample.inputs, *(() if sample.label is None else (sample.label,))):
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()
