"""What follows in a recurrent layer from the sums of its gates, at some units of one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

Function = tuple[Callable[[Any], Any], ...]  # applied one after the other
Gate = Callable[[int], Any]  # the number of a gate -> its value
Cell = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Units:
    """Values at some units. `sums` is the product with a vector of the row, `given` what the input and the biases add.

    `kept` is what an earlier stage has stored; `own_bias` and `peepholes` are None where there are none. `settle` keeps
    a value in registers: TVM's simplifier looks through variables, and takes minutes for comparisons of comparisons.
    """

    sums: Gate
    given: Gate
    h: Any
    c: Any
    kept: Any
    own_bias: Any
    peepholes: Gate | None
    settle: Callable[[Any], Any]

    def apply(self, function: Function, x: Any) -> Any:
        for step in function:
            x = self.settle(step(T.bind(x)))
        return x


@dataclass(frozen=True)
class Layer:
    """A layer whose directions run backwards where `reverse`, each with its own activations, clipping included."""

    kind: str
    hidden: int
    reverse: tuple[bool, ...]
    functions: tuple[tuple[Function, ...], ...]
    flag: bool  # input_forget of lstm, linear_before_reset of gru
    dtype: str  # computed in

    @property
    def gates(self) -> int:
        return {"rnn": 1, "gru": 3, "lstm": 4}[self.kind]

    @property
    def states(self) -> int:
        return 2 if self.kind == "lstm" else 1

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The gates of each product: with the state, then (gru) with the state as its reset gate has changed it."""
        return ((0, 1), (2,)) if self._in_two else (tuple(range(self.gates)),)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """For each stage what computes, from the layer, the number of the direction and units, the values to store.

        The last one gives the new states, one before it what is kept and the vector of the next product.
        """
        if self._in_two:
            return _gru_gates, _gru_new
        return ({"rnn": _rnn, "gru": _gru, "lstm": _lstm}[self.kind],)

    @property
    def keeps_bias(self) -> bool:
        """Whether the reset gate multiplies one of the biases too."""
        return self.kind == "gru" and self.flag

    @property
    def _in_two(self) -> bool:
        return self.kind == "gru" and not self.flag


def _rnn(layer: Layer, number: int, at: Units) -> tuple[Any, ...]:
    return (at.apply(layer.functions[number][0], at.sums(0) + at.given(0)),)


def _lstm(layer: Layer, number: int, at: Units) -> tuple[Any, ...]:
    gate, new, out = layer.functions[number]

    def open_gate(place: int, peephole: int, c: Any) -> Any:
        total = at.sums(place) + at.given(place)
        return at.apply(gate, total if at.peepholes is None else total + at.peepholes(peephole) * c)

    i = open_gate(0, 0, at.c)
    f = tirx.const(1, layer.dtype) - i if layer.flag else open_gate(2, 2, at.c)
    c = at.settle(f * at.c + i * at.apply(new, at.sums(3) + at.given(3)))
    return open_gate(1, 1, c) * at.apply(out, c), c


def _gru(layer: Layer, number: int, at: Units) -> tuple[Any, ...]:
    gate, new = layer.functions[number]
    kept, reset = (at.apply(gate, at.sums(place) + at.given(place)) for place in (0, 1))
    product = at.sums(2) if at.own_bias is None else at.sums(2) + at.own_bias
    return (_between(layer, kept, at.apply(new, at.given(2) + reset * product), at.h),)


def _gru_gates(layer: Layer, number: int, at: Units) -> tuple[Any, ...]:
    kept, reset = (at.apply(layer.functions[number][0], at.sums(place) + at.given(place)) for place in (0, 1))
    return kept, reset * at.h


def _gru_new(layer: Layer, number: int, at: Units) -> tuple[Any, ...]:
    return (_between(layer, at.kept, at.apply(layer.functions[number][1], at.sums(2) + at.given(2)), at.h),)


def _between(layer: Layer, kept: Any, value: Any, h: Any) -> Any:
    return (tirx.const(1, layer.dtype) - kept) * value + kept * h


def unknown_units(layer: Layer) -> Units:
    """Units of which nothing is known, to count the operations on them."""

    def number(*_: Any) -> Any:
        return tirx.Var("number", layer.dtype)

    return Units(number, number, number(), number(), number(), number() if layer.keeps_bias else None, None, T.bind)
