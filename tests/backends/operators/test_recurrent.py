"""Recurrent layers against their specification: options, lengths, sizes known at run time, types, and their kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import CompileError
from graphopt.runtime.sizes import parse_size

Check = Callable[..., Any]
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
BOTH: dict[str, Any] = {"direction": "bidirectional"}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 2).to(dtype)


class Layer(nn.Module):
    """One operator with weights of its own; what forward is given follows the biases."""

    w: Tensor
    r: Tensor

    def __init__(
        self,
        kind: str,
        inputs: int,
        hidden: int,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        super().__init__()
        directions, rows = 2 if options.get("direction") == "bidirectional" else 1, GATES[kind] * hidden
        self.kind, self.options, self.bias = kind, options, bias
        self.register_buffer("w", drawn(directions, rows, inputs, dtype=dtype))
        self.register_buffer("r", drawn(directions, rows, hidden, seed=1, dtype=dtype))
        self.register_buffer("b", drawn(directions, 2 * rows, seed=2, dtype=dtype))
        self.register_buffer("p", drawn(directions, 3 * hidden, seed=3, dtype=dtype))

    def forward(self, x: Tensor, *given: Tensor | None) -> Any:
        operator = getattr(torch.ops.graphopt, self.kind)
        return operator(x, self.w, self.r, self.b if self.bias else None, *given, **self.options)


class Layers(nn.Module):
    """Several on the same inputs."""

    def __init__(self, layers: dict[str, Layer], peepholes: bool = False) -> None:
        super().__init__()
        self.layers, self.peepholes = nn.ModuleDict(layers), peepholes

    def forward(self, x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Any:
        rest = (None, None) if self.peepholes else ()
        return {
            name: layer(x, a, *(() if b is None else (b,)), *((*rest, layer.p) if self.peepholes else ()))
            for name, layer in self.layers.items()
        }


class Network(nn.Module):
    def __init__(self, layer: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer(6, 20, 2, bidirectional=True, batch_first=True, **options)
        self.head = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Any:
        y, state = self.layer(x)
        return self.head(torch.relu(y)), state


@pytest.mark.parametrize("layer", [nn.LSTM, *(pytest.param(each, marks=pytest.mark.slow) for each in (nn.GRU, nn.RNN))])
def test_networks_of_any_size(agree: Check, layer: Callable[..., nn.RNNBase]) -> None:
    more = [(torch.randn(rows, steps, 6),) for rows, steps in ((1, 1), (1, 19), (13, 2), (9, 11))]
    run = agree(Network(layer).eval(), [torch.randn(3, 7, 6)], [{0: "rows", 1: "steps"}], more)
    kernels = run.artifact.manifest.variants[0].kernels
    rules = {kernel.rule for kernel in kernels.values()}
    assert {"packed-gemm", "recurrence"} <= rules <= {"packed-gemm", "recurrence", "pointwise", "transpose"}


def test_work_is_that_of_the_layer(compiled: Check) -> None:
    """Units that fill the last vector count nothing; both kernels are the layer's."""
    run = compiled(Layer("lstm", 6, 20), [torch.randn(7, 3, 6)], [{0: "t"}])
    flops = {}
    for kernel in run.artifact.manifest.variants[0].kernels.values():
        assert isinstance(kernel.flops, str)
        flops[kernel.rule] = parse_size(kernel.flops).value({"t": 7})
    assert flops["packed-gemm"] == 7 * 3 * 80 * (2 * 6 + 1)
    products = 7 * 3 * 80 * 2 * 20
    assert flops["recurrence"] is not None and products < flops["recurrence"] < products + 7 * 3 * 20 * 200


@pytest.mark.parametrize(
    "direction", ["bidirectional", *(pytest.param(each, marks=pytest.mark.slow) for each in ("forward", "reverse"))]
)
def test_rows_of_different_lengths(agree: Check, direction: str) -> None:
    layers = {kind: Layer(kind, 4, 18, direction=direction) for kind in GATES}
    layers["after"] = Layer("gru", 4, 18, direction=direction, linear_before_reset=True)
    x, lengths = torch.randn(5, 7, 4), torch.tensor([5, 0, 2, 3, 5, 1, 4], dtype=torch.int32)
    directions = 2 if direction == "bidirectional" else 1
    agree(Layers(layers), [x, lengths, drawn(directions, 7, 18)], [{0: "steps"}, None, None], [
        (torch.randn(9, 7, 4), lengths + 1, drawn(directions, 7, 18, seed=5)),
    ])  # fmt: skip


def test_options(agree: Check) -> None:
    mixed: dict[str, Any] = {**BOTH, "activations": ["HardSigmoid", "Elu", "ScaledTanh", "Sigmoid", "Softsign", "Relu"]}
    numbers: dict[str, Any] = {"alpha": [0.3, 0.7, 0.5, 0.0, 0.0, 0.0], "beta": [0.4, 0.0, 0.6, 0.0, 0.0, 0.0]}
    layers = {
        "clipped": Layer("lstm", 4, 5, clip=0.4),
        "coupled": Layer("lstm", 4, 5, input_forget=True),
        "mixed": Layer("lstm", 4, 5, **mixed, **numbers),
        "clipped_gru": Layer("gru", 4, 17, clip=0.4, linear_before_reset=True),
        "gru": Layer("gru", 4, 17, bias=False, linear_before_reset=True),
        "leaky": Layer("rnn", 4, 40, activations=["LeakyRelu"]),
        "bare": Layer("rnn", 4, 5, bias=False, direction="reverse"),
        "soft": Layer("rnn", 4, 5, **BOTH, activations=["Softplus", "Affine"], alpha=[0.0, 0.1], beta=[0.0, 0.2]),
        "thresholded": Layer("rnn", 4, 5, activations=["ThresholdedRelu"], alpha=[0.2], beta=[0.0]),
    }
    agree(Layers(layers), [torch.randn(5, 2, 4)])
    agree(Layers({"looking": Layer("lstm", 4, 17, **BOTH)}, peepholes=True), [torch.randn(5, 1, 4)])


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_other_types(agree: Check, dtype: torch.dtype) -> None:
    layers = {kind: Layer(kind, 4, 18, dtype=dtype, **BOTH) for kind in GATES}
    layers["after"] = Layer("gru", 4, 18, dtype=dtype, linear_before_reset=True)
    lengths = torch.tensor([5, 2, 3])
    run = agree(Layers(layers), [drawn(5, 3, 4, dtype=dtype), lengths], [{0: "steps"}, None], [
        (drawn(6, 3, 4, dtype=dtype), lengths),
    ])  # fmt: skip
    assert not [kernel for kernel in run.artifact.manifest.variants[0].kernels.values() if kernel.slow]


def test_numbers_that_are_none_stay_none(agree: Check) -> None:
    x = torch.randn(5, 3, 4)
    x[2, 1] = math.nan
    x[3, 0], x[1, 2] = math.inf, -1e-42
    agree(Layers({kind: Layer(kind, 4, 18, clip=3.0) for kind in GATES}), [x])


def test_no_steps(agree: Check) -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer("lstm", 4, 5)

        def forward(self, x: Tensor, h: Tensor) -> Any:
            return self.layer(x, None, h), self.layer(x[:, :0], None, h[:, :0])

    agree(Empty(), [torch.randn(0, 3, 4), torch.randn(1, 3, 5)])


class Doubled(nn.Module):
    def __init__(self, of_input: bool) -> None:
        super().__init__()
        self.layer, self.of_input = Layer("rnn", 4, 5), of_input

    def forward(self, x: Tensor) -> Any:
        layer = self.layer
        return torch.ops.graphopt.rnn(x, layer.w * (x[0, 0, 0] if self.of_input else 2), layer.r)


def test_weights_are_constants(agree: Check, compiled: Check) -> None:
    agree(Doubled(False), [torch.randn(5, 2, 4)])
    with pytest.raises(CompileError, match="constant weights only"):
        compiled(Doubled(True), [torch.randn(5, 2, 4)])
