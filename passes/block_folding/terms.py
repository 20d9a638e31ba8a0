"""What a block keeps of a product whose weight it shares: a scalar and a product of low rank.

y = W x + b becomes s W_shared x + U (V x) + b. s is the least-squares scalar <W, W_shared> / <W_shared, W_shared>, and
U V the best approximation of W - s W_shared at its rank, a truncated singular value decomposition (Eckart and Young
1936, "The approximation of one matrix by another of lower rank"). At full rank W is there again, up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.edit import Builder, GraphEditor
from graphopt.passes.block_folding.products import Product, as_product

aten = torch.ops.aten


def add_terms(
    editor: GraphEditor, rule: str, product: Product, own: Tensor, shared: Tensor, rank: int, scale: bool
) -> None:
    """Bring a product that now reads `shared` nearer to what it was by `own`; rank 0 makes no product of low rank."""
    current = as_product(product.node)
    assert current is not None
    scalar = least_squares_scale(own, shared) if scale else torch.ones((), dtype=own.dtype)
    left = own.detach().double() - scalar.double() * shared.detach().double()
    factors = low_rank(product.as_rows(left), rank) if rank else None
    trained = isinstance(own, torch.nn.Parameter)

    def constant(builder: Builder, value: Tensor) -> Node:
        value = value.to(own.dtype)
        return builder.constant(torch.nn.Parameter(value) if trained else value)

    def build(builder: Builder) -> list[Node]:
        total = current.by(builder, current.weight)
        if scale:
            total = builder.call(aten.mul.Tensor, total, constant(builder, scalar))
        if factors is None:
            return [current.with_bias(builder, total)]
        outer, inner = current.in_two(*factors)
        reduced = current.by(builder, constant(builder, inner))
        return [builder.call(aten.add.Tensor, total, current.by_channel(builder, reduced, constant(builder, outer)))]

    editor.replace(rule, [current.node], build)


def least_squares_scale(weight: Tensor, shared: Tensor) -> Tensor:
    """The number s, of the weight's type, for which s `shared` comes nearest to `weight`; 1 where `shared` is zero."""
    ours, theirs = weight.detach().double(), shared.detach().double()
    square = (theirs * theirs).sum()
    return torch.where(square > 0, (ours * theirs).sum() / square, 1.0).to(weight.dtype)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [rows, rank] and [rank, columns] of the best approximation of `matrix` at this rank, or at full rank.

    Singular values are shared out evenly, so that healing moves both factors alike.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
