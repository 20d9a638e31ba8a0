"""Matrix products with their epilogues: packed for a constant weight, batched for two computed tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from graphopt.backends.bfloat16 import BFLOAT16
from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import computed_in, convert, like, widened
from graphopt.backends.operators.widening import NARROW, numbers_of, pairs_of
from graphopt.backends.rules import amx_block, amx_gemm, batched_gemm
from graphopt.backends.rules.gemm import Configuration, gemm, offer, pack_pairs, pack_weight
from graphopt.backends.rules.generic import reduce_generic
from graphopt.backends.sizes import Size, shape_of
from graphopt.backends.values import Index, Lazy, Product, View, permuted
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Code, Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten


def _linear(lowering: Lowering, node: Node) -> Any:
    """x [..., K], weight [N, K], bias [N] or none."""
    x, weight, bias = arguments(node).values()
    constant = lowering.value(weight)

    def begin(result: Any) -> Any:
        return result if bias is None else _plus(lowering, result, bias)

    if _packable(lowering, node, constant):
        return _packed(lowering, node, x, constant, begin)
    return _matmul_of(lowering, node, x, weight, transposed=True, begin=begin)


def _addmm(lowering: Lowering, node: Node) -> Any:
    """bias + x weight, weight [K, N]."""
    bias, x, weight, beta, alpha = arguments(node).values()
    constant = lowering.value(weight)

    def begin(result: Any) -> Any:
        return _plus(lowering, result, bias, alpha, beta)

    if alpha == beta == 1 and _packable(lowering, node, constant):
        return _packed(lowering, node, x, constant.t(), begin)
    return _matmul_of(lowering, node, x, weight, begin=begin)


def _matmul(lowering: Lowering, node: Node) -> Any:
    x, weight = node.args
    constant = lowering.value(weight)
    if _packable(lowering, node, constant) and constant.dim() == 2:
        return _packed(lowering, node, x, constant.t(), _bare)
    return _matmul_of(lowering, node, x, weight)


def _bare(result: Any) -> Any:
    """Nothing belongs to the node besides its product."""
    return result


def _packable(lowering: Lowering, node: Node, weight: Any) -> bool:
    """An empty weight has no panels to pack; narrow floats are multiplied as float32."""
    return (
        isinstance(weight, torch.Tensor)
        and weight.dim() == 2
        and weight.numel() > 0
        and weight.dtype in (node.meta["val"].dtype, *NARROW)
        and computed_in(DTYPES[node.meta["val"].dtype]) == "float32"
        and node.meta["val"].dim() > 1
    )


def _packed(lowering: Lowering, node: Node, x: Any, weight: torch.Tensor, begin: Callable[[Any], Any]) -> Any:
    a = pairs_of(lowering, x) if weight.dtype == torch.bfloat16 else None
    if a is None:
        a = numbers_of(lowering, x)
    return packed_product(lowering, node, a if a.strides[-1] == 1 else lowering.contiguous(a), weight, begin)


def packed_product(
    lowering: Lowering,
    node: Node,
    a: View,
    weight: torch.Tensor,
    begin: Callable[[Any], Any],
    order: tuple[int, ...] = (),
) -> View:
    """a [..., K], its last axis contiguous, times weight [N, K] with the node's epilogue.

    `begin` and `order` as in `anchored`. `a` is float32, or bfloat16 as the weight is, with zeros up to an even K.
    """
    target = lowering.target
    n, k = weight.shape
    if amx_gemm.fits(target, a):
        return lowering.anchored(node, on_tiles(lowering, a, weight, f"gemm_{n}x{k}"), begin, order)
    layout, pack = ("pairs", pack_pairs) if a.dtype == BFLOAT16 else ("gemm", pack_weight)

    def build(result: Product, end: Any) -> Code:
        def write(choice: Configuration) -> Code:
            columns = choice.tile.vectors * target.lanes
            b = lowering.weight(weight, f"{layout}{columns}", lambda array: pack(array, columns))
            return gemm(a, b, result, end, f"gemm_{n}x{k}", target, choice)

        keys = lowering.weights.packings(weight)
        packed = tuple(int(key.removeprefix(layout)) for key in keys if key.startswith(layout))
        return lowering.choose(offer(target, a, n, DTYPES[weight.dtype], end, write, packed))

    return lowering.anchored(node, build, begin, order)


def on_tiles(lowering: Lowering, a: View, weight: torch.Tensor, name: str) -> Callable[[Product, Any], Code]:
    """Writes the kernel of a [..., K] times weight [N, K] for AMX."""
    target, n = lowering.target, int(weight.shape[0])

    def build(result: Product, end: Any) -> Code:
        def write(choice: amx_gemm.Configuration) -> Code:
            b = lowering.weight(weight, "amx", amx_block.pack_tiles)
            return amx_gemm.gemm(a, b, result, end, name, target, choice)

        return lowering.choose(amx_gemm.offer(target, a, n, end, write))

    return build


def _plus(lowering: Lowering, product: Any, bias: Any, alpha: float = 1, beta: float = 1) -> Lazy:
    """alpha product + beta bias; the bias broadcasts."""
    added = lowering.tensor(bias)
    dtype = product.dtype

    def element(kernel: Kernel, index: Index) -> Any:
        left, right = (convert(kernel.load(value, index), computed_in(dtype)) for value in (product, added))
        left = left if alpha == 1 else left * like(left, alpha)
        return convert(left + (right if beta == 1 else right * like(right, beta)), dtype)

    return Lazy(product.shape, dtype, (product, added), element)


def _matmul_of(
    lowering: Lowering,
    node: Node,
    x: Any,
    y: Any,
    *,
    transposed: bool = False,
    begin: Callable[[Any], Any] = _bare,
) -> Any:
    """Product of two computed tensors with broadcast leading axes; `transposed`: y is [N, K]."""
    a, b = lowering.view(x), lowering.view(y)
    b = permuted(b, (*range(len(b.shape) - 2), len(b.shape) - 1, len(b.shape) - 2)) if transposed else b
    computed = {computed_in(dtype) for dtype in (a.dtype, b.dtype, DTYPES[node.meta["val"].dtype])}
    if len(a.shape) > 1 and len(b.shape) > 1 and computed == {"float32"}:
        return _batched(lowering, node, numbers_of(lowering, a), b, f"matmul_{node.name}", begin)
    return begin(_generic(lowering, node, a, b))


def _batched(lowering: Lowering, node: Node, a: View, b: View, name: str, begin: Callable[[Any], Any] = _bare) -> View:
    def build(result: Product, end: Any) -> Code:
        return lowering.choose(batched_gemm.offer(a, b, result, end, name, lowering.target))

    return lowering.anchored(node, build, begin)


def _generic(lowering: Lowering, node: Node, a: View, b: View) -> View:
    shape, dtype = shape_of(node.meta["val"]), DTYPES[node.meta["val"].dtype]
    vector_a, vector_b = len(a.shape) == 1, len(b.shape) == 1

    def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        (k,) = reduced
        axes = [index.axis(number) for number in range(len(shape))]
        column = None if vector_b else axes.pop()
        row = None if vector_a else axes.pop()
        left = _broadcast(a.shape[:-2], axes) + ([k] if vector_a else [row, k])
        right = _broadcast(b.shape[:-2], axes) + ([k] if vector_b else [k, column])
        factors = [
            kernel.load(value, Index(value.shape, kernel.sizes, axes=tuple(at)))
            for value, at in ((a, left), (b, right))
        ]
        return convert(factors[0], computed_in(dtype)) * convert(factors[1], computed_in(dtype))

    return reduce_generic(lowering, f"matmul_{node.name}", shape, dtype, (a.shape[-1],), (a, b), element, "sum")


def _outer(lowering: Lowering, node: Node) -> Lazy:
    x, y = (lowering.view(argument) for argument in node.args)
    shape, dtype = shape_of(node.meta["val"]), DTYPES[node.meta["val"].dtype]

    def element(kernel: Kernel, index: Index) -> Any:
        factors = [kernel.load(v, Index(v.shape, kernel.sizes, axes=(index.axis(n),))) for n, v in enumerate((x, y))]
        left, right = (convert(factor, computed_in(dtype)) for factor in factors)
        return convert(left * right, dtype)

    return Lazy(shape, dtype, (x, y), element)


def _einsum(lowering: Lowering, node: Node) -> Any:
    """Sum over the letters that the result lacks of the product of all operands."""
    equation, tensors, _ = arguments(node).values()
    terms, _, result = equation.replace(" ", "").partition("->")
    letters = terms.replace(",", "")
    if "." in equation:
        raise CompileError(f"{node.name} is an einsum with '...', which has no lowering; name every axis")
    if "->" not in equation:
        result = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    views = [lowering.view(tensor) for tensor in tensors]
    matrices = _matrices(terms.split(","), views, result)
    if matrices and computed_in(DTYPES[node.meta["val"].dtype]) == "float32":
        a, b = lowering.view(widened(lowering, matrices[0])), matrices[1]
        return _batched(lowering, node, a, b, f"einsum_{node.name}")
    sizes = {
        c: size
        for term, view in zip(terms.split(","), views, strict=True)
        for c, size in zip(term, view.shape, strict=True)
    }
    summed = [letter for letter in sizes if letter not in result]
    shape, dtype = shape_of(node.meta["val"]), DTYPES[node.meta["val"].dtype]

    def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        at = dict(zip(summed, reduced, strict=True)) | {letter: index.axis(n) for n, letter in enumerate(result)}
        product = None
        for term, view in zip(terms.split(","), views, strict=True):
            position = Index(view.shape, kernel.sizes, axes=tuple(at[letter] for letter in term))
            factor = convert(kernel.load(view, position), computed_in(dtype))
            product = factor if product is None else product * factor
        return product

    depth = tuple(sizes[letter] for letter in summed)
    return reduce_generic(lowering, f"einsum_{node.name}", shape, dtype, depth, views, element, "sum")


def _matrices(terms: list[str], views: list[View], result: str) -> tuple[View, View] | None:
    """The operands as [batch, M, K] and [batch, K, N] where the einsum is their product, else none."""
    if len(terms) != 2 or len(result) < 2 or any(len(set(term)) < len(term) for term in terms):
        return None
    batch, m, n = result[:-2], result[-2], result[-1]
    if m in terms[1]:
        terms, views = terms[::-1], views[::-1]
    summed = set(terms[0]) - set(result)
    if len(summed) != 1:
        return None
    (k,) = summed
    wanted = batch + m + k, batch + k + n
    if any(set(term) != set(letters) for term, letters in zip(terms, wanted, strict=True)):
        return None
    a, b = (
        permuted(view, [term.index(letter) for letter in letters])
        for view, term, letters in zip(views, terms, wanted, strict=True)
    )
    return (a, b) if a.shape[-1] == b.shape[-2] else None  # an axis of size 1 is repeated


def _broadcast(shape: tuple[Size, ...], axes: list[Any]) -> list[Any]:
    used = axes[len(axes) - len(shape) :] if shape else []
    return [0 if size == 1 else axis for size, axis in zip(shape, used, strict=True)]


TABLE: dict[Any, Callable[..., Any]] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.mm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mv.default: _matmul,
    aten.dot.default: _matmul,
    aten.outer.default: _outer,
    aten.einsum.default: _einsum,
    aten.baddbmm.default: _addmm,
}
