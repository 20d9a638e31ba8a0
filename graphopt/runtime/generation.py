"""Text from a decoder, token by token: the prompt in as few runs as it takes, then one run a token.

A decoder's entries are `step`, for one token, and if there is one `prefill`, for several. Both take `input_ids` int64
[1, tokens], `positions` int64 [tokens] and `attention_mask` bool [1, length], whose length is how much of the cache is
read, keep their cache as state, and give `logits` [1, tokens, V], of which the last are those of what follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np

from graphopt.errors import UsageError
from graphopt.runtime.manifest import Entry
from graphopt.runtime.sampling import Sampling
from graphopt.runtime.tensors import aligned_empty

if TYPE_CHECKING:
    from graphopt.runtime.session import InferenceSession

STEP, PREFILL = "step", "prefill"
IDS, POSITIONS, MASK, LOGITS = "input_ids", "positions", "attention_mask", "logits"


class Decoder:
    """What a session can generate with. Raises UsageError where it has no entry for that."""

    def __init__(self, session: InferenceSession) -> None:
        entries = session.manifest.entries
        if STEP not in entries:
            raise UsageError(
                f"the artifact has no entry {STEP!r}, so it generates nothing (it has {', '.join(entries)}); "
                "compile a decoder as docs/decoding.md says"
            )
        for name in (STEP, PREFILL):
            if name in entries:
                _check_entry(name, entries[name])
        self.session = session
        self.capacity = _most(entries[STEP], entries[STEP].inputs[_names(entries[STEP]).index(MASK)].shape[1])
        self.least, self.at_once = _counts(entries[PREFILL]) if PREFILL in entries else (1, 1)

    def generate(
        self, prompt: Sequence[int], most: int, sampling: Sampling, generator: np.random.Generator, stop: frozenset[int]
    ) -> Iterator[int]:
        """The tokens that follow the prompt, up to `most`, or up to one of `stop`."""
        length = len(prompt) + most
        ids, positions = aligned_empty((1, length), np.dtype(np.int64)), aligned_empty((length,), np.dtype(np.int64))
        ids[0, : len(prompt)] = prompt
        positions[:] = np.arange(length)
        mask = aligned_empty((1, length), np.dtype(np.bool_))
        mask[:] = True

        def follow(begin: int, end: int) -> np.ndarray:
            feed = {IDS: ids[:, begin:end], POSITIONS: positions[begin:end], MASK: mask[:, :end]}
            entry = STEP if end - begin == 1 else PREFILL
            if self.session.sequence != sequence:
                raise UsageError(
                    "another sequence was begun on this session, which has one cache; use session.clone() for each"
                )
            logits: np.ndarray = self.session.run([LOGITS], feed, entry=entry)[0]
            last: np.ndarray = logits[0, -1]
            return last

        sequence = self.session.reset()
        begin = 0
        while begin < len(prompt):
            end = begin + self._run_of(len(prompt) - begin)
            logits = follow(begin, end)
            begin = end
        for count in range(len(prompt), length):
            token = sampling.choose(logits, generator)
            if token in stop:
                return
            yield token
            if count + 1 < length:
                ids[0, count] = token
                logits = follow(count, count + 1)

    def _run_of(self, left: int) -> int:
        """How many of the prompt's tokens that are left go through one run: 1, a step, where `prefill` takes none."""
        count = min(left, self.at_once)
        return count if count >= self.least else 1


def check_request(prompt: Sequence[int] | np.ndarray, most: int, capacity: int | None) -> list[int]:
    """The prompt as a list. Raises UsageError where there is nothing to follow, or more than the cache holds."""
    try:
        array = np.asarray(prompt)
    except ValueError as error:
        raise UsageError("prompt_ids has rows of several lengths; give a list of one or more token ids") from error
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise UsageError(f"prompt_ids is {array.dtype} {list(array.shape)}; give a list of one or more token ids")
    if (highest := int(array.max())) >= 1 << 63:
        raise UsageError(f"prompt_ids has {highest}, which is no id of a token: those are int64")
    if not isinstance(most, Integral) or most < 1:
        raise UsageError(f"max_tokens is {most!r}; give a whole number of 1 or more")
    if capacity is not None and len(array) + most - 1 > capacity:
        raise UsageError(
            f"{len(array)} tokens of prompt and {most} more are over the {capacity} positions of the cache; give "
            "fewer, or compile the decoder with a longer cache"
        )
    return [int(token) for token in array]


def check_stop_tokens(tokens: Iterable[int]) -> frozenset[int]:
    """The tokens as a set. Raises UsageError for what is no list of whole numbers."""
    found = list(tokens) if isinstance(tokens, Iterable) else [None]
    if not all(isinstance(token, Integral) for token in found):
        raise UsageError(f"stop_tokens is {tokens!r}; give a list of token ids")
    return frozenset(map(int, found))


def _check_entry(name: str, entry: Entry) -> None:
    wanted = {IDS: ("int64", 2), POSITIONS: ("int64", 1), MASK: ("bool", 2)}
    found = {item.name: (item.dtype, len(item.shape)) for item in entry.inputs}
    outputs = {item.name: len(item.shape) for item in entry.outputs}
    if found != wanted or outputs.get(LOGITS) != 3:
        raise UsageError(
            f"entry {name!r} is no decoder's: it has to take {IDS} int64 [1, tokens], {POSITIONS} int64 [tokens] and "
            f"{MASK} bool [1, length] and to give {LOGITS} [1, tokens, V]; see docs/decoding.md"
        )
    length = entry.inputs[_names(entry).index(MASK)].shape[1]
    if isinstance(length, int):
        raise UsageError(
            f"entry {name!r} reads {length} positions of its cache, whatever the token; leave the length of {MASK} "
            "open where the decoder is captured"
        )


def _counts(prefill: Entry) -> tuple[int, int]:
    """The fewest and the most tokens that one run takes; 1 and 1 where that is no range, and steps take them all."""
    tokens = prefill.inputs[_names(prefill).index(IDS)].shape[1]
    if isinstance(tokens, int):
        return tokens, tokens
    bounds = prefill.sizes.get(tokens)
    return (1, 1) if bounds is None else (bounds.low, bounds.high or 1 << 62)


def _names(entry: Entry) -> list[str]:
    return [item.name for item in entry.inputs]


def _most(entry: Entry, size: int | str) -> int | None:
    if isinstance(size, int):
        return size
    bounds = entry.sizes.get(size)
    return None if bounds is None else bounds.high
