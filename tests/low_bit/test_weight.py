"""What a low-bit weight stands for, by the formula; what is not one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from graphopt.errors import UsageError
from graphopt.low_bit.weight import LowBitWeight


def weight(**changes: Any) -> LowBitWeight:
    """4 x 40 in groups of 16, the last one of 8."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (4, 40), generator=generator, dtype=torch.uint8)
    scale = torch.rand(4, 3, generator=generator) + 0.5
    return replace(LowBitWeight(codes, scale, 4, 16), **changes)


ZERO = torch.tensor([[7.5, 8, 3], [0, 1, 2], [15, 14, 13], [-1, 0.25, 9]])
BOOK = torch.arange(-8, 8, dtype=torch.int8)
TAG = torch.tensor([[0, 1, 2], [2, 1, 0], [0, 0, 0], [1, 2, 1]], dtype=torch.uint8)
ORDER = torch.randperm(40, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"zero": ZERO},
        {"codebook": BOOK},
        {"codebook": torch.stack([BOOK, BOOK * 2, -BOOK]), "tag": TAG, "zero": ZERO},
        {"permutation": ORDER, "zero": ZERO},
    ],
)
def test_every_number_follows_the_formula(changes: dict[str, Any]) -> None:
    made = weight(**changes)
    numbers = made.dequantize()
    for row in range(4):
        for column in range(40):
            group, code = column // 16, int(made.codes[row, column])
            value: float = code
            if made.codebook is not None:
                book = made.codebook if made.tag is None else made.codebook[int(made.tag[row, group])]
                value = int(book[code])
            zero = 0.0 if made.zero is None else float(made.zero[row, group])
            place = column if made.permutation is None else int(made.permutation[column])
            assert float(numbers[row, place]) == pytest.approx(float(made.scale[row, group]) * (value - zero), rel=1e-6)


def test_bytes_count_packed_codes() -> None:
    assert weight().bytes == 4 * 40 // 2 + 4 * 12 and weight(zero=ZERO).bytes == 80 + 2 * 48
    assert weight().bits_a_weight == 8 * (80 + 48) / 160


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 0}, "has 1 to 8 bits, not 0"),
        ({"bits": 3}, "does not fit 3 bits"),
        ({"group": 8}, "group=8 .* with 40 columns must be 16 to 40"),
        ({"group": 48}, "must be 16 to 40"),
        ({"codes": torch.zeros(4, 40)}, r"codes of a low-bit weight are uint8 \[N, K\], not float32\[4, 40\]"),
        ({"scale": torch.ones(4, 2)}, r"scale of a low-bit weight is float32\[4, 3\], not float32\[4, 2\]"),
        ({"scale": torch.full((4, 3), float("inf"))}, "infinities or NaN"),
        ({"zero": torch.zeros(4, 3, dtype=torch.int32)}, r"zero .* is float32\[4, 3\], not int32"),
        ({"codebook": BOOK[:8]}, r"codebook .* is int8\[16\], not int8\[8\]"),
        ({"tag": TAG}, "tag of a low-bit weight chooses among codebooks"),
        ({"codebook": torch.stack([BOOK, BOOK]), "tag": TAG}, "tag 2 .* names none of 2 codebooks"),
        ({"permutation": torch.zeros(40, dtype=torch.int64)}, "does not name each of 40 columns once"),
    ],
)
def test_what_is_no_weight_is_said_in_a_sentence(changes: dict[str, Any], words: str) -> None:
    made: Callable[[], LowBitWeight] = lambda: weight(**changes)  # noqa: E731
    with pytest.raises(UsageError, match=words):
        made()
