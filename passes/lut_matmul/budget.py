"""Bits for each layer within a budget of bytes, by how much each layer minds fewer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from graphopt.contract import PassContext
from graphopt.data.dataset import View
from graphopt.errors import UsageError
from graphopt.low_bit.weight import LowBitWeight
from graphopt.passes.lut_matmul.encoding import Encoder
from graphopt.passes.lut_matmul.layers import Layer
from graphopt.passes.quantize.budget import Choice, least_noise
from graphopt.passes.quantize.sensitivity import SAMPLES, noise
from graphopt.program import Program

FEWEST = 2

Write = Callable[[Mapping[str, LowBitWeight]], Program]
"""The program with some weights in few bits and all else as it is."""


def bits_within(
    share: float,
    most_bits: int,
    layers: Mapping[str, Layer],
    encoder: Encoder,
    write: Write,
    samples: View,
    context: PassContext,
) -> tuple[dict[str, int], str]:
    """Bits by layer with which all take `share` of their float32 bytes, and a note on them.

    Every layer is measured alone, in every number of bits from `most_bits` to 2, on `samples`. Raises UsageError where
    2 bits for all are still too many.
    """
    reference = write({})
    few = View(samples.source, samples.start, min(samples.stop, samples.start + SAMPLES))
    limit = share * sum(4 * layer.floats().numel() for layer in layers.values())
    widths = range(most_bits, FEWEST - 1, -1)
    choices: dict[str, list[Choice]] = {}
    for number, (name, layer) in enumerate(layers.items()):
        context.progress("lut-matmul: sensitivity", number, len(layers))
        weights = [encoder.encode(name, layer, bits) for bits in widths]
        choices[name] = [Choice(item.bytes, noise(write({name: item}), reference, few)) for item in weights]
    chosen = least_noise(choices, limit)
    taken = sum(choices[name][place].bytes for name, place in chosen.items())
    if taken > limit:
        raise UsageError(
            f"size-budget={share:g} cannot be met: in {FEWEST} bits weights take {share * taken / limit:.3g} of their "
            "float32 bytes; give more, or a larger group-size"
        )
    bits = {name: widths[place] for name, place in chosen.items()}
    each = ", ".join(f"{name} {count}" for name, count in bits.items())
    return bits, f"size-budget={share:g} is met: weights take {share * taken / limit:.3g}; bits by layer: {each}"
