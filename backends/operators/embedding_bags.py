"""Rows of a table added up, averaged or compared in bags of neighbouring ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import computed_in, convert, dtype_of, like
from graphopt.backends.operators.indexing import element_at, inside
from graphopt.backends.rules.generic import reduce_generic
from graphopt.backends.rules.scatter import scatter
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Index, Lazy
from graphopt.errors import CompileError

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
_SUM, _MEAN, _MAX = range(3)


def _embedding_bag(lowering: Lowering, node: Node) -> tuple[Any, ...]:
    """table [V, D], ids [L], starts [B] of bags (with `include_last_offset` one more) to [B, D].

    What else PyTorch returns serves its gradient and has no lowering. Empty bags are 0.
    """
    given = arguments(node)
    if any(user.args[1] != 0 for user in node.users):
        raise CompileError(f"{node.name} returns positions for its gradient, which have no lowering; read the first")
    table, ids, starts = (lowering.view(given[name]) for name in ("weight", "indices", "offsets"))
    weights = None if given["per_sample_weights"] is None else lowering.view(given["per_sample_weights"])
    mode, skipped = given["mode"], given.get("padding_idx", -1)
    skipped = -1 if skipped is None else int(skipped)
    shape, count = shape_of(node.meta["val"][0]), ids.shape[0]

    def later(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        """Bags but the first that begin at or before this id: together its bag."""
        begins = element_at(kernel, starts, [reduced[0] + 1]).astype("int64")
        return tirx.Select(begins <= index.axis(0), tirx.const(1, "int64"), tirx.const(0, "int64"))

    bags = reduce_generic(lowering, "bags", (count,), "int64", (shape[0] - 1,), (starts,), later, "sum")

    def kept(kernel: Kernel, step: Any) -> Any:
        return tirx.NE(element_at(kernel, ids, [step]).astype("int64"), tirx.const(skipped, "int64"))

    def places(kernel: Kernel, task: Index, step: Index, column: Any) -> tuple[Index, Any]:
        here = step.axis(0)
        row = inside(kernel, element_at(kernel, ids, [here]), table.shape[0])
        value = element_at(kernel, table, [row, column])
        value = value if weights is None else value * element_at(kernel, weights, [here])
        nothing = like(value, float("-inf") if mode == _MAX else 0)
        bag = inside(kernel, element_at(kernel, bags, [here]), shape[0])
        return Index(shape, kernel.sizes, axes=(bag, column)), tirx.Select(kept(kernel, here), value, nothing)

    def counted(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        same = tirx.EQ(element_at(kernel, bags, [reduced[0]]), index.axis(0))
        return tirx.Select(tirx.all(same, kept(kernel, reduced[0])), tirx.const(1, "int64"), tirx.const(0, "int64"))

    zeros = Lazy(shape, table.dtype, (), lambda kernel, index: tirx.const(0, table.dtype))
    reads = tuple(value for value in (table, ids, bags, weights) if value is not None)
    combine = "max" if mode == _MAX else "sum"
    code = scatter(zeros, reads, (), (count,), shape[1], places, combine, mode != _MAX, lowering.target)
    (total,) = lowering.call(code)
    if mode == _SUM:
        return (total,)
    sizes = reduce_generic(lowering, "bag_sizes", shape[:1], "int64", (count,), (bags, ids), counted, "sum")

    def element(kernel: Kernel, index: Index) -> Any:
        value = convert(kernel.load(total, index), computed_in(total.dtype))
        size = element_at(kernel, sizes, [index.axis(0)])
        empty = tirx.EQ(size, tirx.const(0, "int64"))
        result = value if mode == _MAX else value / tirx.max(size, tirx.const(1, "int64")).astype(dtype_of(value))
        return convert(tirx.Select(empty, like(value, 0), result), total.dtype)

    return (Lazy(shape, total.dtype, (total, sizes), element),)


TABLE: dict[Any, Callable[..., Any]] = {
    aten._embedding_bag.default: _embedding_bag,
    aten._embedding_bag_forward_only.default: _embedding_bag,
    aten.embedding_bag.default: _embedding_bag,
    aten.embedding_bag.padding_idx: _embedding_bag,
}
