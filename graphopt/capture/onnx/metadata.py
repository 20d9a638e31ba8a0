"""What an `.onnx` file says of where its nodes come from: written as metadata, read back as provenance.

A node that a rule made carries `graphopt.rule` and `graphopt.from` (a JSON list of the original nodes), any node of a
module its path as `graphopt.module`; `graphopt.rules` of the model counts the nodes of each rule, `graphopt.bound` has
the elements of the one value that a bound input may have, `graphopt.exits` says of early exits which outputs tell of
them, the policy and its thresholds. What torch's exporter notes is dropped: it holds lines and paths of the machine
that exported. The model's own description and metadata are kept from file to file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule, Node

import graphopt
from graphopt.capture.exits import describe_exits, read_exits
from graphopt.capture.onnx.graphs import all_graphs, all_nodes
from graphopt.capture.sidecar import bound_values
from graphopt.program import Exits, Program, provenance

RULE, FROM, MODULE, RULES = "graphopt.rule", "graphopt.from", "graphopt.module", "graphopt.rules"
BOUND, EXITS = "graphopt.bound", "graphopt.exits"
DESCRIPTION = "doc_string"  # its key in `Program.metadata`
_NOT_KEPT = ("graphopt.", "pkg.torch.")
_EXPORTED_FROM = "pkg.torch.onnx.fx_node"


def read_metadata(model: Any) -> dict[str, str]:
    """The description (`DESCRIPTION`) and the metadata of a model, as far as they are text."""
    noted = {entry.key: entry.value for entry in model.metadata_props}
    if model.doc_string:
        noted[DESCRIPTION] = model.doc_string
    texts = {key: value for key, value in noted.items() if isinstance(key, str) and isinstance(value, str)}
    return {key: value for key, value in texts.items() if not key.startswith(_NOT_KEPT)}


def write_provenance(model: Any, exported: GraphModule, metadata: Mapping[str, str]) -> None:
    """Replace the exporter's metadata by ours and the program's; `exported` is the graph whose nodes it names."""
    sources = {node.name: node for graph in _graphs(exported) for node in graph.graph.nodes}
    rules: Counter[str] = Counter()
    for node in all_nodes(model.graph):
        noted = {entry.key: entry.value for entry in node.metadata_props}
        named = re.match(r"%(\S+) :", noted.get(_EXPORTED_FROM, ""))
        source = sources.get(named[1]) if named else None
        del node.metadata_props[:]
        for key, value in _described(source).items() if source is not None else ():
            node.metadata_props.add(key=key, value=value)
        if source is not None and (rule := provenance(source).get("rule")):
            rules[rule] += 1
    for graph in all_graphs(model.graph):
        del graph.metadata_props[:]
        for value in (*graph.value_info, *graph.input, *graph.output, *graph.initializer):
            del value.metadata_props[:]
    del model.metadata_props[:]
    model.producer_name, model.producer_version = "graphopt", graphopt.__version__
    for key, value in metadata.items():
        if key == DESCRIPTION:
            model.doc_string = value
        else:
            model.metadata_props.add(key=key, value=value)
    if rules:
        model.metadata_props.add(key=RULES, value=json.dumps(rules, sort_keys=True))


def write_bound(model: Any, program: Program) -> None:
    """Note the inputs that the program is bound to the values of."""
    if program.bound:
        model.metadata_props.add(key=BOUND, value=json.dumps(bound_values(program), sort_keys=True))


def read_bound(model: Any) -> dict[str, Any]:
    """What `write_bound` wrote: input -> elements; nothing where it is not that. Whether they fit is not checked."""
    noted = {entry.key: entry.value for entry in model.metadata_props}
    try:
        found = json.loads(noted.get(BOUND, "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_provenance(node: Any) -> dict[str, Any] | None:
    """What `write_provenance` wrote of an ONNX node; None where there is nothing, or something else."""
    noted = {entry.key: entry.value for entry in node.metadata_props}
    if RULE not in noted:
        return None
    try:
        origins = json.loads(noted.get(FROM, "[]"))
    except ValueError:
        return None
    if not isinstance(origins, list) or not all(isinstance(name, str) for name in origins):
        return None
    return {"rule": noted[RULE], "from": origins}


def write_exits(model: Any, exits: Exits | None) -> None:
    """Say of a model with exits how they are taken."""
    if exits is not None:
        model.metadata_props.add(key=EXITS, value=json.dumps(describe_exits(exits)))


def exits_of(model: Any) -> Exits | None:
    """What `write_exits` wrote. In a file conditions have no other form than If, so `staged` is read as `cond`."""
    for entry in model.metadata_props:
        if entry.key == EXITS:
            try:
                exits = read_exits(json.loads(entry.value), len(model.graph.output))
            except (ValueError, KeyError, TypeError, RecursionError):
                return None
            return replace(exits, form="cond") if exits is not None and exits.form == "staged" else exits
    return None


def _described(source: Node) -> Mapping[str, str]:
    described: dict[str, str] = {}
    found = provenance(source)
    if rule := found.get("rule"):
        described |= {RULE: str(rule), FROM: json.dumps(list(found.get("from", ())))}
    modules = [path for path, _ in (source.meta.get("nn_module_stack") or {}).values()]
    if modules and modules[-1]:
        described[MODULE] = modules[-1]
    return described


def _graphs(module: GraphModule) -> Iterator[GraphModule]:
    return (item for item in module.modules() if isinstance(item, GraphModule))
