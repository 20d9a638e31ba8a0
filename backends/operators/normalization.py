"""Normalisations and softmax: along the last axis by the row rule, batch norm as element-wise arithmetic.

Rows are computed in float32; float16 and bfloat16 are widened on the way in and rounded on the way out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import cast, computed_in, convert, like
from graphopt.backends.operators.views import reshape
from graphopt.backends.rules.rows import layer_norm, rms_norm, softmax
from graphopt.backends.sizes import product, shape_of
from graphopt.backends.values import Index, Lazy, View, permuted
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten


def _widened(lowering: Lowering, node: Node, argument: Any) -> Any:
    """The operand as float32, wherever it is."""
    value = lowering.tensor(argument)
    if computed_in(value.dtype) != "float32":
        raise CompileError(
            f"{node.name} works on {value.dtype}; {node.target} is lowered for float32 and narrower only"
        )
    return cast(value, "float32")


def _narrowed(node: Node, value: Any) -> Any:
    meta = node.meta["val"]
    return cast(value, DTYPES[(meta[0] if isinstance(meta, (tuple, list)) else meta).dtype])


def _parameter(lowering: Lowering, argument: Any) -> View | None:
    return None if argument is None else lowering.contiguous(cast(lowering.tensor(argument), "float32"))


def _layer_norm(lowering: Lowering, node: Node) -> Any:
    x, normalized, weight, bias, epsilon, *_ = arguments(node).values()
    parameters = _parameter(lowering, weight), _parameter(lowering, bias)

    def build(value: View) -> Any:
        return layer_norm(value, *parameters, float(epsilon), lowering.target)

    return _over_last_axes(lowering, node, x, len(normalized), build)


def _rms_norm(lowering: Lowering, node: Node) -> Any:
    x, normalized, weight, epsilon = arguments(node).values()
    if epsilon is None:  # PyTorch computes 16-bit types in float32, and takes float32's
        epsilon = torch.finfo(torch.promote_types(node.meta["val"].dtype, torch.float32)).eps
    scale = _parameter(lowering, weight)

    def build(value: View) -> Any:
        return rms_norm(value, scale, float(epsilon), lowering.target)

    return _over_last_axes(lowering, node, x, len(normalized), build)


def _over_last_axes(lowering: Lowering, node: Node, x: Any, count: int, build: Callable[[View], Any]) -> Any:
    """Several normalised axes are one, since memory is contiguous."""
    value = lowering.contiguous(_widened(lowering, node, x))
    shape = value.shape
    kept = len(shape) - count
    merged = lowering.contiguous(reshape(lowering, value, (*shape[:kept], product(shape[kept:]))))
    (stored,) = lowering.call(build(merged))
    return _narrowed(node, reshape(lowering, stored, shape))


def _softmax(log: bool) -> Callable[[Lowering, Node], Any]:
    def lower(lowering: Lowering, node: Node) -> Any:
        x, axis, *_ = arguments(node).values()
        value = _widened(lowering, node, x)
        rank = len(value.shape)
        if rank == 0:
            value, rank = reshape(lowering, value, (1,)), 1
        order = [a for a in range(rank) if a != axis % rank] + [axis % rank]
        rows = value if order == list(range(rank)) else permuted(lowering.view(value), order)
        (stored,) = lowering.call(softmax(lowering.contiguous(rows), lowering.target, log=log))
        result = permuted(stored, [order.index(a) for a in range(rank)])
        return _narrowed(node, reshape(lowering, result, shape_of(node.meta["val"])))

    return lower


def _group_norm(lowering: Lowering, node: Node) -> Any:
    """x [N, C, ...] in groups of C / groups channels; each group is one row."""
    x, groups, weight, bias, epsilon, *_ = arguments(node).values()
    return _in_groups(lowering, node, x, int(groups), weight, bias, float(epsilon))


def _instance_norm(lowering: Lowering, node: Node) -> Any:
    """Every channel of every sample is a row."""
    x, weight, bias, _, _, own_statistics, _, epsilon, _ = arguments(node).values()
    if not own_statistics:
        raise CompileError(f"{node.name} is an instance norm with running statistics, which has no lowering")
    channels = int(node.meta["val"].shape[1])
    return _in_groups(lowering, node, x, channels, weight, bias, float(epsilon))


def _in_groups(lowering: Lowering, node: Node, x: Any, groups: int, weight: Any, bias: Any, epsilon: float) -> Any:
    value = lowering.contiguous(_widened(lowering, node, x))
    shape = value.shape
    rows = lowering.contiguous(reshape(lowering, value, (shape[0], groups, product(shape[1:]) // groups)))
    (stored,) = lowering.call(layer_norm(rows, None, None, epsilon, lowering.target))
    normalized = reshape(lowering, stored, shape)
    scale, shift = _parameter(lowering, weight), _parameter(lowering, bias)

    def element(kernel: Kernel, index: Index) -> Any:
        result, channel = kernel.load(normalized, index), index.axis(1)
        result = result if scale is None else result * kernel.flat(scale.storage)[channel]
        return result if shift is None else result + kernel.flat(shift.storage)[channel]

    operands = tuple(v for v in (normalized, scale, shift) if v is not None)
    return _narrowed(node, Lazy(shape, "float32", operands, element))


def _batch_norm(lowering: Lowering, node: Node) -> Any:
    """Evaluation form: running statistics; the training form is refused."""
    given = arguments(node)
    if given.get("training") or given["running_mean"] is None:
        raise CompileError(f"{node.name} is a batch norm in training mode; capture the model in eval mode")
    value = lowering.tensor(given["input"])
    names = ("weight", "bias", "running_mean", "running_var")
    parameters = {name: lowering.contiguous(given[name]) for name in names if given[name] is not None}
    compute, epsilon = computed_in(value.dtype), given["eps"]

    def element(kernel: Kernel, index: Index) -> Any:
        channel = index.axis(1)
        at = {name: convert(kernel.flat(p.storage)[channel], compute) for name, p in parameters.items()}
        loaded = convert(kernel.load(value, index), compute)
        result = (loaded - at["running_mean"]) * (
            like(loaded, 1) / tirx.sqrt(at["running_var"] + like(loaded, epsilon))
        )
        result = result * at["weight"] if "weight" in at else result
        return convert(result + at["bias"] if "bias" in at else result, value.dtype)

    return Lazy(value.shape, value.dtype, (value, *parameters.values()), element)


TABLE: dict[Any, Callable[..., Any]] = {
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.instance_norm.default: _instance_norm,
    aten.batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: lambda lowering, node: (_batch_norm(lowering, node),),
    aten.softmax.int: _softmax(log=False),
    aten._softmax.default: _softmax(log=False),
    aten.log_softmax.int: _softmax(log=True),
    aten._log_softmax.default: _softmax(log=True),
}
