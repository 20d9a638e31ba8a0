"""What every pass owes its caller, checked on one model: count, numbers, purity, idempotence."""

from __future__ import annotations

from typing import Any

import torch

import graphopt
from graphopt.contract import Pass, PassContext, PassResult
from graphopt.program import Program


def check_pass(program: Program, pass_: Pass, rewrites: int, reason: str | None = None) -> PassResult:
    """Run the pass, check all that holds for any pass, and that some decline says `reason`."""
    printed, tensors = fingerprint(program)
    result = pass_.run(program, PassContext())
    assert len(result.rewrites) == rewrites, [*result.rewrites, *result.declined]
    assert fingerprint(program)[0] == printed
    assert all(torch.equal(old, new) for old, new in zip(fingerprint(program)[1], tensors, strict=True))
    again = graphopt.optimize(program, [pass_]).program
    assert str(again.graph_module.graph) == str(result.program.graph_module.graph)
    assert not pass_.run(result.program, PassContext()).rewrites
    ids = [item.id for item in result.rewrites]
    assert len(ids) == len(set(ids))
    refused = pass_.run(program, PassContext(allow=lambda identity: False))
    assert refused.program is program and not refused.rewrites
    if reason is not None:
        assert any(reason in item.reason for item in result.declined), result.declined
    return result


def fingerprint(program: Program) -> tuple[str, list[torch.Tensor]]:
    graphs = "\n".join(f"{path}: {module.graph}" for path, module in program.graphs())
    return graphs, [tensor.detach().clone() for tensor in program.graph_module.state_dict().values()]


def captured(module: torch.nn.Module, *inputs: torch.Tensor, dynamic: dict[str, Any] | None = None) -> Program:
    """Capture with positional examples."""
    return graphopt.capture(module, inputs, dynamic_shapes=dynamic)


def targets(program: Program) -> list[str]:
    """The operators of all graphs in order, without overloads: "aten.linear"."""
    calls = [node for node in program.nodes() if node.op == "call_function"]
    return [str(node.target).rpartition(".")[0] or str(node.target) for node in calls]
