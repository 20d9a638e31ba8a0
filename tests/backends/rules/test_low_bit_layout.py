"""Packed codes: every one is found where `fields` says, in the memory that its bits need."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.backends.rules.low_bit_layout import QUAD, Layout
from graphopt.backends.rules.low_bit_nibbles import Nibbles


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n, k, group", [(48, 128, 32), (37, 100, 16), (64, 70, 70), (5, 64, 24), (130, 96, 5)])
@pytest.mark.parametrize("lanes, vectors", [(16, 2), (8, 4), (4, 2)])
def test_codes_are_found_again(bits: int, n: int, k: int, group: int, lanes: int, vectors: int) -> None:
    layout = Layout(n, k, bits, group, lanes, vectors)
    codes = np.random.default_rng(0).integers(0, 1 << bits, (n, k), dtype=np.uint8)
    words = layout.pack(codes).reshape(layout.panels, layout.groups, layout.steps, layout.step_vectors, lanes, QUAD)
    found = np.zeros((layout.panels, vectors, lanes, layout.groups, layout.steps, layout.quads, QUAD), np.uint8)
    for quad in range(layout.quads):
        for vector in range(vectors):
            for field in layout.fields(quad, vector):
                value = words[:, :, :, field.vector] >> field.position & (1 << field.part.bits) - 1
                found[:, vector, :, :, :, quad] |= (value << field.part.place).transpose(0, 3, 1, 2, 4)
    assert np.array_equal(found.reshape(-1, layout.packed_k), layout.spread(codes))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [16, 32, 64, 128, 4096])
def test_codes_take_their_bits(bits: int, group: int) -> None:
    layout = Layout(64, 4096, bits, group, 16, 2)
    assert layout.packed_k == 4096
    assert layout.pack(np.zeros((64, 4096), np.uint8)).nbytes == 64 * 4096 * bits // 8


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n, k, group", [(48, 128, 32), (37, 100, 16), (5, 64, 24), (130, 96, 4)])
@pytest.mark.parametrize("lanes, vectors", [(16, 4), (8, 4), (4, 8)])
def test_half_bytes_are_found_again(bits: int, n: int, k: int, group: int, lanes: int, vectors: int) -> None:
    """Bit j of the half byte `quad` of plane i is bit i of number 4 quad + j of the step."""
    layout = Nibbles(n, k, bits, group, lanes, vectors)
    codes = np.random.default_rng(0).integers(0, 1 << bits, (n, k), dtype=np.uint8)
    packed = layout.pack(codes)
    assert packed.shape[-1] == layout.step_vectors * lanes * 4 and layout.depth >= layout.apart.depth
    planes = packed.reshape(layout.panels, layout.groups, layout.steps, bits, vectors // 4, 4 * lanes)
    found = np.zeros((layout.panels, vectors // 4, 4 * lanes, layout.groups, layout.steps, 2, 4), np.uint8)
    for plane in range(bits):
        for quad in range(2):
            for number in range(4):
                bit = planes[:, :, :, plane] >> 4 * quad + number & 1
                found[..., quad, number] |= (bit << plane).transpose(0, 3, 4, 1, 2)
    assert np.array_equal(found.reshape(-1, layout.packed_k), layout.spread(codes))
