"""`torch.cond` as a Relax `If`: each branch is lowered by itself, fused and packed as the main graph is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import relax

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Storage, View, whole

if TYPE_CHECKING:
    from graphopt.backends.lowering import Lowering


def _cond(lowering: Lowering, node: Node) -> tuple[View, ...]:
    predicate, true_graph, false_graph, operands = node.args
    test = lowering.contiguous(predicate)
    arguments = [lowering.branch_argument(operand) for operand in operands]  # type: ignore[union-attr]
    results = node.meta["val"]
    types = [relax.TensorType(lowering.sizes.shape(shape_of(r)), DTYPES[r.dtype]) for r in results]
    kind = types[0] if len(types) == 1 else relax.TupleType(types)
    branches = [lowering.branch(graph, arguments, kind) for graph in (true_graph, false_graph)]  # type: ignore[arg-type]
    chosen = lowering.bind(relax.If(test.storage.variable, *branches), kind)
    variables = [chosen]
    if len(types) > 1:
        variables = [lowering.bind(relax.TupleGetItem(chosen, n), t) for n, t in enumerate(types)]
    return tuple(whole(Storage(v, shape_of(r), DTYPES[r.dtype])) for v, r in zip(variables, results, strict=True))


TABLE: dict[Any, Callable[..., Any]] = {torch.ops.higher_order.cond: _cond}
