"""Find which of many rewrites is wrong when only the whole can be checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def find_wrong(ids: Sequence[str], fails: Callable[[Sequence[str]], bool]) -> str | None:
    """The last id of the shortest prefix of `ids` that fails; None where even no rewrite at all fails.

    All of `ids` are known to fail. `fails` is called at most log2(n) + 2 times. With one wrong rewrite it is that one;
    of two that are wrong only together it is the later one.
    """
    if fails(()):
        return None
    right, wrong = 0, len(ids)  # a prefix of `right` ids passes, one of `wrong` ids fails
    while wrong - right > 1:
        middle = (right + wrong) // 2
        if fails(ids[:middle]):
            wrong = middle
        else:
            right = middle
    return ids[wrong - 1]
