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
from graphopt.runtime.tensors import as_array, to_device

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
            done = np.ones(len(left), bool)
            if number + 1 < len(self.entries):
                done = as_array(found[len(answers)], "bool")
            if results is None and done.all():
                exits[:] = number
                return [array.copy() for array in answers], exits
            if done.any():
                results = self._put(results, answers, left[done], done, count)
                exits[left[done]] = number
            if done.all():
                break
            names = [item.name for item in stage.outputs[len(answers) + 1 :]]
            values |= zip(names, found[len(answers) + 1 :], strict=True)
            values = {key: value for key, value in values.items() if self.last_use.get(key, -1) > number}
            if done.any():
                left = left[~done]
                values = {key: self._kept(key, value, ~done) for key, value in values.items()}
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
            np.moveaxis(result, axis, 0)[places] = np.moveaxis(np.compress(done, array, axis), axis, 0)
        return results

    def _kept(self, name: str, tensor: Any, going: np.ndarray) -> Any:
        """Of a value the samples that go on; all of what has no samples."""
        axis = self.axes[name]
        if axis is None or axis < 0:
            return tensor
        dtype = self.dtypes[name]
        return to_device(np.compress(going, as_array(tensor, dtype), axis), dtype)
