"""What `graphopt inspect --blocks` says: cut points, repeated blocks, and what each costs at the examples' sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.tools.table import format_bytes, format_table

if TYPE_CHECKING:
    from torch.fx import Node

    from graphopt.analysis.blocks import Block, Repeat
    from graphopt.analysis.cost import Cost
    from graphopt.program import Program


def describe_blocks(program: Program, costs: Mapping[Node, Cost]) -> dict[str, Any]:
    """JSON-able; nodes by name, a block's module only as a hint. `costs` are those of the main graph's nodes."""
    from graphopt.analysis.blocks import find_repeats
    from graphopt.analysis.cut_points import cut_points

    cuts = [
        {"node": cut.node.name, "nodes": len(cut.segment), "side_inputs": _names(cut.side_inputs)}
        for cut in cut_points(program)
    ]
    return {"cut_points": cuts, "repeats": [_describe_repeat(repeat, costs) for repeat in find_repeats(program)]}


def _describe_repeat(repeat: Repeat, costs: Mapping[Node, Cost]) -> dict[str, Any]:
    return {
        "count": len(repeat.blocks),
        "shared_weights": [str(node.target) for node in repeat.shared_weights()],
        "blocks": [_describe_block(block, costs) for block in repeat.blocks],
    }


def _describe_block(block: Block, costs: Mapping[Node, Cost]) -> dict[str, Any]:
    from graphopt.analysis.cost import total_cost
    from graphopt.analysis.view import module_path

    cost = total_cost(costs[node] for node in block.nodes)
    return {
        "module": module_path(block.nodes),
        "input": block.input.name,
        "output": block.output.name,
        "nodes": _names(block.nodes),
        "weights": [str(node.target) for node in block.weights],
        "side_inputs": _names(block.side_inputs),
        "live_outs": _names(block.live_outs),
        "cut_points": _names(block.cut_points),
        "macs": cost.macs,
        "bytes_read": cost.read,
        "bytes_written": cost.written,
        "weight_bytes": cost.weight_bytes,
        "inner": [_describe_repeat(repeat, costs) for repeat in block.inner],
    }


def _names(nodes: Sequence[Node]) -> list[str]:
    return [node.name for node in nodes]


def format_blocks(report: Mapping[str, Any]) -> str:
    """The cut points in one line, and a table with a row a block; blocks within blocks have dotted numbers."""
    names = " ".join(cut["node"] for cut in report["cut_points"]) or "(none)"
    rows = [row for number, repeat in enumerate(report["repeats"], 1) for row in _rows(repeat, str(number))]
    return f"cut points\n  {names}\n\nrepeated blocks\n" + "\n".join(
        "  " + line for line in format_table(rows).splitlines()
    )


def _rows(repeat: Mapping[str, Any], number: str) -> list[dict[str, Any]]:
    rows = []
    for index, block in enumerate(repeat["blocks"], 1):
        rows.append(
            {
                "repeat": number,
                "block": f"{index}/{repeat['count']}",
                "module": block["module"],
                "input": block["input"],
                "output": block["output"],
                "nodes": len(block["nodes"]),
                "MACs": block["macs"],
                "read": format_bytes(block["bytes_read"]),
                "written": format_bytes(block["bytes_written"]),
                "weights": format_bytes(block["weight_bytes"]),
                "side inputs": " ".join(block["side_inputs"]),
            }
        )
        for position, inner in enumerate(block["inner"], 1):
            rows += _rows(inner, f"{number}.{index}.{position}")
    return rows
