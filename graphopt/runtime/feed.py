"""What a caller hands to `run`: checked against the manifest down to every size, then wrapped for the library."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from graphopt.errors import ArtifactError, BoundInputError, FeedError
from graphopt.runtime.dtypes import DTYPES
from graphopt.runtime.manifest import Bounds, Entry, TensorInfo
from graphopt.runtime.sizes import Expression, parse_size
from graphopt.runtime.tensors import SMALL, aligned_empty, to_device


class FeedCheck:
    """The checks one entry makes on its inputs, prepared once."""

    def __init__(self, entry: Entry) -> None:
        self._inputs = tuple(_InputCheck(item) for item in entry.inputs)
        self._names = [item.name for item in entry.inputs]
        self._known = frozenset(self._names)
        self._bounds = entry.sizes
        self._state = tuple(_InputCheck(item) for item in entry.state)
        self._needs_a_look = any(check.expressions or check.bound is not None for check in self._inputs)

    def bind(self, feed: Mapping[str, np.ndarray], state: Iterable[Any] = ()) -> tuple[list[Any], dict[str, int]]:
        """The feed as tensors in the entry's order, and the symbolic sizes it has; raises FeedError or BoundInputError.

        Large arrays are copied only when they are not aligned to 64 bytes, contiguous and in the machine's byte order;
        small ones always, into memory that the next call writes to again, unless `forget` comes before it.
        """
        sizes = self._sizes_of(state)
        if self._is_right(feed, sizes):
            return [check.to_device(feed[check.name]) for check in self._inputs], sizes
        self._check_names(feed)
        sizes = self._sizes_of(state)
        where: dict[str, str] = {}
        arrays = [feed[name] for name in self._names]
        for check, array in zip(self._inputs, arrays, strict=True):
            check.check_kind(array)
            check.bind_names(array.shape, sizes, where)
        for check, array in zip(self._inputs, arrays, strict=True):
            if check.expressions:
                check.check_expressions(array.shape, sizes, where)
            if check.bound is not None:
                check.check_value(array)
        self._check_bounds(sizes, where)
        return [check.to_device(array) for check, array in zip(self._inputs, arrays, strict=True)], sizes

    def forget(self) -> None:
        """Leave the memory of the last call to whoever may still read it."""
        for check in self._inputs:
            check.forget()

    def _sizes_of(self, state: Iterable[Any]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for check, tensor in zip(self._state, state, strict=False):
            check.read_names(tensor.shape, sizes)
        return sizes

    def _is_right(self, feed: Mapping[str, np.ndarray], sizes: dict[str, int]) -> bool:
        """Whether a quick look finds nothing wrong; it adds to `sizes`. Where it does, other checks say what it is."""
        if self._needs_a_look or not isinstance(feed, dict) or len(feed) != len(self._inputs):
            return False
        for check in self._inputs:
            if not check.is_right(feed.get(check.name), sizes):
                return False
        for name, value in sizes.items():
            bounds = self._bounds.get(name, _DEFAULT_BOUNDS)
            if value < bounds.low or (bounds.high is not None and value > bounds.high):
                return False
        return True

    def _check_names(self, feed: Mapping[str, np.ndarray]) -> None:
        if not isinstance(feed, Mapping):
            raise FeedError(f"the feed is a {type(feed).__name__}; give a dict of input name and numpy array")
        if feed.keys() == self._known:
            return
        for name in feed:
            if name not in self._known:
                close = difflib.get_close_matches(str(name), self._names, n=1, cutoff=0.4)
                hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(self._names) or 'none'}"
                raise FeedError(f"unknown input {name!r}; {hint}")
        lacking = next(name for name in self._names if name not in feed)
        raise FeedError(f"input {lacking!r} is missing; give all of: {', '.join(self._names)}")

    def _check_bounds(self, sizes: Mapping[str, int], where: Mapping[str, str]) -> None:
        for name, value in sizes.items():
            bounds = self._bounds.get(name, _DEFAULT_BOUNDS)
            place = where.get(name, "the state")
            if value < bounds.low and name in where:  # state may start empty
                raise FeedError(f"size {name!r} is {value} in {place}; the least is {bounds.low}")
            if bounds.high is not None and value > bounds.high:
                raise FeedError(
                    f"size {name!r} is {value} in {place}; the artifact was compiled for at most {bounds.high}"
                )


_DEFAULT_BOUNDS = Bounds()


class _InputCheck:
    def __init__(self, info: TensorInfo) -> None:
        if info.dtype not in DTYPES:
            raise ArtifactError(f"input {info.name} has dtype {info.dtype[:40]!r}, which this graphopt does not know")
        self.name = info.name
        self.dtype = info.dtype
        self._shape = info.shape
        self._spelled = f"{info.dtype} [{', '.join(map(str, info.shape))}]"
        self._carrier = DTYPES[info.dtype].carrier
        self._fixed: list[tuple[int, int]] = []
        self._names: list[tuple[int, str]] = []
        self.expressions: list[tuple[int, Expression]] = []
        self._staged: tuple[np.ndarray, Any] | None = None  # where a small array is copied to, and its tensor
        self.bound = None if info.bound is None else _bound_value(info)
        for axis, size in enumerate(info.shape):
            if isinstance(size, int):
                self._fixed.append((axis, size))
            elif (expression := parse_size(size)).names == {size}:
                self._names.append((axis, size))
            else:
                self.expressions.append((axis, expression))

    def is_right(self, array: Any, sizes: dict[str, int]) -> bool:
        """Whether it is just what is expected, the common case; notes the sizes that have names."""
        if not isinstance(array, np.ndarray) or array.dtype != self._carrier:
            return False
        shape: tuple[int, ...] = array.shape
        if not self._names:
            return shape == self._shape
        if len(shape) != len(self._shape):
            return False
        for axis, size in self._fixed:
            if shape[axis] != size:
                return False
        return all(sizes.setdefault(name, shape[axis]) == shape[axis] for axis, name in self._names)

    def to_device(self, array: np.ndarray) -> Any:
        """A tensor over the array's memory where kernels can read that and it is large, else over a copy."""
        staged = self._staged
        if array.dtype != self._carrier:
            return to_device(array, self.dtype)
        if staged is None or staged[0].shape != array.shape:
            if not 0 < array.nbytes <= SMALL:
                return to_device(array, self.dtype)
            memory = aligned_empty(array.shape, self._carrier)
            staged = self._staged = memory, to_device(memory, self.dtype)
        staged[0][...] = array
        return staged[1]

    def forget(self) -> None:
        self._staged = None

    def check_kind(self, array: np.ndarray) -> None:
        """Type, dtype, rank and fixed sizes."""
        if not isinstance(array, np.ndarray):
            raise FeedError(f"input {self.name!r} is a {type(array).__name__}; give a numpy array {self._spelled}")
        found = array.dtype
        if found != self._carrier and found.name != self.dtype:
            hint = f"; convert it with .astype({self.dtype!r})" if found.kind in "biuf" else ""
            raise FeedError(f"input {self.name!r} has dtype {found}, expected {self._spelled}{hint}")
        if array.ndim != len(self._shape):
            raise FeedError(f"input {self.name!r} has shape {_list(array.shape)}, expected {self._spelled}")
        for axis, size in self._fixed:
            if array.shape[axis] != size:
                shape = _list(array.shape)
                raise FeedError(
                    f"input {self.name!r} has shape {shape}, expected {self._spelled}: axis {axis} must be {size}"
                )

    def read_names(self, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
        """Take over the sizes of a state tensor, which the library made."""
        for axis, name in self._names:
            sizes.setdefault(name, shape[axis])

    def bind_names(self, shape: tuple[int, ...], sizes: dict[str, int], where: dict[str, str]) -> None:
        """Note each named size; one that is known already must be the same."""
        for axis, name in self._names:
            value = shape[axis]
            if sizes.setdefault(name, value) != value:
                self._disagree(name, sizes[name], where.get(name, "the state"), axis, value)
            where.setdefault(name, self._place(axis))

    def check_expressions(self, shape: tuple[int, ...], sizes: dict[str, int], where: dict[str, str]) -> None:
        """Compute each size that is an expression, or the one name in it that no other input gives."""
        for axis, expression in self.expressions:
            value = shape[axis]
            unknown = [name for name in expression.names if name not in sizes]
            if len(unknown) == 1:
                answer = expression.solve(unknown[0], sizes, value)
                if answer is None:
                    raise FeedError(
                        f"size {value} in {self._place(axis)} cannot be {expression.text}; see get_inputs()"
                    )
                sizes[unknown[0]] = answer
                where[unknown[0]] = self._place(axis)
            elif not unknown and (expected := expression.value(sizes)) != value:
                raise FeedError(f"size {expression.text!r} is {value} in {self._place(axis)}, expected {expected}")

    def check_value(self, array: np.ndarray) -> None:
        """A bound input has its one value."""
        assert self.bound is not None
        if not np.array_equal(array, self.bound):
            raise BoundInputError.of(self.name, self.bound.reshape(-1).tolist(), array.reshape(-1).tolist())

    def _place(self, axis: int) -> str:
        return f"input {self.name!r} (axis {axis})"

    def _disagree(self, name: str, first: int, place: str, axis: int, value: int) -> None:
        raise FeedError(f"size {name!r} is {first} in {place} and {value} in {self._place(axis)}; make them equal")


def _bound_value(info: TensorInfo) -> np.ndarray:
    """Its shape has no symbolic sizes."""
    shape = tuple(size for size in info.shape if isinstance(size, int))
    try:
        value = np.array(info.bound, DTYPES[info.dtype].carrier)
        if value.tolist() != list(info.bound or ()):
            raise ValueError("it changes by conversion")
        return value.reshape(shape)
    except (OverflowError, ValueError) as e:
        raise ArtifactError(f"input {info.name} is bound to what is no {info.dtype}; compile the model again") from e


def _list(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
