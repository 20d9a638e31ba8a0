"""Mixed precision: narrower codes for the layers that mind them least, until a budget of bytes or seconds is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from graphopt.contract import PassContext, TradeOff
from graphopt.data.dataset import View
from graphopt.edit import Edit
from graphopt.errors import UsageError
from graphopt.passes.quantize.placement import place
from graphopt.passes.quantize.scheme import Scheme
from graphopt.passes.quantize.sensitivity import Layers, describe, noise, noise_alone
from graphopt.passes.quantize.weights import WeightForm
from graphopt.passes.quantize.writing import RULE
from graphopt.passes.scale_folding import PRODUCTS


@dataclass(frozen=True)
class Budgeted:
    """A scheme within its budget, and how it came about."""

    scheme: Scheme
    notes: tuple[str, ...]
    trade_offs: tuple[TradeOff, ...] = ()


@dataclass(frozen=True)
class Stored:
    """A layer's weight in two forms: bytes in each, and in float32."""

    floats: int
    wide: int
    narrow: int | None


@dataclass(frozen=True)
class Choice:
    """One way to store a weight: its bytes, and the noise at the outputs where it alone is stored so."""

    bytes: int
    noise: float


def least_noise(choices: Mapping[str, Sequence[Choice]], most: float) -> dict[str, int]:
    """Which of its choices, widest first, each weight takes: narrowed step by step, least noise a saved byte first.

    Ends when all together take `most` bytes, or when nothing is left to narrow.
    """
    chosen = dict.fromkeys(choices, 0)
    taken = sum(items[0].bytes for items in choices.values())

    def narrower(name: str) -> int | None:
        """The next choice that saves bytes."""
        items, now = choices[name], chosen[name]
        return next((place for place in range(now + 1, len(items)) if items[place].bytes < items[now].bytes), None)

    def price(name: str) -> float:
        now, then = choices[name][chosen[name]], choices[name][left[name]]
        return (then.noise - now.noise) / (now.bytes - then.bytes)

    while taken > most and (left := {name: place for name in choices if (place := narrower(name)) is not None}):
        name = min(left, key=price)
        taken -= choices[name][chosen[name]].bytes - choices[name][left[name]].bytes
        chosen[name] = left[name]
    return chosen


def for_bytes(scheme: Scheme, share: float, narrow: WeightForm, samples: View, context: PassContext) -> Budgeted:
    """Layers in `narrow` codes, least noise a saved byte first, until all weights take `share` of their float32 bytes.

    Raises UsageError where even all of them do not get there.
    """
    stored = _stored(scheme, narrow)
    whole = sum(item.floats for item in stored.values())
    taken = sum(item.wide for item in stored.values())
    names = [name for name, item in stored.items() if item.narrow is not None and item.narrow < item.wide]
    least = taken - sum(stored[name].wide - (stored[name].narrow or 0) for name in names)
    if least > share * whole:
        raise UsageError(
            f"size-budget={share:g} cannot be met: in {narrow.kind} wherever that can be, weights take "
            f"{least / whole:.3g} of their float32 bytes; give more, or a larger group-size"
        )
    if taken <= share * whole:
        return Budgeted(scheme, (f"size-budget={share:g} is met as it is: weights take {taken / whole:.3g}",))
    narrowed = replace(scheme, forms=dict.fromkeys(names, narrow))
    noises = noise_alone(narrowed, names, samples, context)
    own = noise_alone(scheme, names, samples, context)
    choices = {
        name: (Choice(stored[name].wide, own[name]), Choice(stored[name].narrow or 0, noises[name])) for name in names
    }
    rest = taken - sum(stored[name].wide for name in names)
    chosen = least_noise(choices, share * whole - rest)
    forms = {name: narrow for name in noises if chosen[name]}
    taken -= sum(stored[name].wide - (stored[name].narrow or 0) for name in forms)
    note = (
        f"size-budget={share:g} is met: weights take {taken / whole:.3g} of their float32 bytes with {len(forms)} of "
        f"{len(stored)} layers in {narrow.kind}: {', '.join(forms)}"
    )
    return Budgeted(replace(scheme, forms=forms), (describe(noises), note))


def _stored(scheme: Scheme, narrow: WeightForm) -> dict[str, Stored]:
    """The bytes of every weight that gets codes, by the name of its layer.

    One that layers share counts once, for the first, and is never narrow.
    """
    found: dict[str, Stored] = {}
    first: dict[int, str] = {}
    for editor in Edit(scheme.program, PassContext(), RULE).graphs():
        for node, layer in place(editor, scheme.rules()).layers.items():
            if layer.weight is None or scheme.weight is None:
                continue
            value = editor.constant_value(layer.weight)
            assert isinstance(value, Tensor)
            name = editor.full_name(node)
            if (shared := first.setdefault(id(value), name)) != name:
                found[shared] = replace(found[shared], narrow=None)
                continue
            product = PRODUCTS[node.target]
            axes = product.outputs, product.inputs
            wide = scheme.weights.of(value, scheme.weight, *axes).bytes
            small = None if narrow.refusal(value) else scheme.weights.of(value, narrow, *axes).bytes
            found[name] = Stored(value.numel() * 4, wide, small)
    return found


def for_seconds(scheme: Scheme, share: float, samples: View, context: PassContext) -> Budgeted:
    """As few layers in codes as bring one run down to `share` of the float32 program's seconds, least noise first.

    Raises UsageError where there is no device to measure on, or codes for all layers do not get there.
    """
    before = context.measure(scheme.program)
    if before is None:
        raise UsageError(f"latency-budget needs a device, and {context.target} is not at hand; leave it out")
    ranking = noise_alone(scheme, Layers.of(scheme).names, samples, context)
    order = list(ranking)  # most sensitive first: float32 for the first `count`
    times: dict[int, float] = {}
    points = []

    def seconds(count: int) -> float:
        if count not in times:
            program = _with_floats(scheme, order[:count]).write(PassContext()).program
            timing = context.measure(program)
            assert timing is not None
            times[count] = timing.seconds
            lost = noise(program, scheme.program, samples)
            points.append(TradeOff("layers in float32", count, "", -lost, timing.seconds))
        return times[count]

    limit = share * before.seconds
    if seconds(0) > limit:
        raise UsageError(
            f"latency-budget={share:g} cannot be met: with codes everywhere a run takes "
            f"{seconds(0) / before.seconds:.3g} of the float32 program's time; give more"
        )
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        if seconds(middle) <= limit:
            low = middle
        else:
            high = middle - 1
    note = (
        f"latency-budget={share:g} is met: {1e3 * seconds(low):.3f} ms instead of {1e3 * before.seconds:.3f} ms with "
        f"{low} of {len(order)} layers in float32{': ' + ', '.join(order[:low]) if low else ''}"
    )
    points.sort(key=lambda point: point.value)
    return Budgeted(_with_floats(scheme, order[:low]), (describe(ranking), note), tuple(points))


def _with_floats(scheme: Scheme, names: list[str]) -> Scheme:
    back = dict.fromkeys(names, "latency-budget is met without its codes, and it is among the most sensitive")
    return replace(scheme, floats={**scheme.floats, **back})
