"""Memory of the arguments of a race: inputs that all entrants share, outputs, and places that cold weights lie at."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphopt.backends.tuner.measuring import Argument, Race
from graphopt.runtime.caches import cache_sizes
from graphopt.runtime.dtypes import DTYPES
from graphopt.runtime.tensors import aligned_copy

FLOATS = ("float32", "float64", "float16", "bfloat16")

_DRAWN = 65521  # values that are drawn; longer arrays repeat them
_MOST_PLACES = 512  # that a cold weight is read from
_PAGE = 4096


class Memory:
    """Of one race; what is made for one entrant serves the others."""

    def __init__(self, race: Race) -> None:
        self._size, self._seed = min(race.cold_bytes, 2 * max(cache_sizes().values())), race.seed
        self._inputs: dict[Any, np.ndarray] = {}

    def input(self, argument: Argument, case: int, place: int) -> np.ndarray:
        """The words of an input: the same for every entrant."""
        key = case, place, argument.dtype, argument.shape
        if key not in self._inputs:
            self._inputs[key] = drawn(argument, (self._seed, case, place))
        return self._inputs[key]

    def cold(self, argument: Argument) -> list[np.ndarray]:
        """Arrays of the argument's shape all over the memory for weights, in no order; each starts its own page."""
        carrier = DTYPES[argument.dtype].carrier
        size = -(-max(1, math.prod(argument.shape)) * carrier.itemsize // _PAGE) * _PAGE
        arena = _arena(argument.dtype, max(size, self._size))
        count = min(_MOST_PLACES, len(arena) // size)
        apart = len(arena) // count // _PAGE * _PAGE
        order = np.random.default_rng(self._seed).permutation(count)
        return [viewed(arena[number * apart :][:size].view(np.int32), argument) for number in order]


_arenas: dict[str, np.ndarray] = {}


def _arena(dtype: str, size: int) -> np.ndarray:
    """Bytes of drawn values; a process makes them once."""
    if dtype not in _arenas or len(_arenas[dtype]) < size:
        count = size // DTYPES[dtype].carrier.itemsize
        _arenas[dtype] = drawn(Argument("weight", dtype, (count,)), (0,)).view(np.uint8)
    return _arenas[dtype][:size]


def words_of(argument: Argument) -> np.ndarray:
    """Aligned memory for an array in whole words of 32 bits: NaN in every type of floats, as long as nobody writes."""
    size = math.prod(argument.shape) * DTYPES[argument.dtype].carrier.itemsize
    return aligned_copy(np.full(max(1, -(-size // 4)), -1, np.int32), np.dtype(np.int32))


def viewed(words: np.ndarray, argument: Argument) -> np.ndarray:
    """The array in these words."""
    carrier, count = DTYPES[argument.dtype].carrier, math.prod(argument.shape)
    return words.view(np.uint8)[: count * carrier.itemsize].view(carrier).reshape(argument.shape)


def drawn(argument: Argument, seed: tuple[int, ...]) -> np.ndarray:
    """Words of floats of a normal distribution, of truth values that are true, or of 0: integers may be indices."""
    words = words_of(argument)
    array = viewed(words, argument).reshape(-1)
    if argument.dtype in FLOATS:
        values = np.random.default_rng(seed).standard_normal(_DRAWN, np.float32)
        array[...] = np.resize(values.view(np.uint32) >> 16 if argument.dtype == "bfloat16" else values, array.size)
    else:
        array[...] = argument.dtype == "bool"
    return words
