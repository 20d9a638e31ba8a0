"""How much each layer's codes alone disturb the outputs, measured on samples that no range was taken from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from graphopt.contract import PassContext
from graphopt.data.dataset import View
from graphopt.data.metric import measure, open_metric
from graphopt.passes.quantize.scheme import Scheme
from graphopt.program import Program

SAMPLES = 64  # at most so many feeds are run for each layer
_ELSEWHERE = "another layer is measured"


@dataclass(frozen=True)
class Layers:
    """The layers of a scheme that are written in codes, by name, in order of execution."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, scheme: Scheme) -> Layers:
        placements, name = scheme.survey()
        found = [
            name(node)
            for item in placements
            for node, layer in item.layers.items()
            if node in item.readers or (layer.weight is not None and scheme.weight is not None)
        ]
        return cls(tuple(found))


def noise_alone(scheme: Scheme, names: Sequence[str], samples: View, context: PassContext) -> dict[str, float]:
    """For each layer, by name: noise power over signal power at the worst output, where it alone has codes.

    `scheme.program` is what it is compared with. Most sensitive first; equals in order of execution.
    """
    few = View(samples.source, samples.start, min(samples.stop, samples.start + SAMPLES))
    everything = Layers.of(scheme).names
    found: dict[str, float] = {}
    for number, name in enumerate(names):
        context.progress("quantize: sensitivity", number, len(names))
        others = dict.fromkeys((item for item in everything if item != name), _ELSEWHERE)
        alone = replace(scheme, floats={**scheme.floats, **others}).write(PassContext()).program
        found[name] = noise(alone, scheme.program, few)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def noise(program: Program, reference: Program, samples: View) -> float:
    """Noise power over signal power at the worst output."""
    decibels = measure(program, samples, open_metric("snr"), reference)
    return float(10 ** (-decibels / 10))


def describe(ranking: Mapping[str, float]) -> str:
    """The ranking as a sentence, most sensitive first."""
    each = ", ".join(f"{name} {share:.2g}" for name, share in ranking.items())
    return f"sensitivity, as the noise's share of the outputs' power with one layer alone in codes: {each}"
