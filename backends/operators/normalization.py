"""Normalisations and softmax: along the last axis by the row rule, batch norm as element-wise arithmetic.

Rows are computed in float32; float16 and bfloat16 are widened on the way in and rounded on the way out. float64 is
reduced by the reduction rule instead, in as many kernels as there are reductions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.bfloat16 import BFLOAT16
from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import cast, computed_in, convert, like, widened
from graphopt.backends.operators.quantization import makes_codes, rows_into_codes
from graphopt.backends.operators.reduction import axes_of, exponentials, moments, reduce
from graphopt.backends.operators.views import reshape
from graphopt.backends.operators.widening import as_stored
from graphopt.backends.rules.rows import largest_probability, layer_norm, rms_norm, softmax
from graphopt.backends.sizes import product, shape_of
from graphopt.backends.values import Index, Lazy, Product, View, permuted
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Code, Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten


def _narrowed(node: Node, value: Any) -> Any:
    meta = node.meta["val"]
    return cast(value, DTYPES[(meta[0] if isinstance(meta, (tuple, list)) else meta).dtype])


def _parameter(lowering: Lowering, argument: Any, dtype: str = "float32") -> View | None:
    return None if argument is None else lowering.contiguous(cast(lowering.tensor(argument), dtype))


def _layer_norm(lowering: Lowering, node: Node) -> Any:
    x, normalized, weight, bias, epsilon, *_ = arguments(node).values()

    def parameters(dtype: str) -> tuple[View | None, View | None]:
        found = (_parameter(lowering, each, computed_in(dtype)) for each in (weight, bias))
        return next(found), next(found)

    if (rows := rows_into_codes(lowering, node, x)) is not None and len(normalized) == 1:
        return _with_ending(
            lowering,
            node,
            lambda ending: layer_norm(rows, *parameters("float32"), float(epsilon), lowering.target, "float32", ending),
        )

    def build(value: View) -> Any:
        return standardized(lowering, value, *parameters(value.dtype), float(epsilon), _stored_in(node))

    return _over_last_axes(lowering, node, x, len(normalized), build)


def _with_ending(lowering: Lowering, node: Node, write: Callable[[Any], Code]) -> View:
    """The kernel of `node` with what follows it up to codes, where that is so."""

    def build(result: Product, end: Any) -> Code:
        return write(None if end is result else (result, end))

    return lowering.anchored(node, build, ends=makes_codes)


def standardized(
    lowering: Lowering,
    rows: View,
    weight: View | None,
    bias: View | None,
    epsilon: float,
    dtype: str = "float32",
) -> View | Lazy:
    """(x - mean) / sqrt(variance + epsilon) weight + bias over the last axis of contiguous rows.

    `dtype` is that of the result, unless rows are float64.
    """
    if computed_in(rows.dtype) == "float32":
        return lowering.call(layer_norm(rows, weight, bias, epsilon, lowering.target, dtype))[0]
    last = len(rows.shape) - 1
    scale, center = moments(lowering, rows, [last], rows.dtype, 0, _inverse_root(epsilon))
    return scaled(rows, center, scale, weight, bias, last)


def _inverse_root(epsilon: float) -> Callable[[Any], Any]:
    return lambda variance: like(variance, 1) / tirx.sqrt(variance + like(variance, epsilon))


def scaled(value: Any, center: View | None, scale: View, weight: View | None, bias: View | None, axis: int) -> Lazy:
    """(value - center) scale weight + bias, the parameters along one axis."""

    def element(kernel: Kernel, index: Index) -> Any:
        result = kernel.load(value, index)
        result = result if center is None else result - kernel.load(center, index)
        result = result * kernel.load(scale, index)
        at = index.axis(axis)
        result = result if weight is None else result * kernel.flat(weight.storage)[at]
        return result if bias is None else result + kernel.flat(bias.storage)[at]

    operands = tuple(v for v in (value, center, scale, weight, bias) if v is not None)
    return Lazy(value.shape, value.dtype, operands, element)


def _rms_norm(lowering: Lowering, node: Node) -> Any:
    x, normalized, weight, epsilon = arguments(node).values()
    if epsilon is None:  # PyTorch computes 16-bit types in float32, and takes float32's
        epsilon = torch.finfo(torch.promote_types(node.meta["val"].dtype, torch.float32)).eps
    if (rows := rows_into_codes(lowering, node, x)) is not None and len(normalized) == 1:
        scale = _parameter(lowering, weight)
        return _with_ending(
            lowering,
            node,
            lambda ending: rms_norm(rows, scale, float(epsilon), lowering.target, "float32", ending),
        )

    def build(value: View) -> View | Lazy:
        parameter = _parameter(lowering, weight, computed_in(value.dtype))
        if computed_in(value.dtype) == "float32":
            return lowering.call(rms_norm(value, parameter, float(epsilon), lowering.target, _stored_in(node)))[0]
        last = len(value.shape) - 1
        squares = Lazy(value.shape, value.dtype, (value,), lambda k, i: k.load(value, i) * k.load(value, i), flat=True)
        count, end = product(value.shape[last:]), _inverse_root(float(epsilon))

        def finish(kernel: Kernel, total: Any) -> Any:
            return end(total / kernel.size(count).astype(value.dtype))

        scale = reduce(lowering, squares, [last], value.dtype, "sum", finish)
        return scaled(value, None, scale, parameter, None, last)

    return _over_last_axes(lowering, node, x, len(normalized), build)


def _over_last_axes(lowering: Lowering, node: Node, x: Any, count: int, build: Callable[[View], Any]) -> Any:
    """Several normalised axes are one, since memory is contiguous."""
    value = lowering.contiguous(as_stored(lowering, x))
    shape = value.shape
    kept = len(shape) - count
    merged = lowering.contiguous(reshape(lowering, value, (*shape[:kept], product(shape[kept:]))))
    result = reshape(lowering, build(merged), shape)
    if (rounding := _only_rounding(node)) is not None and result.dtype == BFLOAT16:
        lowering.cover(rounding, lowering.view(result))
        return result
    return _narrowed(node, result)


def _only_rounding(node: Node) -> Node | None:
    """The one reader of a float32 result, where it rounds it to bfloat16."""
    (reader,) = node.users if len(node.users) == 1 else (None,)
    if reader is None or reader.target is not aten._to_copy.default:
        return None
    dtypes = node.meta["val"], reader.meta["val"]
    return reader if [value.dtype for value in dtypes] == [torch.float32, torch.bfloat16] else None


def _stored_in(node: Node) -> str:
    """The dtype of a norm's result in memory: its own, or what its one reader rounds it to."""
    meta = node.meta["val"]
    own = (meta[0] if isinstance(meta, (tuple, list)) else meta).dtype
    if isinstance(meta, torch.Tensor) and _only_rounding(node) is not None:
        return BFLOAT16
    return DTYPES[own]


def _softmax(log: bool) -> Callable[[Lowering, Node], Any]:
    def lower(lowering: Lowering, node: Node) -> Any:
        x, axis, *_ = arguments(node).values()
        if axis in (-1, len(node.meta["val"].shape) - 1) and (rows := rows_into_codes(lowering, node, x)) is not None:
            write = partial(softmax, rows, lowering.target, log=log)
            return _with_ending(lowering, node, lambda ending: write(ending=ending))
        value = cast(lowering.tensor(x), computed_in(DTYPES[node.meta["val"].dtype]))
        rank = len(value.shape)
        if rank == 0:
            value, rank = reshape(lowering, value, (1,)), 1
        if value.dtype != "float32":
            wide = _wide_softmax(lowering, value, axis % rank, log)
            return _narrowed(node, reshape(lowering, wide, shape_of(node.meta["val"])))
        order = [a for a in range(rank) if a != axis % rank] + [axis % rank]
        if (largest := _only_largest(node)) is not None and not log and axis % rank == rank - 1:
            return _largest(lowering, largest, lowering.contiguous(value))
        rows = value if order == list(range(rank)) else permuted(lowering.view(value), order)
        (stored,) = lowering.call(softmax(lowering.contiguous(rows), lowering.target, log=log))
        result = permuted(stored, [order.index(a) for a in range(rank)])
        return _narrowed(node, reshape(lowering, result, shape_of(node.meta["val"])))

    return lower


def _only_largest(node: Node) -> Node | None:
    """The one reader of a softmax over the last axis, where it takes the largest of each row."""
    (reader,) = node.users if len(node.users) == 1 else (None,)
    if reader is None or reader.target is not aten.amax.default:
        return None
    given = arguments(reader)
    value = node.meta["val"]
    last = axes_of(given["dim"], value.dim()) == [value.dim() - 1]
    return reader if last and not given["keepdim"] and value.dtype is torch.float32 else None


def _largest(lowering: Lowering, reader: Node, rows: View) -> View:
    """Write no probability but the largest of each row, with what reads it."""
    found = lowering.anchored(reader, lambda result, end: largest_probability(rows, result, end, lowering.target))
    lowering.cover(reader, found)
    return found


def _wide_softmax(lowering: Lowering, value: Any, axis: int, log: bool) -> Lazy:
    """In float64, by reductions; a row of nothing but -inf is NaN, as in PyTorch."""
    stored = lowering.view(value)
    total, top = exponentials(lowering, stored, [axis])

    def element(kernel: Kernel, index: Index) -> Any:
        distance = kernel.load(stored, index) - kernel.load(top, index)
        sum_ = kernel.load(total, index)
        return distance - tirx.log(sum_) if log else tirx.exp(distance) / sum_

    return Lazy(stored.shape, stored.dtype, (stored, total, top), element)


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
    value = lowering.contiguous(widened(lowering, x))
    shape = value.shape
    rows = lowering.contiguous(reshape(lowering, value, (shape[0], groups, product(shape[1:]) // groups)))
    normalized = reshape(lowering, standardized(lowering, rows, None, None, epsilon), shape)
    scale, shift = (_parameter(lowering, each, value.dtype) for each in (weight, bias))

    def element(kernel: Kernel, index: Index) -> Any:
        result, channel = kernel.load(normalized, index), index.axis(1)
        result = result if scale is None else result * kernel.flat(scale.storage)[channel]
        return result if shift is None else result + kernel.flat(shift.storage)[channel]

    operands = tuple(v for v in (normalized, scale, shift) if v is not None)
    return _narrowed(node, Lazy(shape, value.dtype, operands, element))


def _native_layer_norm(lowering: Lowering, node: Node) -> tuple[Any, Any, Any]:
    """The normalised tensor, the means and 1 / sqrt(variance + epsilon)."""
    x, normalized, _, _, epsilon = arguments(node).values()
    rank = len(shape_of(node.meta["val"][0]))
    axes = list(range(rank - len(normalized), rank))
    return _layer_norm(lowering, node), *_statistics(lowering, node, lambda: lowering.tensor(x), axes, float(epsilon))


def _native_group_norm(lowering: Lowering, node: Node) -> tuple[Any, Any, Any]:
    x, weight, bias, _, _, _, groups, epsilon = arguments(node).values()
    result = _in_groups(lowering, node, x, int(groups), weight, bias, float(epsilon))

    def rows() -> Any:
        value = lowering.contiguous(x)
        return reshape(lowering, value, (value.shape[0], int(groups), product(value.shape[1:]) // int(groups)))

    return result, *_statistics(lowering, node, rows, [2], float(epsilon))


def _statistics(
    lowering: Lowering, node: Node, value: Callable[[], Any], axes: list[int], epsilon: float
) -> tuple[Any, Any]:
    """Means and inverse deviations, where anything reads them."""
    if not any(user.args[1] in (1, 2) for user in node.users):
        return None, None
    source = cast(value(), computed_in(value().dtype))
    scale, center = moments(lowering, source, axes, source.dtype, 0, _inverse_root(epsilon))
    metas = node.meta["val"][1:]
    results = (reshape(lowering, v, shape_of(m)) for v, m in zip((center, scale), metas, strict=True))
    mean, deviation = (cast(v, DTYPES[m.dtype]) for v, m in zip(results, metas, strict=True))
    return mean, deviation


def _batch_statistics(lowering: Lowering, node: Node) -> tuple[Any, Any, Any]:
    """Batch norm by the batch's own statistics, which it returns too; none are kept."""
    x, weight, bias, training, _, epsilon = arguments(node).values()
    if not training:
        raise CompileError(f"{node.name} is a batch norm without any statistics; give it running ones")
    value = lowering.view(widened(lowering, x))
    axes = [axis for axis in range(len(value.shape)) if axis != 1]
    scale, center = moments(lowering, value, axes, value.dtype, 0, _inverse_root(float(epsilon)))
    gain, shift = (_parameter(lowering, each, value.dtype) for each in (weight, bias))
    metas = node.meta["val"]
    results: list[Any] = [scaled(value, center, scale, gain, shift, 1)]
    results += [reshape(lowering, v, shape_of(m)) for v, m in zip((center, scale), metas[1:], strict=True)]
    first, second, third = (cast(v, DTYPES[m.dtype]) for v, m in zip(results, metas, strict=True))
    return first, second, third


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
    aten._native_batch_norm_legit.no_stats: _batch_statistics,
    aten.native_layer_norm.default: _native_layer_norm,
    aten.native_group_norm.default: _native_group_norm,
    aten.softmax.int: _softmax(log=False),
    aten._softmax.default: _softmax(log=False),
    aten.log_softmax.int: _softmax(log=True),
    aten._log_softmax.default: _softmax(log=True),
}
