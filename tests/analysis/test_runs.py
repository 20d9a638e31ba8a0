from __future__ import annotations

import pytest

from graphopt.analysis.runs import Run, find_runs


@pytest.mark.parametrize(
    ("letters", "words"),
    [
        ("", []),
        ("abc", []),
        ("abab", ["ab", "ab"]),
        ("xababy", ["ab", "ab"]),
        ("aaaa", ["a"] * 4),
        ("dabcdabcd", ["abcd", "abcd"]),  # cut at the front
        ("pmqmpmqm", ["pmqm", "pmqm"]),
        ("aabaab", ["aab", "aab"]),  # longer before shorter
        ("xxyxyxy", ["xy", "xy", "xy"]),
        ("abababcccc", ["ab", "ab", "ab", "c", "c", "c", "c"]),
        ("abcab", []),
    ],
)
def test_words(letters: str, words: list[str]) -> None:
    runs = find_runs([ord(letter) for letter in letters], [1] * len(letters))
    assert ["".join(letters[i] for i in word) for run in runs for word in run.words()] == words


def test_what_covers_more_weight_goes_first() -> None:
    letters = [1, 2, 1, 2, 2]
    assert find_runs(letters, [1, 1, 1, 1, 1]) == [Run(0, 2, 2)]
    assert find_runs(letters, [1, 1, 1, 9, 9]) == [Run(3, 1, 2)]


def test_runs_do_not_overlap() -> None:
    runs = find_runs([1, 1, 2, 1, 1, 2, 1, 1, 3, 3], [1] * 10)
    assert [(run.start, run.end) for run in runs] == [(0, 2), (2, 8), (8, 10)]
