"""Races of kernels that are Python functions: what they are called with, and how results are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from graphopt.backends.tuner import race_memory, racing
from graphopt.backends.tuner.measuring import REFRESH, Argument, Entrant, Race, Times
from graphopt.backends.tuner.race_message import pack_race, pack_times, unpack_race, unpack_times
from graphopt.backends.tuner.racing import run_race
from graphopt.runtime.session import SET_DENORMALS

Kernel = Callable[..., None]
INPUT, OUTPUT = Argument("input", "float32", (4, 6)), Argument("output", "float32", (4, 6))
WEIGHT = Argument("weight", "float32", (6,), np.arange(6, dtype=np.float32))


class Library:
    """What `open_kernels` gives, of Python functions."""

    def __init__(self, functions: dict[str, Kernel]) -> None:
        self.functions = functions

    def get_function(self, name: str, query_imports: bool) -> Kernel:
        return self.functions[name]


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Times]]:
    """race(kernels, case, more cases...) -> times; kernels get numpy arrays and numbers."""
    monkeypatch.setattr(race_memory, "cache_sizes", lambda: {3: 1 << 20})

    def on_arrays(kernel: Kernel) -> Kernel:
        return lambda *arguments: kernel(*(x if isinstance(x, int) else np.from_dlpack(x) for x in arguments))

    def run(*kernels: Kernel, cases: tuple[Any, ...], refresh: Kernel = lambda data, nothing: None) -> list[Times]:
        functions = {str(number): on_arrays(kernel) for number, kernel in enumerate(kernels)}
        support = {REFRESH: on_arrays(refresh), SET_DENORMALS: lambda flush, threads: None}
        monkeypatch.setattr(racing, "_open", lambda data: Library(support if data == b"support" else functions))
        entrants = [Entrant(b"kernels", name, cases) for name in functions]
        return run_race(Race(entrants, b"support", 1, turns=2, seconds=0.0, cold_bytes=1 << 16))

    return run


def add(x: Any, weight: Any, out: Any) -> None:
    out[...] = x + weight


def test_equal_results_and_a_time_for_every_turn(race: Callable[..., list[Times]]) -> None:
    default, same = race(add, add, cases=((INPUT, WEIGHT, OUTPUT),) * 3)
    assert default.difference == same.difference == 0
    assert [len(turns) for turns in same.seconds] == [2, 2, 2]
    assert all(seconds > 0 for turns in same.seconds for seconds in turns)


@pytest.mark.parametrize(
    ("wrong", "low", "high"),
    [
        (lambda x, weight, out: np.copyto(out, (x + weight) * np.float32(1.01)), 0.005, 0.02),
        (lambda x, weight, out: np.copyto(out[1:], (x + weight)[1:]), math.inf, math.inf),  # a row is not written
        (lambda x, weight, out: np.copyto(out, np.inf), math.inf, math.inf),
        (lambda x, weight, out: None, math.inf, math.inf),
    ],
)
def test_wrong_results(race: Callable[..., list[Times]], wrong: Kernel, low: float, high: float) -> None:
    default, other = race(add, wrong, cases=((INPUT, WEIGHT, OUTPUT),))
    assert default.difference == 0 and low <= other.difference <= high


def test_a_result_that_is_wrong_in_one_case_only(race: Callable[..., list[Times]]) -> None:
    def wrong_if_long(x: Any, out: Any) -> None:
        out[...] = x if len(x) < 9 else -x

    short, long = ((Argument("input", "float32", (n,)), Argument("output", "float32", (n,))) for n in (8, 9))
    _, other = race(lambda x, out: np.copyto(out, x), wrong_if_long, cases=(short, long))
    assert other.difference > 1


def test_nan_equals_nan_and_integers_have_to_be_equal(race: Callable[..., list[Times]]) -> None:
    case = ((Argument("output", "float64", (3,)), Argument("output", "int64", (3,))),)

    def fill(value: float, number: int) -> Kernel:
        def kernel(a: Any, b: Any) -> None:
            a[...], b[...] = value, number

        return kernel

    times = race(fill(math.nan, 2), fill(math.nan, 2), fill(math.nan, 3), fill(0.0, 2), cases=case)
    assert [each.difference for each in times] == [0, 0, math.inf, math.inf]


def test_inputs_are_the_same_for_all_and_integers_are_valid_indices(race: Callable[..., list[Times]]) -> None:
    kinds = ("float32", "float16", "int64", "bool")
    case = (*(Argument("input", dtype, (70_000,)) for dtype in kinds), Argument("size", "int64", number=7), OUTPUT)
    seen: list[list[Any]] = [[], []]

    def kernel(place: int) -> Kernel:
        def run(*arguments: Any) -> None:
            seen[place].append([*(array.copy() for array in arguments[:4]), arguments[4]])
            arguments[5][...] = 0

        return run

    race(kernel(0), kernel(1), cases=(case,))
    one, two = seen[0][0], seen[1][-1]
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert one[0].std() > 0.9 and one[1].dtype == np.float16 and not one[2].any() and one[3].all() and one[4] == 7


def test_weights_are_cold_in_turns_and_themselves_where_results_are_compared(race: Callable[..., list[Times]]) -> None:
    places: list[int] = []
    first: list[np.ndarray] = []

    def kernel(weight: Any, index: Any, out: Any) -> None:
        first.append(weight.copy())
        places.append(weight.__array_interface__["data"][0])
        assert index.tolist() == [5, 3]  # integers are never others
        out[...] = 0

    index = Argument("weight", "int64", (2,), np.array([5, 3]))
    race(kernel, kernel, cases=((WEIGHT, index, OUTPUT),))
    assert np.array_equal(first[0], WEIGHT.values)  # type: ignore[arg-type]
    assert len(set(places)) > 5 and all(place % 64 == 0 for place in places)


def test_activations_are_written_again_before_each_timed_call(race: Callable[..., list[Times]]) -> None:
    order: list[str] = []
    case = (INPUT, OUTPUT)

    def kernel(x: Any, out: Any) -> None:
        order.append("kernel")
        out[...] = x

    race(kernel, cases=(case,), refresh=lambda data, nothing: order.append(f"{data.dtype} {data.size} {nothing}"))
    assert order[:2] == ["kernel", "kernel"]  # results are compared
    assert order[2:] == ["int32 24 0", "kernel"] * (len(order) // 2 - 1) and len(order) >= 2 + 2 * 2 * 3


def test_a_race_survives_being_sent() -> None:
    case = (INPUT, WEIGHT, Argument("size", "int64", number=3), OUTPUT)
    race = Race([Entrant(b"a", "f", (case, case)), Entrant(b"b", "g", (case,))], b"support", 2, 3, 0.5, 4, 5)
    value, blobs = pack_race(race)
    assert len(blobs) == 4  # two libraries, the support and one array
    back = unpack_race(value, blobs)
    assert (back.support, back.threads, back.turns, back.seconds, back.cold_bytes, back.seed) == (
        b"support",
        2,
        3,
        0.5,
        4,
        5,
    )
    assert [entrant.library for entrant in back.entrants] == [b"a", b"b"]
    weight = back.entrants[0].cases[1][1]
    assert weight.values is not None and np.array_equal(weight.values, WEIGHT.values)  # type: ignore[arg-type]
    assert back.entrants[1].cases[0][2].number == 3 and back.entrants[1].cases[0][0].shape == (4, 6)
    times = [Times(((0.1, 0.2), (0.3, 0.4)), math.inf)]
    assert unpack_times(pack_times(times)) == times
