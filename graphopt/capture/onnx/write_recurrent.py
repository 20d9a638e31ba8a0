"""How graphopt::rnn, gru and lstm are written in ONNX: as the operator of that name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir
import torch
from onnxscript import opset21 as op

from graphopt.errors import UsageError
from graphopt.operators.recurrent import ACTIVATIONS, DIRECTIONS

_TYPES = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.DOUBLE)


def _rnn(
    x: Any, w: Any, r: Any, b: Any = None, sequence_lens: Any = None, initial_h: Any = None,
    direction: str = "forward", activations: Sequence[str] | None = None, alpha: Sequence[float] | None = None,
    beta: Sequence[float] | None = None, clip: float | None = None,
) -> Any:  # fmt: skip
    activations = activations or ["Tanh"] * len(DIRECTIONS[direction])  # the standard's default is two in any direction
    tensors, attributes = _layer(x, w, r, b, sequence_lens, direction, activations, alpha, beta, clip)
    return op.RNN(*tensors, initial_h, **attributes)


def _gru(
    x: Any, w: Any, r: Any, b: Any = None, sequence_lens: Any = None, initial_h: Any = None,
    direction: str = "forward", activations: Sequence[str] | None = None, alpha: Sequence[float] | None = None,
    beta: Sequence[float] | None = None, clip: float | None = None, linear_before_reset: bool = False,
) -> Any:  # fmt: skip
    tensors, attributes = _layer(x, w, r, b, sequence_lens, direction, activations, alpha, beta, clip)
    return op.GRU(*tensors, initial_h, linear_before_reset=int(linear_before_reset), **attributes)


def _lstm(
    x: Any, w: Any, r: Any, b: Any = None, sequence_lens: Any = None, initial_h: Any = None, initial_c: Any = None,
    p: Any = None, direction: str = "forward", activations: Sequence[str] | None = None,
    alpha: Sequence[float] | None = None, beta: Sequence[float] | None = None, clip: float | None = None,
    input_forget: bool = False,
) -> Any:  # fmt: skip
    tensors, attributes = _layer(x, w, r, b, sequence_lens, direction, activations, alpha, beta, clip)
    return op.LSTM(*tensors, initial_h, initial_c, p, input_forget=int(input_forget), **attributes)


def _layer(
    x: Any, w: Any, r: Any, b: Any, lens: Any, direction: str, activations: Sequence[str] | None,
    alpha: Sequence[float] | None, beta: Sequence[float] | None, clip: float | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """The first inputs and the attributes; of alpha and beta only those are written that an activation has."""
    if x.dtype not in _TYPES:
        raise UsageError(f"recurrent layers of {x.dtype.name.lower()} have no ONNX form; make them float32")
    if lens is not None and lens.dtype != onnx_ir.DataType.INT32:
        lens = op.Cast(lens, to=onnx_ir.DataType.INT32)
    attributes: dict[str, Any] = {"hidden_size": int(r.shape[2]), "direction": direction}
    if activations is not None:
        attributes["activations"] = list(activations)
        for name, given in (("alpha", alpha), ("beta", beta)):
            defaults = [getattr(ACTIVATIONS[activation], name) for activation in activations]
            values = defaults if given is None else given
            kept = [value for value, default in zip(values, defaults, strict=True) if default is not None]
            attributes |= {f"activation_{name}": kept} if kept else {}
    if clip is not None:
        attributes["clip"] = clip
    return (x, w, r, b, lens), attributes


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.graphopt.rnn.default: _rnn,
    torch.ops.graphopt.gru.default: _gru,
    torch.ops.graphopt.lstm.default: _lstm,
}
