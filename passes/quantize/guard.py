"""Hold a quantized program to the quality of the float32 one: the most sensitive layers go back until it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from graphopt.contract import PassContext, TradeOff
from graphopt.data.dataset import View
from graphopt.data.metric import Metric, measure
from graphopt.passes.quantize.scheme import Scheme
from graphopt.passes.quantize.sensitivity import Layers, describe, noise, noise_alone
from graphopt.program import Program


@dataclass(frozen=True)
class Guarded:
    """A scheme whose loss is within bounds, unless even none of the layers would be, and how it came about."""

    scheme: Scheme
    notes: tuple[str, ...]
    trade_offs: tuple[TradeOff, ...]


def loss_on(original: Program, samples: View, metric: Metric | None) -> tuple[Callable[[Program], float], str]:
    """What a program loses against `original`, which is 0 for itself, and the name of that.

    The fall of the metric; without one, or for the metric snr, the noise's share of the power at the worst output.
    """
    if metric is None or metric.name == "snr":
        return lambda program: noise(program, original, samples), "noise's share of the power"
    before = measure(original, samples, metric, original)
    return lambda program: before - measure(program, samples, metric, original), f"fall of {metric.name}"


def guarded(scheme: Scheme, original: Program, samples: View, context: PassContext, most: float) -> Guarded:
    """`scheme` with as many of its most sensitive layers in float32 as bring the loss down to `most`.

    `samples` are for choosing, and neither what ranges were taken from nor what is held out.
    """
    layers = Layers.of(scheme).names
    loss, what = loss_on(original, samples, context.metric)
    ranking = noise_alone(scheme, layers, samples, context)
    order = list(ranking)
    trade_offs = []
    first = None
    for count in range(len(order) + 1):
        context.progress("quantize: guard", count, len(order))
        back = dict.fromkeys(order[:count], f"max-drop={most:g} is exceeded with its codes")
        tried = replace(scheme, floats={**scheme.floats, **back})
        found = loss(tried.write(PassContext()).program)
        first = found if first is None else first
        trade_offs.append(TradeOff("layers in float32", count, "", -found, None))
        if found <= most:
            break
    named = f" ({', '.join(order[:count])})" if count else ""
    held = "holds" if found <= most else "does not hold, whatever is quantized"
    note = (
        f"max-drop={most:g} {held}: {what} is {found:.3g} with {count} of {len(order)} layers in float32{named}, "
        f"{first:.3g} with none, on {len(samples)} samples that no range was taken from"
    )
    return Guarded(tried, (describe(ranking), note), tuple(trade_offs))
