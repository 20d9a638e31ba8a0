from __future__ import annotations

import pytest

from graphopt.backends.target import MOST_THREADS, resolve_target
from graphopt.errors import UsageError


@pytest.mark.parametrize("threads", [0, -1, MOST_THREADS + 1, 10**9])
def test_threads_out_of_range(threads: int) -> None:
    with pytest.raises(UsageError, match=f"threads is {threads}; give a number of at"):
        resolve_target("cpu:x86-64-v3", threads)


def test_threads_of_a_large_machine() -> None:
    assert resolve_target("cpu:x86-64-v3", MOST_THREADS).threads == MOST_THREADS
