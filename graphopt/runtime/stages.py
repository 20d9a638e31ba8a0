"""An entry that runs in stages: after each one the samples that are done leave, and the rest go on as a smaller batch.

A stage takes values by name, those of the feed and of stages before it, and returns the entry's answers, then flags
`done` [samples], then values for later stages; the last one returns answers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from graphopt.runtime.manifest import Entry
from graphopt.runtime.sizes import parse_size
from graphopt.runtime.tensors import aligned_empty, as_array, to_device

Call = Callable[[str, list[Any]], list[Any]]  # of a stage's name and its inputs


def rows_axis(shape: Sequence[int | str], rows: str) -> int | None:
    """The axis that counts samples, -1 for a shape without samples; None where several or a part of one do."""
    axes = [axis for axis, size in enumerate(shape) if isinstance(size, str) and rows in parse_size(size).names]
    if not axes:
        return -1
    return axes[0] if len(axes) == 1 and shape[axes[0]] == rows else None


class Stages:
    """The plan of one entry; `entries` are its stages by name, in order."""

    def __init__(self, entry: Entry, entries: Mapping[str, Entry]) -> None:
        self.entry, self.entries = entry, entries
        self.answers = tuple(item for item in entry.outputs if item.name != entry.exits)
        rows = str(entry.rows)
        known = [item for stage in (entry, *entries.values()) for item in (*stage.inputs, *stage.outputs)]
        self.axes = {item.name: rows_axis(item.shape, rows) for item in known}
        self.dtypes = {item.name: item.dtype for item in known}
        skipped = len(self.answers) + 1
        self.carried = {name: [item.name for item in stage.outputs[skipped:]] for name, stage in entries.items()}
        self.last_use = {item.name: number for number, stage in enumerate(entries.values()) for item in stage.inputs}

    def run(self, call: Call, inputs: Sequence[Any]) -> tuple[list[np.ndarray], np.ndarray]:
        """The answers, and the stage after which each sample left (int64 [samples])."""
        values = {item.name: tensor for item, tensor in zip(self.entry.inputs, inputs, strict=True)}
        count = self._count(values)
        left = np.arange(count)
        exits = np.zeros(count, np.int64)
        results: list[np.ndarray] | None = None
        for number, (name, stage) in enumerate(self.entries.items()):
            found = call(name, [values[item.name] for item in stage.inputs])
            answers = [as_array(tensor, item.dtype) for tensor, item in zip(found, self.answers, strict=False)]
            done, going = np.arange(len(left)), left[:0]  # rows of this stage's batch
            if number + 1 < len(self.entries):
                flags = as_array(found[len(answers)], "bool")
                done, going = flags.nonzero()[0], (~flags).nonzero()[0]
            if results is None and not len(going):
                exits[:] = number
                return [array.copy() for array in answers], exits
            if len(done):
                results = self._put(results, answers, left[done], done, count)
                exits[left[done]] = number
            if not len(going):
                break
            values |= zip(self.carried[name], found[len(answers) + 1 :], strict=True)
            values = {key: value for key, value in values.items() if self.last_use.get(key, -1) > number}
            if len(done):
                left = left[going]
                values = {key: self._kept(key, value, going) for key, value in values.items()}
        assert results is not None
        return results, exits

    def _count(self, values: Mapping[str, Any]) -> int:
        """How many samples the feed has."""
        for item in self.entry.inputs:
            axis = self.axes[item.name]
            if axis is not None and axis >= 0:
                return int(values[item.name].shape[axis])
        raise AssertionError("a staged entry has an input with samples")

    def _put(
        self,
        results: list[np.ndarray] | None,
        answers: Sequence[np.ndarray],
        places: np.ndarray,
        done: np.ndarray,
        count: int,
    ) -> list[np.ndarray]:
        """The answers of the samples that are done, in their places among all."""
        axes = [self.axes[item.name] or 0 for item in self.answers]
        if results is None:
            shapes = [(*a.shape[:axis], count, *a.shape[axis + 1 :]) for a, axis in zip(answers, axes, strict=True)]
            results = [np.empty(shape, array.dtype) for shape, array in zip(shapes, answers, strict=True)]
        for result, array, axis in zip(results, answers, axes, strict=True):
            if axis == 0:
                result[places] = array[done]
            else:
                np.moveaxis(result, axis, 0)[places] = np.moveaxis(array, axis, 0)[done]
        return results

    def _kept(self, name: str, tensor: Any, going: np.ndarray) -> Any:
        """Of a value the samples that go on; all of what has no samples."""
        axis = self.axes[name]
        if axis is None or axis < 0:
            return tensor
        array = as_array(tensor, self.dtypes[name])
        kept = aligned_empty((*array.shape[:axis], len(going), *array.shape[axis + 1 :]), array.dtype)
        return to_device(np.take(array, going, axis, out=kept, mode="clip"), self.dtypes[name])
