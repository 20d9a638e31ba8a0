"""Names of packed weights."""

from __future__ import annotations

import torch

from graphopt.backends.packed_weights import Weights


def test_names_differ_after_one_is_taken_back() -> None:
    weights = Weights()
    tensors = [torch.full((2,), float(number)) for number in range(4)]
    first = [weights.add(tensor, "constant", "", None) for tensor in tensors[:3]]
    weights.forget(first[1])
    last = weights.add(tensors[3], "constant", "", None)
    assert last not in (first[0], first[2]) and weights.arrays[last][0] == 3
    assert [weights.arrays[name][0] for name in (first[0], first[2])] == [0, 2]
