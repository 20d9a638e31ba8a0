"""Matrix products."""

from __future__ import annotations

import torch

from graphopt.capture.onnx.operation import Operation
from graphopt.capture.onnx.registry import operator
from graphopt.capture.onnx.values import Present, Tensor

aten = torch.ops.aten


@operator("MatMul")
def matmul(op: Operation, left: Present, right: Present) -> Tensor:
    """A product with a weight is a linear layer, as captured models have it."""
    weight = op.emitter.transposed(right) if isinstance(left, Tensor) and isinstance(right, Tensor) else None
    if weight is not None and left.ndim >= 2 and left.shape[-1] == weight.shape[1]:
        return op.call(aten.linear.default, left, weight)
    return op.call(aten.matmul.default, left, right)


@operator("Gemm")
def gemm(op: Operation, left: Present, right: Present, bias: Present | None = None) -> Tensor:
    """alpha * A B + beta * C; the form of a linear layer becomes one."""
    alpha, beta = op.attributes.number("alpha", 1.0), op.attributes.number("beta", 1.0)
    left, right = op.tensor(left), op.tensor(right)
    if op.attributes.integer("transA"):
        left = op.call(aten.permute.default, left, [1, 0])
    transposed = bool(op.attributes.integer("transB"))
    if alpha == 1 and (bias is None or (beta == 1 and bias.ndim == 1 and bias.shape[0] == right.shape[not transposed])):
        weight = right if transposed else op.emitter.transposed(right) or op.call(aten.permute.default, right, [1, 0])
        given = () if bias is None else (op.tensor(bias),)
        return op.call(aten.linear.default, left, weight, *given)
    product: Tensor = op.call(
        aten.matmul.default, left, op.call(aten.permute.default, right, [1, 0]) if transposed else right
    )
    if alpha != 1:
        product = op.call(aten.mul.Tensor, product, alpha)
    if bias is None or beta == 0:
        return product
    scaled = bias if beta == 1 else op.call(aten.mul.Tensor, op.tensor(bias), beta)
    return op.call(aten.add.Tensor, product, scaled)


@operator("Einsum")
def einsum(op: Operation, *values: Present) -> Tensor:
    equation = op.attributes.text("equation", "")
    return op.call(aten.einsum.default, equation.replace(" ", ""), list(values))


@operator("Det")
def determinant(op: Operation, value: Present) -> Tensor:
    return op.call(aten.linalg_det.default, value)
