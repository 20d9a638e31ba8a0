"""A program without names of modules, nodes and weights, and in another order."""

from __future__ import annotations

import random

from torch.fx import Node

from graphopt.program import Program, get_attribute, set_attribute


def anonymous(program: Program, seed: int = 0) -> tuple[Program, dict[str, str]]:
    """A copy without names and with independent calls in random order, and the old name of each new one."""
    result = program.copy()
    module = result.graph_module
    _shuffle([node for node in module.graph.nodes if node.op == "call_function"], random.Random(seed))
    old: dict[str, str] = {}
    for index, node in enumerate(module.graph.nodes):
        if node.op == "output":
            continue
        name = node.name
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            node.meta.pop(key, None)
        if node.op == "get_attr" and "val" in node.meta:
            set_attribute(module, f"t{index}", get_attribute(module, str(node.target)))
            node.target = f"t{index}"
        node._rename(f"v{index}")
        old[node.name] = name
    module.recompile()
    return result, old


def _shuffle(calls: list[Node], generator: random.Random) -> None:
    known = set(calls)
    waiting = {node: sum(argument in known for argument in node.all_input_nodes) for node in calls}
    ready = [node for node in calls if not waiting[node]]
    last = calls[0].prev
    while ready:
        node = ready.pop(generator.randrange(len(ready)))
        last.append(node)
        last = node
        for user in node.users:
            if user in waiting:
                waiting[user] -= 1
                if not waiting[user]:
                    ready.append(user)
