"""graphopt::rnn, gru and lstm: the rules that the specification states, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

import graphopt.operators  # noqa: F401
from graphopt.errors import UsageError

STEPS, ROWS, INPUTS, HIDDEN = 5, 3, 4, 6
KINDS: dict[str, tuple[Callable[..., nn.RNNBase], tuple[int, ...]]] = {
    "rnn": (nn.RNN, (0,)),
    "gru": (nn.GRU, (1, 0, 2)),
    "lstm": (nn.LSTM, (0, 3, 1, 2)),
}
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 2


def call(kind: str, x: Tensor, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = getattr(torch.ops.graphopt, kind)(x, *tensors, **options)
    return result


def weights(kind: str, directions: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    rows = GATES[kind] * HIDDEN
    return drawn(directions, rows, INPUTS), drawn(directions, rows, HIDDEN, seed=1), drawn(directions, 2 * rows, seed=2)


def in_onnx_order(module: nn.RNNBase, order: tuple[int, ...]) -> list[Tensor]:
    endings = ("", "_reverse") if module.bidirectional else ("",)

    def joined(name: str) -> Tensor:
        parts = [getattr(module, f"{name}_l0{ending}").chunk(len(order)) for ending in endings]
        return torch.stack([torch.cat([part[place] for place in order]) for part in parts])

    return [joined("weight_ih"), joined("weight_hh"), torch.cat([joined("bias_ih"), joined("bias_hh")], 1)]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_layer_of_pytorch_and_has_its_gradients(kind: str, bidirectional: bool) -> None:
    torch.manual_seed(0)
    layer, order = KINDS[kind]
    module = layer(INPUTS, HIDDEN, bidirectional=bidirectional)
    options: dict[str, Any] = {"linear_before_reset": True} if kind == "gru" else {}
    x = drawn(STEPS, ROWS, INPUTS).requires_grad_()
    direction = "bidirectional" if bidirectional else "forward"
    y, y_h, *_ = call(kind, x, *in_onnx_order(module, order), direction=direction, **options)
    wanted, state = module(x)
    torch.testing.assert_close(y.transpose(1, 2).flatten(2), wanted)
    torch.testing.assert_close(y_h, state[0] if kind == "lstm" else state)
    sources = [x, *module.parameters()]
    ours = torch.autograd.grad((y.square().sum() + y_h.sum()), sources)
    (last, *_) = state if kind == "lstm" else (state,)
    theirs = torch.autograd.grad(wanted.square().sum() + last.sum(), sources)
    for found, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_end_at_their_lengths(kind: str) -> None:
    """Each row alone and cut off gives the same, in both directions."""
    x, tensors, lengths = drawn(STEPS, ROWS, INPUTS), weights(kind, 2), [5, 2, 3]
    both: Any = {"direction": "bidirectional"}
    y, *states = call(kind, x, *tensors, torch.tensor(lengths), **both)
    for row, length in enumerate(lengths):
        alone, *ends = call(kind, x[:length, row : row + 1], *tensors, **both)
        torch.testing.assert_close(y[:length, :, row], alone[:, :, 0])
        assert not y[length:, :, row].any()
        for state, end in zip(states, ends, strict=True):
            torch.testing.assert_close(state[:, row], end[:, 0])


def test_a_row_without_steps_ends_in_zeros() -> None:
    h, c = drawn(1, ROWS, HIDDEN), drawn(1, ROWS, HIDDEN, seed=1)
    y, *states = call("lstm", drawn(STEPS, ROWS, INPUTS), *weights("lstm"), torch.tensor([0, 1, 5]), h, c)
    assert not y[:, :, 0].any() and not any(state[:, 0].any() for state in states)
    assert all(state[:, 1:].all() for state in states)
    none, *kept = call("lstm", drawn(0, ROWS, INPUTS), *weights("lstm"), None, h, c)
    assert none.shape == (0, 1, ROWS, HIDDEN) and torch.equal(kept[0], h) and torch.equal(kept[1], c)


def test_results_lie_as_the_fakes_say() -> None:
    rows = torch.tensor([5, 2, 0])
    state, peepholes = drawn(2, ROWS, HIDDEN), drawn(2, 3 * HIDDEN)
    x = drawn(STEPS, ROWS, INPUTS).requires_grad_()
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("lstm", (x, *weights("lstm", 2), rows, state, state, peepholes), {"direction": "bidirectional"}),
        ("gru", (x, *weights("gru")[:2]), {"direction": "reverse"}),
        ("rnn", (x, *weights("rnn"), rows), {}),
    ]
    for kind, tensors, options in cases:
        operator = getattr(torch.ops.graphopt, kind).default
        opcheck(operator, tensors, options, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_half_precision_is_rounded_once() -> None:
    given = [drawn(STEPS, ROWS, INPUTS).half(), *(tensor.half() for tensor in weights("lstm"))]
    wide = call("lstm", *(tensor.float() for tensor in given))
    for found, want in zip(call("lstm", *given), wide, strict=True):
        assert found.dtype == torch.float16 and torch.equal(found, want.half())


def test_numbers_that_are_none_stay_none() -> None:
    x = drawn(STEPS, ROWS, INPUTS)
    x[2, 1] = float("nan")
    y, *_ = call("gru", x, *weights("gru"), clip=0.5)
    assert not y[:2].isnan().any() and y[2:, :, 1].isnan().all() and not y[:, :, [0, 2]].isnan().any()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"direction": "up"}, "direction 'up'"),
        ({"activations": ["Sine"]}, "activation 'Sine'"),
        ({"activations": ["Tanh", "Tanh"]}, "takes 1 activations"),
        ({"activations": ["Elu"], "alpha": [1.0, 2.0]}, "takes 1 activations"),
        ({"direction": "bidirectional"}, r"w of graphopt::rnn has the shape \[1, 6, 4\] where \[2, 6, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        call("rnn", drawn(STEPS, ROWS, INPUTS), *weights("rnn"), **options)
