"""graphopt::rnn, graphopt::gru and graphopt::lstm: one recurrent layer over whole sequences, in one or two directions.

The functions here are the specification. D is the number of directions, G that of gates: 1, 3 (z, r, h) and 4
(i, o, f, c). Tensors lie as ONNX has them, with layout 0:

- `x` [T, B, I]; `w` [D, G H, I]; `r` [D, G H, H]; `b` [D, 2 G H], what is added to the product with x, then to that
  with the state; `p` [D, 3 H], peepholes of i, o and f;
- `initial_h`, `initial_c` [D, B, H], zero where left out;
- `sequence_lens` [B], any integers from 0 to T: row n ends after so many steps. Its last state is the one it had then,
  zero for a row of no steps; its outputs behind are zero, and the reverse direction begins at its own end;
- results `y` [T, B, D, H] seen as [T, D, B, H], `y_h` and `y_c` [D, B, H].

Options: `direction` "forward", "reverse" or "bidirectional"; `activations`, for each direction those of the gates, of
the new value and (lstm) of the cell, with `alpha` and `beta`, one number for each of them; `clip`, which bounds the
input of every activation but that of the cell; `input_forget`, f = 1 - i; `linear_before_reset`: the reset gate
multiplies the product with the state, as in PyTorch, and not the state.

Source: ONNX RNN, GRU and LSTM, opset 14 and 22; where they say nothing, ONNX Runtime. float16 and bfloat16 are
computed in float32 and rounded at the end. Gradients are those of the functions here. All raise UsageError for shapes
and options that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.operators.quantization import computed_in

DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}  # whether time runs backwards
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
USUAL = {"rnn": ("Tanh",), "gru": ("Sigmoid", "Tanh"), "lstm": ("Sigmoid", "Tanh", "Tanh")}


@dataclass(frozen=True)
class Activation:
    """function(x, alpha, beta), and the numbers where none are given; None: it has no such number."""

    function: Callable[[Tensor, float, float], Tensor]
    alpha: float | None = None
    beta: float | None = None


ACTIVATIONS: dict[str, Activation] = {
    "Sigmoid": Activation(lambda x, alpha, beta: torch.sigmoid(x)),
    "Tanh": Activation(lambda x, alpha, beta: torch.tanh(x)),
    "Relu": Activation(lambda x, alpha, beta: torch.relu(x)),
    "Affine": Activation(lambda x, alpha, beta: alpha * x + beta, 1.0, 0.0),
    "LeakyRelu": Activation(lambda x, alpha, beta: torch.where(x < 0, alpha * x, x), 0.01),
    "ThresholdedRelu": Activation(lambda x, alpha, beta: torch.where(x <= alpha, 0, x), 1.0),
    "ScaledTanh": Activation(lambda x, alpha, beta: alpha * torch.tanh(beta * x), 1.0, 1.0),
    "HardSigmoid": Activation(lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1), 0.2, 0.5),
    "Elu": Activation(lambda x, alpha, beta: torch.where(x < 0, alpha * torch.expm1(x), x), 1.0),
    "Softsign": Activation(lambda x, alpha, beta: x / (1 + x.abs())),
    "Softplus": Activation(lambda x, alpha, beta: torch.nn.functional.softplus(x)),
}
_OPTIONS = 'str direction="forward", str[]? activations=None, float[]? alpha=None, float[]? beta=None, float? clip=None'


@dataclass(frozen=True)
class Options:
    """The options of a layer, left-out ones filled in."""

    kind: str
    reverse: tuple[bool, ...]
    activations: tuple[tuple[str, ...], ...]  # for each direction
    alpha: tuple[tuple[float, ...], ...]
    beta: tuple[tuple[float, ...], ...]
    clip: float | None
    flag: bool  # input_forget of lstm, linear_before_reset of gru


def read_options(
    kind: str,
    *,
    direction: str = "forward",
    activations: Sequence[str] | None = None,
    alpha: Sequence[float] | None = None,
    beta: Sequence[float] | None = None,
    clip: float | None = None,
    input_forget: bool = False,
    linear_before_reset: bool = False,
) -> Options:
    """What the options of an operator say. Raises UsageError for those that say nothing."""
    if direction not in DIRECTIONS:
        raise UsageError(f"direction {direction!r} of graphopt::{kind} is none of {', '.join(DIRECTIONS)}")
    reverse, each = DIRECTIONS[direction], len(USUAL[kind])
    names = list(USUAL[kind] * len(reverse) if activations is None else activations)
    for name in names:
        if name not in ACTIVATIONS:
            raise UsageError(f"activation {name!r} of graphopt::{kind} is none of {', '.join(ACTIVATIONS)}")
    alpha = [ACTIVATIONS[name].alpha or 0.0 for name in names] if alpha is None else alpha
    beta = [ACTIVATIONS[name].beta or 0.0 for name in names] if beta is None else beta
    if any(len(values) != each * len(reverse) for values in (names, alpha, beta)):
        raise UsageError(f"graphopt::{kind} takes {each * len(reverse)} activations, each with an alpha and a beta")

    def shared_out(values: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(values[start : start + each]) for start in range(0, len(values), each))

    flag = input_forget or linear_before_reset
    return Options(kind, reverse, shared_out(names), shared_out(alpha), shared_out(beta), clip, flag)


@torch.library.custom_op(
    "graphopt::rnn",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor r, Tensor? b=None, Tensor? sequence_lens=None, Tensor? initial_h=None, *, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
)
def rnn(x: Tensor, w: Tensor, r: Tensor, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """h = f(W x + R h + b): y and y_h."""
    y, y_h = _layer("rnn", (x, w, r, *tensors), options)
    return y, y_h


@torch.library.custom_op(
    "graphopt::gru",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor r, Tensor? b=None, Tensor? sequence_lens=None, Tensor? initial_h=None, *, "
    f"{_OPTIONS}, bool linear_before_reset=False) -> (Tensor, Tensor)",
)
def gru(x: Tensor, w: Tensor, r: Tensor, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """h = (1 - z) n + z h, where n is the new value: y and y_h."""
    y, y_h = _layer("gru", (x, w, r, *tensors), options)
    return y, y_h


@torch.library.custom_op(
    "graphopt::lstm",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor r, Tensor? b=None, Tensor? sequence_lens=None, Tensor? initial_h=None, "
    f"Tensor? initial_c=None, Tensor? p=None, *, {_OPTIONS}, bool input_forget=False) -> (Tensor, Tensor, Tensor)",
)
def lstm(x: Tensor, w: Tensor, r: Tensor, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """c = f c + i n, where n is the new value, and h = o act(c): y, y_h and y_c."""
    y, y_h, y_c = _layer("lstm", (x, w, r, *tensors), options)
    return y, y_h, y_c


def _layer(kind: str, tensors: Sequence[Tensor | None], given: dict[str, Any]) -> tuple[Tensor, ...]:
    options = read_options(kind, **given)
    x, w, r, b, lens, h, c, p = _eight(tensors)
    _check(options, tensors)
    compute, hidden, batch = computed_in(x.dtype), r.shape[2], x.shape[1]
    none = x.new_zeros((1, 1, 1), dtype=compute).expand(len(options.reverse), batch, hidden)
    states = [none if state is None else state.to(compute) for state in (h, c)][: 2 if kind == "lstm" else 1]
    results = []
    for number in range(len(options.reverse)):
        mine = [None if value is None else value[number].to(compute) for value in (w, r, b, p)]
        results.append(_one_direction(options, number, x.to(compute), mine, lens, [s[number] for s in states]))
    y = torch.stack([outputs for outputs, _ in results], 2).to(x.dtype).contiguous().transpose(1, 2)
    last = zip(*(state for _, state in results), strict=True)
    return y, *(torch.stack(each).to(x.dtype).contiguous() for each in last)


def _one_direction(
    options: Options, number: int, x: Tensor, weights: Sequence[Any], lens: Tensor | None, state: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor]]:
    """The outputs [T, B, H] and the last state."""
    w, r, b, p = weights
    steps, hidden = x.shape[0], r.shape[1]
    bias = x.new_zeros(2 * r.shape[0]) if b is None else b
    projected = x @ w.t() + bias[: r.shape[0]]
    place = None
    if options.reverse[number]:
        place = _reversed(steps, lens, x)
        projected = projected.gather(0, place[..., None].expand_as(projected))
    cell = _CELLS[options.kind](options, number, r, bias[r.shape[0] :], p)
    outputs = []
    for step in range(steps):
        new = cell(projected[step], *state)
        if lens is None:
            outputs.append(new[0])
            state = new
        else:
            active = (step < lens)[:, None]
            outputs.append(torch.where(active, new[0], 0))
            state = [torch.where(active, after, before) for after, before in zip(new, state, strict=True)]
    if lens is not None:
        state = [torch.where((lens > 0)[:, None], value, 0) for value in state]
    y = torch.stack(outputs) if outputs else x.new_zeros((0, x.shape[1], hidden))
    return (y if place is None else y.gather(0, place[..., None].expand_as(y))), state


def _reversed(steps: int, lens: Tensor | None, x: Tensor) -> Tensor:
    """[T, B]: which step of a row stands at each place once every row is turned around up to its own end."""
    step = torch.arange(steps, device=x.device)[:, None].expand(steps, x.shape[1])
    if lens is None:
        return steps - 1 - step
    end = lens.to(torch.int64)[None]
    return torch.where(step < end, end - 1 - step, step)


def _functions(options: Options, number: int) -> list[Callable[[Tensor], Tensor]]:
    """The activations of a direction; all but that of a cell clip."""

    def make(place: int, name: str, alpha: float, beta: float) -> Callable[[Tensor], Tensor]:
        function = ACTIVATIONS[name].function
        bound = options.clip if place < 2 else None
        return lambda value: function(value if bound is None else value.clamp(-bound, bound), alpha, beta)

    parts = options.activations[number], options.alpha[number], options.beta[number]
    return [make(place, *each) for place, each in enumerate(zip(*parts, strict=True))]


def _rnn_cell(options: Options, number: int, r: Tensor, b: Tensor, p: Tensor | None) -> Callable[..., Any]:
    (function,) = _functions(options, number)
    return lambda given, h: (function(given + h @ r.t() + b),)


def _gru_cell(options: Options, number: int, r: Tensor, b: Tensor, p: Tensor | None) -> Callable[..., Any]:
    gate, new = _functions(options, number)
    hidden = r.shape[1]
    gates, own = slice(0, 2 * hidden), slice(2 * hidden, None)

    def cell(given: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        keep, reset = gate(given[:, gates] + h @ r[gates].t() + b[gates]).chunk(2, 1)
        if options.flag:
            fresh = new(given[:, own] + reset * (h @ r[own].t() + b[own]))
        else:
            fresh = new(given[:, own] + (reset * h) @ r[own].t() + b[own])
        return ((1 - keep) * fresh + keep * h,)

    return cell


def _lstm_cell(options: Options, number: int, r: Tensor, b: Tensor, p: Tensor | None) -> Callable[..., Any]:
    gate, new, out = _functions(options, number)
    peep = (0, 0, 0) if p is None else p.chunk(3)

    def cell(given: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        i, o, f, n = (given + h @ r.t() + b).chunk(4, 1)
        i = gate(i + peep[0] * c)
        f = 1 - i if options.flag else gate(f + peep[2] * c)
        c = f * c + i * new(n)
        return gate(o + peep[1] * c) * out(c), c

    return cell


_CELLS: dict[str, Callable[..., Callable[..., Any]]] = {"rnn": _rnn_cell, "gru": _gru_cell, "lstm": _lstm_cell}


def _eight(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return (*tensors, *[None] * (8 - len(tensors)))


def _check(options: Options, tensors: Sequence[Tensor | None]) -> None:
    x, w, r, b, lens, h, c, p = _eight(tensors)
    if x.ndim != 3 or r.ndim != 3:
        raise UsageError(
            f"graphopt::{options.kind} takes x [T, B, I] and r [D, G H, H], not of {x.ndim}, {r.ndim} axes"
        )
    directions, hidden = len(options.reverse), r.shape[2]
    rows, state = GATES[options.kind] * hidden, (directions, x.shape[1], hidden)
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "w": (w, (directions, rows, x.shape[2])),
        "r": (r, (directions, rows, hidden)),
        "b": (b, (directions, 2 * rows)),
        "sequence_lens": (lens, (x.shape[1],)),
        "initial_h": (h, state),
        "initial_c": (c, state),
        "p": (p, (directions, 3 * hidden)),
    }
    for name, (value, shape) in wanted.items():
        if value is not None and (value.ndim != len(shape) or any(map(_differ, value.shape, shape))):
            shapes = f"{list(value.shape)} where {list(shape)} is needed"
            raise UsageError(f"{name} of graphopt::{options.kind} has the shape {shapes}")


def _differ(size: Any, wanted: Any) -> bool:
    """Sizes that are known; comparing symbolic ones would fix them."""
    return isinstance(size, int) and isinstance(wanted, int) and size != wanted


def _fake(kind: str) -> Callable[..., Any]:
    def fake(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        read = read_options(kind, **options)
        _check(read, tensors)
        x, _, r, *_ = _eight(tensors)
        directions, hidden = len(read.reverse), r.shape[2]
        y = x.new_empty((x.shape[0], x.shape[1], directions, hidden)).transpose(1, 2)
        return y, *(x.new_empty((directions, x.shape[1], hidden)) for _ in range(2 if kind == "lstm" else 1))

    return fake


def _keep(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _gradient(kind: str) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """By running the layer again: steps are not kept."""
        inputs = [None if value is None else value.detach() for value in ctx.saved_tensors]
        wanted = [place for place, needed in enumerate(ctx.needs_input_grad[: len(inputs)]) if needed]
        with torch.enable_grad():
            for place in wanted:
                inputs[place].requires_grad_()  # type: ignore[union-attr]
            outputs = _layer(kind, inputs, ctx.options)
        sources: list[Any] = [inputs[place] for place in wanted]
        found = torch.autograd.grad(outputs, sources, gradients, allow_unused=True)
        by_place = dict(zip(wanted, found, strict=True))
        return tuple(by_place.get(place) for place in range(len(inputs)))

    return backward


for _kind, _operator in (("rnn", rnn), ("gru", gru), ("lstm", lstm)):
    _operator.register_fake(_fake(_kind))
    _operator.register_autograd(_gradient(_kind), setup_context=_keep)
