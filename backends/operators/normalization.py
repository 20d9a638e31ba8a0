"""Normalisations and softmax: along the last axis by the row rule, batch norm as element-wise arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.operators.views import reshape
from graphopt.backends.rules.rows import layer_norm, rms_norm, softmax
from graphopt.backends.sizes import product, shape_of
from graphopt.backends.values import Index, Lazy, View
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten


def _float32(node: Node, value: Any) -> Any:
    if value.dtype != "float32":
        raise CompileError(f"{node.name} works on {value.dtype}; {node.target} is lowered for float32 only so far")
    return value


def _flat_parameter(lowering: Lowering, argument: Any) -> View | None:
    return None if argument is None else lowering.contiguous(argument)


def _layer_norm(lowering: Lowering, node: Node) -> Any:
    x, normalized, weight, bias, epsilon = (
        (*node.args[:5], None, None, 1e-5)[:5]
        if len(node.args) >= 5
        else (
            *node.args,
            *(None, None, 1e-5)[len(node.args) - 2 :],
        )
    )
    return _over_last_axes(
        lowering,
        node,
        x,
        len(normalized),  # type: ignore[arg-type]
        lambda value: layer_norm(
            value,
            _flat_parameter(lowering, weight),
            _flat_parameter(lowering, bias),
            float(epsilon),
            lowering.target,  # type: ignore[arg-type]
        ),
    )


def _rms_norm(lowering: Lowering, node: Node) -> Any:
    x, normalized, weight, epsilon = (*node.args, *(None, None)[len(node.args) - 2 :])[:4]
    epsilon = torch.finfo(node.meta["val"].dtype).eps if epsilon is None else epsilon
    return _over_last_axes(
        lowering,
        node,
        x,
        len(normalized),  # type: ignore[arg-type]
        lambda value: rms_norm(value, _flat_parameter(lowering, weight), float(epsilon), lowering.target),  # type: ignore[arg-type]
    )


def _over_last_axes(lowering: Lowering, node: Node, x: Any, count: int, build: Callable[[View], Any]) -> Any:
    """Several normalised axes are one, since memory is contiguous."""
    value = _float32(node, lowering.contiguous(x))
    shape = value.shape
    merged = reshape(lowering, value, (*shape[: len(shape) - count], product(shape[len(shape) - count :])))
    (stored,) = lowering.call(build(merged))  # type: ignore[arg-type]
    return reshape(lowering, stored, shape)


def _softmax(log: bool) -> Callable[[Lowering, Node], Any]:
    def lower(lowering: Lowering, node: Node) -> Any:
        rank = len(node.meta["val"].shape)
        axis = int(node.args[1]) % rank  # type: ignore[arg-type]
        if axis == rank - 1:
            (stored,) = lowering.call(
                softmax(_float32(node, lowering.contiguous(node.args[0])), lowering.target, log=log)
            )
            return stored
        order = [*(a for a in range(rank) if a != axis), axis]
        view = lowering.view(node.args[0])
        moved = lowering.contiguous(permuted(view, order))
        (stored,) = lowering.call(softmax(_float32(node, moved), lowering.target, log=log))
        return permuted(stored, [order.index(a) for a in range(rank)])

    return lower


def permuted(view: View, order: list[int]) -> View:
    return View(view.storage, tuple(view.shape[a] for a in order), tuple(view.strides[a] for a in order), view.offset)


def _group_norm(lowering: Lowering, node: Node) -> Any:
    """x [N, C, ...] in groups of C / groups channels; each group is one row."""
    x, groups, weight, bias, epsilon = (*node.args, *(None, None, 1e-5)[len(node.args) - 2 :])[:5]
    value = _float32(node, lowering.contiguous(x))
    shape = value.shape
    rows = reshape(lowering, value, (shape[0], int(groups), product(shape[1:]) // int(groups)))  # type: ignore[arg-type]
    (stored,) = lowering.call(layer_norm(rows, None, None, float(epsilon), lowering.target))  # type: ignore[arg-type]
    return _per_channel(
        reshape(lowering, stored, shape), [None if p is None else lowering.contiguous(p) for p in (weight, bias)]
    )


def _per_channel(value: Any, parameters: list[View | None]) -> Any:
    weight, bias = parameters
    if weight is None and bias is None:
        return value

    def element(kernel: Kernel, index: Index) -> Any:
        result = kernel.load(value, index)
        channel = index.axis(1)
        result = result if weight is None else result * kernel.flat(weight.storage)[channel]
        return result if bias is None else result + kernel.flat(bias.storage)[channel]

    return Lazy(value.shape, value.dtype, (value, *(p for p in parameters if p is not None)), element)


def _batch_norm(lowering: Lowering, node: Node) -> Any:
    """Evaluation form: running statistics; the training form is refused."""
    x, weight, bias, mean, variance, training, _, epsilon = node.args[:8]
    if training:
        raise CompileError(f"{node.name} is a batch norm in training mode; capture the model in eval mode")
    value = lowering.tensor(x)
    parameters = {
        name: None if p is None else lowering.contiguous(p)
        for name, p in zip(("weight", "bias", "mean", "variance"), (weight, bias, mean, variance), strict=True)
    }

    def element(kernel: Kernel, index: Index) -> Any:
        channel = index.axis(1)
        at = {name: kernel.flat(p.storage)[channel] for name, p in parameters.items() if p is not None}
        scale = tirx.const(1, value.dtype) / tirx.sqrt(at["variance"] + tirx.const(epsilon, value.dtype))
        result = (kernel.load(value, index) - at["mean"]) * scale
        result = result * at["weight"] if "weight" in at else result
        return result + at["bias"] if "bias" in at else result

    return Lazy(
        shape_of(node.meta["val"]), value.dtype, (value, *(p for p in parameters.values() if p is not None)), element
    )


TABLE: dict[Any, Callable[..., Any]] = {
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.batch_norm.default: _batch_norm,
    aten.softmax.int: _softmax(log=False),
    aten._softmax.default: _softmax(log=False),
    aten.log_softmax.int: _softmax(log=True),
    aten._log_softmax.default: _softmax(log=True),
}
