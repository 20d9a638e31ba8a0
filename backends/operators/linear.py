"""Matrix products: with a constant weight a packed GEMM that takes its epilogue along, otherwise the generic kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.element_wise import convert
from graphopt.backends.rules.gemm import gemm, pack_weight, tile_for
from graphopt.backends.rules.generic import reduce_generic
from graphopt.backends.sizes import Size, shape_of
from graphopt.backends.values import Index, Lazy, Product

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten


def _linear(lowering: Lowering, node: Node) -> Any:
    """x [..., K], weight [N, K], bias [N] or none."""
    x, weight, bias = (*node.args, None)[:3]
    constant = lowering.value(weight)
    if _packable(lowering, node, constant):
        return _packed(lowering, node, x, constant, bias)
    product = _matmul_of(lowering, node, x, weight, transposed=True)
    return product if bias is None else _plus(lowering, product, bias)


def _addmm(lowering: Lowering, node: Node) -> Any:
    """bias + x weight, weight [K, N]."""
    bias, x, weight = node.args
    constant = lowering.value(weight)
    plain = node.kwargs.get("alpha", 1) == 1 and node.kwargs.get("beta", 1) == 1
    if plain and _packable(lowering, node, constant):
        return _packed(lowering, node, x, constant.t(), bias)
    product = _matmul_of(lowering, node, x, weight, transposed=False)
    return _plus(lowering, product, bias, node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1))


def _matmul(lowering: Lowering, node: Node) -> Any:
    x, weight = node.args
    constant = lowering.value(weight)
    if _packable(lowering, node, constant) and constant.dim() == 2:
        return _packed(lowering, node, x, constant.t(), None)
    return _matmul_of(lowering, node, x, weight, transposed=False)


def _packable(lowering: Lowering, node: Node, weight: Any) -> bool:
    return (
        isinstance(weight, torch.Tensor)
        and weight.dim() == 2
        and weight.dtype == torch.float32
        and node.meta["val"].dtype == torch.float32
        and node.meta["val"].dim() > 1
    )


def _packed(lowering: Lowering, node: Node, x: Any, weight: torch.Tensor, bias: Any) -> Any:
    columns = tile_for(lowering.target).columns
    a = lowering.contiguous(x)
    b = lowering.weight(weight, f"gemm{columns}", lambda array: pack_weight(array, columns))
    n, k = weight.shape

    def begin(result: Product) -> Any:
        return result if bias is None else _plus(lowering, result, bias)

    return lowering.anchored(node, lambda result, end: gemm(a, b, result, end, f"gemm_{n}x{k}", lowering.target), begin)


def _plus(lowering: Lowering, product: Any, bias: Any, alpha: float = 1, beta: float = 1) -> Lazy:
    """alpha product + beta bias; the bias broadcasts."""
    added = lowering.tensor(bias)
    dtype = product.dtype

    def element(kernel: Kernel, index: Index) -> Any:
        left, right = kernel.load(product, index), convert(kernel.load(added, index), dtype)
        left = left if alpha == 1 else left * convert_number(alpha, dtype)
        return left + (right if beta == 1 else right * convert_number(beta, dtype))

    return Lazy(product.shape, dtype, (product, added), element)


def convert_number(value: float, dtype: str) -> Any:
    from tvm import tirx

    return tirx.const(value, dtype)


def _matmul_of(lowering: Lowering, node: Node, x: Any, y: Any, *, transposed: bool) -> Any:
    """General product with broadcast leading axes; `transposed`: y is [N, K]."""
    a, b = lowering.view(x), lowering.view(y)
    shape = shape_of(node.meta["val"])
    dtype = DTYPES[node.meta["val"].dtype]
    depth: Size = a.shape[-1]
    vector_a, vector_b = len(a.shape) == 1, len(b.shape) == 1

    def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        (k,) = reduced
        axes = [index.axis(number) for number in range(len(shape))]
        column = None if vector_b else axes.pop()
        row = None if vector_a else axes.pop()
        left = _broadcast(a.shape[:-2], axes) + ([k] if vector_a else [row, k])
        if transposed:
            right = [column, k]
        else:
            right = _broadcast(b.shape[:-2], axes) + ([k] if vector_b else [k, column])
        return convert(kernel.load(a, Index(a.shape, kernel.sizes, axes=tuple(left))), dtype) * convert(
            kernel.load(b, Index(b.shape, kernel.sizes, axes=tuple(right))), dtype
        )

    return reduce_generic(lowering, f"matmul_{node.name}", shape, dtype, (depth,), (a, b), element, "sum")


def _broadcast(shape: tuple[Size, ...], axes: list[Any]) -> list[Any]:
    used = axes[len(axes) - len(shape) :] if shape else []
    return [0 if size == 1 else axis for size, axis in zip(shape, used, strict=True)]


TABLE: dict[Any, Callable[..., Any]] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.mm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
}
