"""Recurrent layers of PyTorch as graphopt::rnn, gru and lstm, one a layer for both directions.

torch.export computes the fake results of ATen's operators step by step, which fixes the length of the sequences, so
they are replaced before it sees them; programs that were exported elsewhere have them replaced afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from graphopt.errors import CaptureError
from graphopt.operators.recurrent import GATES

aten = torch.ops.aten
_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}  # where each gate of ONNX is among those of PyTorch
_FUNCTIONS = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "rnn", "rnn_relu": "rnn"}
OVERLOADS: dict[Any, str] = {getattr(aten, name).input: name for name in _FUNCTIONS}
PACKED: frozenset[Any] = frozenset(getattr(aten, name).data for name in _FUNCTIONS)
_PACKING = ("_pack_padded_sequence", "_pad_packed_sequence")
PACKED_REFUSED = (
    "the model packs sequences of different lengths (pack_padded_sequence), whose shapes depend on values; pass padded "
    "sequences to the recurrent layer"
)


class RecurrentLayers(TorchFunctionMode):
    """While this is entered, recurrent layers of PyTorch run as graphopt:: operators."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in _FUNCTIONS and _is_builtin(function, name):
            if isinstance(args[1], torch.Tensor) and isinstance(args[3], (list, tuple)):
                raise CaptureError(PACKED_REFUSED)
            return layers(name, *args, **(kwargs or {}))
        if name in _PACKING:
            raise CaptureError(PACKED_REFUSED)
        return function(*args, **(kwargs or {}))


def _is_builtin(function: Any, name: str) -> bool:
    return function is getattr(torch, name)


def layers(
    function: str,
    x: Any,
    hx: Any,
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Any, ...]:
    """torch.lstm, gru, rnn_tanh or rnn_relu as calls of ATen and graphopt:: overloads, on tensors or proxies.

    Returns the outputs and the last states of all layers. Raises CaptureError for projections and active dropout.
    """
    kind, directions = _FUNCTIONS[function], 2 if bidirectional else 1
    if train and dropout and num_layers > 1:
        raise CaptureError("a recurrent layer has dropout in training mode; export it in eval mode")
    each = 4 if has_biases else 2
    if len(params) != each * directions * num_layers:
        raise CaptureError("nn.LSTM with proj_size is not captured; use a linear layer behind an LSTM without it")
    options: dict[str, Any] = {"direction": "bidirectional"} if bidirectional else {}
    if function == "rnn_relu":
        options["activations"] = ["Relu"] * directions
    if kind == "gru":
        options["linear_before_reset"] = True
    given = list(hx) if kind == "lstm" else [hx]
    states: list[list[Any]] = []
    x = aten.transpose.int(x, 0, 1) if batch_first else x
    operator = getattr(torch.ops.graphopt, kind).default
    for layer in range(num_layers):
        start = layer * each * directions
        weights = [params[start + number * each : start + (number + 1) * each] for number in range(directions)]
        w, r, *biases = (_in_onnx_order(kind, [part[place] for part in weights]) for place in range(each))
        b = aten.cat.default(biases, 1) if biases else None
        initial = [_of_layer(state, layer, directions, num_layers) for state in given]
        y, *last = _results(operator(x, w, r, b, None, *initial, **options), 1 + len(given))
        states.append(last)
        x = _joined(y, directions)
    ends = [aten.cat.default(list(each)) if num_layers > 1 else each[0] for each in zip(*states, strict=True)]
    return (aten.transpose.int(x, 0, 1) if batch_first else x, *ends)


def _results(value: Any, count: int) -> list[Any]:
    return [value[number] for number in range(count)]


def _in_onnx_order(kind: str, weights: Sequence[Any]) -> Any:
    """The weights or biases of all directions in one tensor, its gates in the order of ONNX."""
    return aten.stack.default([_reordered(kind, weight) for weight in weights])


def _reordered(kind: str, weight: Any) -> Any:
    if kind == "rnn":
        return weight
    gates = _results(aten.chunk.default(weight, GATES[kind]), GATES[kind])
    return aten.cat.default([gates[place] for place in _ORDER[kind]])


def _of_layer(state: Any, layer: int, directions: int, num_layers: int) -> Any:
    if num_layers == 1:
        return state
    return aten.slice.Tensor(state, 0, layer * directions, (layer + 1) * directions)


def _joined(y: Any, directions: int) -> Any:
    """[T, D, B, H] as [T, B, D H]; the operator's results lie in this order in memory."""
    if directions == 1:
        return aten.squeeze.dims(y, [1])
    sizes = [aten.sym_size.int(y, axis) for axis in (0, 2)]
    return aten.view.default(aten.transpose.int(y, 1, 2), [*sizes, -1])
