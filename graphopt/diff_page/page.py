"""The page: one HTML file with its style, its script and the diff as JSON inside, and nothing outside."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from graphopt.diff_page.diff import Diff, DiffNode, align
from graphopt.diff_page.layout import Layout, lay_out
from graphopt.program import Program
from graphopt.report import Counts

SCRIPTS = ("data.js", "colours.js", "rows.js", "edges.js", "panel.js", "search.js", "charts.js", "page.js")
MARK = re.compile(r"\{\{(\w+)\}\}")


def diff_page(
    a: Program,
    b: Program,
    *,
    report: Mapping[str, Any] | None = None,
    profile: Mapping[str, Any] | None = None,
    outputs: Sequence[Mapping[str, Any]] = (),
    titles: tuple[str, str] | None = None,
) -> str:
    """The HTML that shows A and B side by side.

    `report` and `profile` are as in `align`; `outputs` are rows of `graphopt compare`, how far the outputs are apart;
    `titles` are headings in place of the names of the programs.
    """
    diff = align(a, b, report, profile)
    data = page_data(diff, lay_out(diff))
    data["a"]["title"], data["b"]["title"] = titles or (diff.name_a, diff.name_b)
    return fill({**data, "outputs": list(outputs)})


def fill(data: Mapping[str, Any]) -> str:
    """The template with `data` in it; text of the data can end neither the script nor a string in it."""
    template = files(__package__)
    parts = {
        "title": html.escape(f"{data['a']['title']} and {data['b']['title']}"),
        "style": template.joinpath("page.css").read_text("utf-8"),
        "script": "\n".join(template.joinpath(name).read_text("utf-8") for name in SCRIPTS),
        "data": script_json(data),
    }
    return MARK.sub(lambda found: parts[found[1]], template.joinpath("page.html").read_text("utf-8"))


def script_json(value: Any) -> str:
    """JSON for the inside of a script element, in ASCII: `<` would end it, and JSON has no NaN."""
    text = json.dumps(finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def finite(value: Any) -> Any:
    """`value` with None for what is no finite number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def page_data(diff: Diff, layout: Layout) -> dict[str, Any]:
    """What the scripts read; fields that say nothing are left out."""
    return {
        "a": side(diff.a, layout.lanes_a, diff.counts_a),
        "b": side(diff.b, layout.lanes_b, diff.counts_b),
        "rows": [[row.a, row.b] for row in layout.rows],
        "sections": [asdict(section) for section in layout.sections],
        "changes": [asdict(change) for change in diff.account.changes],
        "passes": [asdict(item) for item in diff.account.passes],
        "metric": diff.account.metric,
        "kernels": [asdict(kernel) for kernel in diff.kernels],
    }


def side(nodes: Sequence[DiffNode], lanes: Sequence[int | None], counts: Counts) -> dict[str, Any]:
    return {
        "nodes": [node_data(node, lane) for node, lane in zip(nodes, lanes, strict=True)],
        "operators": dict(counts.operators),
        "count": counts.nodes,
        "parameters": asdict(counts.parameters),
    }


def node_data(node: DiffNode, lane: int | None) -> dict[str, Any]:
    plain = asdict(node)
    plain |= {**plain.pop("description"), "lane": lane}
    return {key: value for key, value in plain.items() if value not in ((), "", None)}
