from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphopt
from graphopt import FeedError, InferenceSession, UsageError
from graphopt.runtime.generation import Decoder, _check_entry, _counts
from graphopt.runtime.manifest import Bounds
from graphopt.runtime.sampling import Sampling
from graphopt.tools.benchmarking.llama import Llama, Shape, capture_decoder, entries_of
from tests.decoders import recomputed

SHAPE = Shape(layers=2, width=64, heads=4, groups=2, hidden=96, vocabulary=40, length=32)
PROMPT = [7, 1, 30, 30, 5]


@pytest.fixture(scope="module")
def module() -> Llama:
    torch.manual_seed(5)
    made = Llama(SHAPE, last=False).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(1.5)  # so that attention matters and the likeliest token changes
    return made


@pytest.fixture(scope="module")
def path(module: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder") / "llama.gopt"
    graphopt.compile(entries_of(capture_decoder(module))).save(path)
    return path


@pytest.fixture
def session(path: Path) -> InferenceSession:
    return InferenceSession(path)


def run(session: InferenceSession, entry: str, ids: Sequence[int], first: int) -> np.ndarray:
    feed = {
        "input_ids": np.array([ids]),
        "positions": np.arange(first, first + len(ids)),
        "attention_mask": np.ones((1, first + len(ids)), bool),
    }
    return session.run(None, feed, entry=entry)[0][0]


def test_generation_is_recomputation_of_all_tokens(module: Llama, session: InferenceSession) -> None:
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(24):
            ids.append(int(recomputed(module, torch.tensor([ids]))[0, -1].argmax()))
    assert len(set(ids)) > 8, "a sequence that repeats itself shows nothing"
    assert list(session.generate(PROMPT, 24)) == ids[len(PROMPT) :]


def test_prefill_and_steps_give_the_same_logits(module: Llama, session: InferenceSession) -> None:
    ids = [*PROMPT, *range(20)]
    with torch.no_grad():
        expected = recomputed(module, torch.tensor([ids]))[0].numpy()
    steps = np.concatenate([run(session, "step", [token], n) for n, token in enumerate(ids)])
    session.reset()
    parts = np.concatenate([run(session, "prefill", ids[:11], 0), run(session, "prefill", ids[11:], 11)])
    session.reset()
    mixed = np.concatenate([run(session, "prefill", ids[:24], 0), run(session, "step", ids[24:], 24)])
    for found in (steps, parts, mixed):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_prompts_in_parts_and_by_steps_alone(session: InferenceSession) -> None:
    whole = list(session.generate(PROMPT, 8))
    decoder = Decoder(session)
    for most in (1, 2):
        decoder.least, decoder.at_once = 1, most
        assert list(decoder.generate(PROMPT, 8, Sampling(), np.random.default_rng(0), frozenset())) == whole


@pytest.fixture(scope="module")
def four(module: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("four") / "llama.gopt"
    entries = entries_of(capture_decoder(module))
    graphopt.compile({**entries, "prefill": entries["prefill"].fix_sizes(tokens=4)}).save(path)
    return path


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 10])
def test_a_prefill_of_four_tokens_serves_prompts_of_any_number(
    four: Path, session: InferenceSession, count: int
) -> None:
    prompt = [*PROMPT, *PROMPT][:count]
    assert list(InferenceSession(four).generate(prompt, 6)) == list(session.generate(prompt, 6))


@pytest.mark.parametrize(
    ("bounds", "runs"),
    [
        (Bounds(4, 8), [8, 1, 1]),
        (Bounds(1, 4), [4, 4, 2]),
        (Bounds(2, 3), [3, 3, 3, 1]),
        (Bounds(1, None), [10]),
        (None, [1] * 10),
    ],
)
def test_prompts_go_in_runs_that_prefill_takes(
    session: InferenceSession, bounds: Bounds | None, runs: list[int]
) -> None:
    decoder = Decoder(session)
    prefill = replace(session.manifest.entries["prefill"], sizes={} if bounds is None else {"tokens": bounds})
    decoder.least, decoder.at_once = _counts(prefill)
    left, found = 10, []
    while left:
        found.append(decoder._run_of(left))
        left -= found[-1]
    assert found == runs


def test_a_cache_that_is_read_whole_is_refused_at_once(session: InferenceSession) -> None:
    inputs = session.manifest.entries["step"].inputs
    fixed = tuple(replace(item, shape=(1, 32)) if item.name == "attention_mask" else item for item in inputs)
    entry = replace(session.manifest.entries["step"], inputs=fixed)
    with pytest.raises(UsageError, match="entry 'step' reads 32 positions of its cache, whatever the token"):
        _check_entry("step", entry)


@pytest.mark.parametrize("begin", [InferenceSession.reset, lambda session: next(session.generate([3, 2], 4))])
def test_a_sequence_ends_where_another_begins(session: InferenceSession, begin: Callable[..., Any]) -> None:
    tokens = session.generate(PROMPT, 12)
    assert len(list(itertools.islice(tokens, 3))) == 3
    begin(session)
    with pytest.raises(UsageError, match=r"another sequence was begun .* session\.clone\(\)"):
        next(tokens)


def test_equal_seeds_draw_equal_tokens(session: InferenceSession) -> None:
    def drawn(seed: int) -> list[int]:
        return list(session.generate(PROMPT, 20, temperature=1.5, top_k=20, top_p=0.95, seed=seed))

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_it_streams_and_ends_before_a_stop_token(session: InferenceSession) -> None:
    whole = list(session.generate(PROMPT, 24))
    assert list(itertools.islice(session.generate(PROMPT, 24), 3)) == whole[:3]
    stop = whole[6]
    assert list(session.generate(PROMPT, 24, stop_tokens=[stop])) == whole[: whole.index(stop)]


def test_sequences_of_a_clone_are_its_own(session: InferenceSession) -> None:
    other = session.clone()
    pair = [PROMPT, [3, 2, 1]]
    alone = [list(session.generate(prompt, 12)) for prompt in pair]
    turns = zip(session.generate(pair[0], 12), other.generate(pair[1], 12), strict=True)
    assert [list(tokens) for tokens in zip(*turns, strict=True)] == alone


def test_the_cache_is_written_in_place_and_weights_are_kept_once(module: Llama, session: InferenceSession) -> None:
    entry = session.manifest.entries["step"]
    assert len(entry.state) == 2 * SHAPE.layers
    assert {item.name for item in entry.state} == set(entry.written) == set(session.manifest.entries["prefill"].written)
    before = {name: tensor.data_ptr() for name, tensor in session._state.items()}
    run(session, "prefill", PROMPT, 0)
    run(session, "step", [1], len(PROMPT))
    assert {name: tensor.data_ptr() for name, tensor in session._state.items()} == before
    kept = session._model.archive.member("weights.safetensors").nbytes
    needed = sum(weight.numel() * 4 for weight in module.parameters())
    assert needed < kept < 1.15 * needed + 16384, "zeros of the cache and a second packing are not in the file"


def test_the_step_reads_no_more_of_the_cache_than_is_asked_for(session: InferenceSession) -> None:
    with pytest.raises(FeedError, match="'length' is 33"):
        run(session, "step", [1], 32)
    first = run(session, "step", [4], 0)
    junk = np.full((1, SHAPE.groups, SHAPE.length - 1, SHAPE.depth), np.nan, np.float32)
    for tensor in session._state.values():
        np.from_dlpack(tensor)[:, :, 1:] = junk
    np.testing.assert_array_equal(run(session, "step", [4], 0), first)


def test_requests_that_cannot_be_met(session: InferenceSession) -> None:
    for prompt, most, text in (
        ([], 3, "prompt_ids is float64"),
        ([[1, 2]], 3, "list of one or more token ids"),
        (PROMPT, 0, "max_tokens is 0"),
        (PROMPT, 29, "over the 32 positions of the cache"),
        (PROMPT, 2.5, "max_tokens is 2.5; give a whole number"),
        (PROMPT, "4", "max_tokens is '4'; give a whole number"),
        ([[1, 2], [3]], 3, "rows of several lengths"),
        ([1 << 63], 3, "9223372036854775808, which is no id of a token"),
    ):
        with pytest.raises(UsageError, match=text):
            session.generate(prompt, most)  # type: ignore[arg-type]
    for options, text in (
        ({"seed": -1}, "seed is -1; give a whole number"),
        ({"seed": 1.5}, "seed is 1.5; give a whole number"),
        ({"stop_tokens": 5}, "stop_tokens is 5; give a list"),
        ({"stop_tokens": "5"}, "stop_tokens is '5'; give a list"),
    ):
        with pytest.raises(UsageError, match=text):
            session.generate(PROMPT, 3, **options)
    assert len(list(session.generate(PROMPT, 28))) == 28


def test_other_artifacts_say_that_they_are_no_decoder(tmp_path: Path) -> None:
    program = graphopt.capture(torch.nn.Linear(4, 4), (torch.zeros(1, 4),))
    for entry, text in (("main", "has no entry 'step'"), ("step", "entry 'step' is no decoder's")):
        with pytest.raises(UsageError, match=text):
            graphopt.compile({entry: program}).session().generate([1], 1)


def test_sampling_leaves_the_unlikely_out() -> None:
    logits = np.log(np.array([0.05, 0.5, 0.15, 0.3], np.float32))

    def share(sampling: Sampling) -> np.ndarray:
        generator = np.random.default_rng(0)
        drawn = [sampling.choose(logits, generator) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / len(drawn)

    np.testing.assert_allclose(share(Sampling(1.0)), [0.05, 0.5, 0.15, 0.3], atol=0.03)
    np.testing.assert_allclose(share(Sampling(1.0, top_k=2)), [0, 5 / 8, 0, 3 / 8], atol=0.03)
    np.testing.assert_allclose(share(Sampling(1.0, top_p=0.85)), [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95], atol=0.03)
    np.testing.assert_allclose(share(Sampling(1.0, top_p=0.01)), [0, 1, 0, 0])
    squared = np.array([0.05, 0.5, 0.15, 0.3]) ** 2
    np.testing.assert_allclose(share(Sampling(0.5)), squared / squared.sum(), atol=0.03)
    np.testing.assert_allclose(share(Sampling(1e-320)), [0, 1, 0, 0])
    assert Sampling().choose(np.array([1.0, 3.0, 3.0]), np.random.default_rng(0)) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_k": 1.5}, "top_k is 1.5"),
        ({"temperature": 1.0, "top_p": "all"}, "top_p is 'all'"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": 3}, "temperature above 0"),
    ],
)
def test_sampling_that_means_nothing(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Sampling(**options)
