"""Scaled dot-product attention: in float32 one kernel that never stores the scores.

float16 is widened before it and rounded after it, and so is bfloat16 where the target multiplies no pairs of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.bfloat16 import BFLOAT16
from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import cast, convert, like, widened
from graphopt.backends.operators.reduction import exponential, exponentials, finite
from graphopt.backends.operators.views import PERMUTATIONS, RESHAPES, expand, reshape
from graphopt.backends.operators.windows import load_at, quotient
from graphopt.backends.rules.attention import attention
from graphopt.backends.rules.attention_choice import Configuration, configure, is_one_block, offer
from graphopt.backends.rules.generic import reduce_generic
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Index, Lazy, Product, Value, View, inverse, permuted
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Code, Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten


def _attention(lowering: Lowering, node: Node) -> Any:
    """q [B, H, S, D], k and v [B, G, T, D] with H a multiple of G; the result's memory is [B, S, H, D].

    Its epilogue, such as a gate, is computed in the kernel.
    """
    q, k, v, mask, dropout, causal, scale, grouped = arguments(node).values()
    if dropout:
        raise CompileError(f"{node.name} drops attention weights out; capture the model in eval mode")
    shape = shape_of(node.meta["val"])
    flat = len(shape) == 3
    k, v = (lowering.tensor(x) for x in (k, v))
    if (unrepeated := _unrepeated(k, v)) and not grouped:
        grouped, (k, v) = True, unrepeated
    q, k, v = _numbers(lowering, node, q, k, v)
    query, key, value = (_rows_of_vectors(lowering, x, grouped) for x in (q, k, v))
    batch, heads = shape[:2] if not flat else (1, shape[0]) if grouped else (shape[0], 1)
    if not all(isinstance(size, int) for size in (heads, query.shape[-1], value.shape[-1])):
        raise CompileError(f"{node.name} attends with a dynamic number of heads or depth; fixed ones have a lowering")
    groups = max(key.shape[1], value.shape[1]) if grouped else heads
    query = expand(lowering, query, (batch, heads, *query.shape[2:]))
    key, value = (expand(lowering, x, (batch, groups, *x.shape[2:])) for x in (key, value))
    if len(shape) not in (3, 4):
        raise CompileError(f"{node.name} attends over rank {len(shape)}; rank 3 or 4 has a lowering")
    scale = 1 / math.sqrt(int(query.shape[-1])) if scale is None else scale
    bias = None if mask is None else lowering.view(mask)
    if bias is not None and flat and len(bias.shape) == 3 and not grouped:
        bias = _with_one_head(bias)
    if query.dtype == "float64":
        return reshape(lowering, _in_parts(lowering, query, key, value, bias, float(scale), bool(causal)), shape)

    def build(result: Product, end: Any) -> Code:
        target, masking = lowering.target, (bias, float(scale), bool(causal))

        def write(choice: Configuration) -> Code:
            return attention(query, key, value, *masking, result, end, target, choice)

        return lowering.choose(offer(query, key, value, bias, bool(causal), end, target, write))

    order = (0, 2, 1, 3) if not flat else (1, 0, 2) if grouped else ()
    dtype = DTYPES[node.meta["val"].dtype]
    if dtype != "float32":
        whole = Product(tuple(shape[axis] for axis in inverse(order)) if order else shape, "float32")
        rounded = dtype == query.dtype and query.shape[2] != 1 and is_one_block(key, configure(lowering.target))
        (stored,) = lowering.call(build(whole, cast(whole, dtype) if rounded else whole))
        return cast(permuted(stored, order) if order else stored, dtype)
    return lowering.anchored(node, build, order=order, joins=True, ends=_ends)


def _numbers(lowering: Lowering, node: Node, *operands: Any) -> list[Value]:
    """As bfloat16 where the node is and the target multiplies pairs of it, else in the dtype that it is computed in."""
    stored = [lowering.tensor(operand) if isinstance(operand, Node) else operand for operand in operands]
    depth = stored[0].shape[-1]
    even = isinstance(depth, int) and depth % 2 == 0
    if lowering.target.pairs and even and DTYPES[node.meta["val"].dtype] == BFLOAT16:
        return stored
    return [widened(lowering, operand) for operand in operands]


def _in_parts(
    lowering: Lowering, query: View, key: View, value: View, bias: View | None, scale: float, causal: bool
) -> View:
    """float64 by plain products and reductions, with the scores in memory; a row of no keys is 0."""
    (batch, heads, rows, depth), columns = query.shape, key.shape[2]
    dtype, shared = query.dtype, int(heads) // int(key.shape[1])

    def at(kernel: Kernel, view: View, index: Index, *last: Any) -> Any:
        head = index.axis(1) if view is query else quotient(index.axis(1), shared)
        return load_at(kernel, view, (index.axis(0), head, *last))

    def score(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        left = at(kernel, query, index, index.axis(2), reduced[0])
        return left * at(kernel, key, index, index.axis(3), reduced[0]) * tirx.const(scale, dtype)

    shape = (batch, heads, rows, columns)
    scores = reduce_generic(lowering, "attention_scores", shape, dtype, (depth,), (query, key), score, "sum")

    def masked(kernel: Kernel, index: Index) -> Any:
        x = kernel.load(scores, index)
        if bias is not None:
            y = kernel.load(bias, index)
            x = tirx.Select(y, x, like(x, -math.inf)) if bias.dtype == "bool" else x + convert(y, dtype)
        return tirx.Select(index.axis(3) <= index.axis(2), x, like(x, -math.inf)) if causal else x

    seen = lowering.store(Lazy(shape, dtype, (scores, *(() if bias is None else (bias,))), masked))
    total, top = exponentials(lowering, seen, [3])

    def weight(kernel: Kernel, index: Index) -> Any:
        x, sum_ = exponential(kernel.load(seen, index) - finite(kernel, top, index)), kernel.load(total, index)
        return tirx.Select(tirx.EQ(sum_, like(x, 0)), like(x, 0), x / sum_)

    weights = lowering.store(Lazy(shape, dtype, (seen, top, total), weight))

    def term(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        left = load_at(kernel, weights, (index.axis(0), index.axis(1), index.axis(2), reduced[0]))
        return left * at(kernel, value, index, reduced[0], index.axis(3))

    result = (batch, heads, rows, value.shape[3])
    return reduce_generic(lowering, "attention", result, dtype, (columns,), (weights, value), term, "sum")


def _ends(node: Node) -> bool:
    """Whether an epilogue may end here: in float32, which unfinished rows are kept in, and not in a mere view."""
    computes = node.target not in RESHAPES | PERMUTATIONS | {aten.clone.default, aten.contiguous.default}
    return computes and node.meta["val"].dtype == torch.float32


def _unrepeated(*values: Any) -> list[View]:
    """Keys and values [B, G, T, D] of which the heads were repeated equally often; nothing where one was not."""
    found = [value.unrepeated for value in values if isinstance(value, Lazy) and value.unrepeated]
    same = len(found) == len(values) and len({view.shape[1] for view in found}) == 1
    return found if same and all(len(view.shape) == 4 for view in found) else []


def _rows_of_vectors(lowering: Lowering, argument: Any, grouped: bool) -> View:
    """In memory with the last axis contiguous and four axes: three are a batch of one head, or heads in groups."""
    view = lowering.view(argument)
    view = view if view.strides[-1] == 1 else lowering.store(view)
    if len(view.shape) != 3:
        return view
    if grouped:
        return View(view.storage, (1, *view.shape), (0, *view.strides), view.offset)
    return _with_one_head(view)


def _with_one_head(view: View) -> View:
    """[B, S, D] as [B, 1, S, D]."""
    (batch, *shape), (first, *strides) = view.shape, view.strides
    return View(view.storage, (batch, 1, *shape), (first, 0, *strides), view.offset)


TABLE: dict[Any, Callable[..., Any]] = {aten.scaled_dot_product_attention.default: _attention}
