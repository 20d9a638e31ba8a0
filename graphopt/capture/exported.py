"""An ExportedProgram as a Program."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from graphopt.capture.asked_memory import refuse_large_inputs, refuse_large_values
from graphopt.capture.domains import infer_domains
from graphopt.capture.dynamic import name_axes, read_request
from graphopt.capture.expressions import size_range, size_text
from graphopt.capture.hoist import hoisted
from graphopt.capture.inputs import draw_examples, drawn_sizes
from graphopt.capture.linear_export import linear_export
from graphopt.capture.names import spec_paths
from graphopt.capture.normal_form import Flat, fake_mode, flatten, same_storage_view
from graphopt.capture.quiet import quiet
from graphopt.capture.source_line import is_user_file, location
from graphopt.capture.table_bounds import limit_by_tables
from graphopt.effects import draws_random
from graphopt.errors import CaptureError, FeedError, UnknownNameError
from graphopt.program import Domain, Exits, Program, SizeRange, State, TensorSpec
from graphopt.untrusted.limits import Limits
from graphopt.untrusted.names import join, output_names


@dataclass(frozen=True)
class Known:
    """What the caller knows about a program beyond its graph; everything may be left out."""

    inputs: Sequence[str] | None = None  # one name for each user input of the graph, constants included
    outputs: Sequence[str] | None = None
    symbols: Mapping[str, str] = field(default_factory=dict)  # ShapeEnv name -> user name
    sizes: Mapping[str, SizeRange] = field(default_factory=dict)
    domains: Mapping[str, Domain] = field(default_factory=dict)
    examples: Sequence[torch.Tensor] | None = None  # one for each tensor input
    name: str | None = None
    history: tuple[Mapping[str, Any], ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    bound: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    exits: Exits | None = None


def from_exported(exported: ExportedProgram, known: Known, *, name: str, limits: Limits) -> Program:
    """Decompose and flatten an ExportedProgram, which is left as it was."""
    _refuse_nodes(exported.graph_module, limits)
    inputs = list(known.inputs) if known.inputs is not None else _input_names(exported)
    outputs = list(known.outputs) if known.outputs is not None else _output_names(exported)
    decomposed = _decompose(exported)
    _refuse_input_mutation(decomposed, inputs)
    flat = flatten(decomposed, inputs, outputs)
    program = assemble(flat, known, name=name, limits=limits)
    return replace(program, examples=_examples(program, exported, known, limits))


def assemble(flat: Flat, known: Known, *, name: str, limits: Limits) -> Program:
    """A Program without examples around a graph in normal form: specs, sizes with their bounds, domains."""
    _refuse_nodes(flat.graph_module, limits)
    refuse_large_values(flat.graph_module, limits)
    symbols, sizes = _sizes(flat, known)
    sizes = limit_by_tables(flat.graph_module, symbols, sizes)
    specs = [_spec(n, v, symbols) for n, v in zip((*flat.inputs, *flat.state), _placeholders(flat), strict=True)]
    given = infer_domains(flat.graph_module)
    count = len(flat.inputs)
    ins = [
        replace(spec, domain=known.domains.get(spec.name, domain))
        for spec, domain in zip(specs[:count], given[:count], strict=True)
    ]
    (output,) = flat.graph_module.graph.find_nodes(op="output")
    outs = [_spec(n, node.meta["val"], symbols) for n, node in zip(flat.outputs, output.args[0], strict=False)]
    return Program(
        graph_module=flat.graph_module,
        inputs=tuple(ins),
        outputs=tuple(outs),
        examples=(),
        state=tuple(State(s, t) for s, t in zip(specs[count:], flat.state.values(), strict=True)),
        sizes=sizes,
        symbols=symbols,
        name=name,
        history=known.history,
        metadata=known.metadata,
        bound=known.bound,
        notes=known.notes,
        exits=known.exits,
    )


def _decompose(exported: ExportedProgram) -> ExportedProgram:
    with quiet(), linear_export():
        try:
            decomposed: ExportedProgram = hoisted(exported).run_decompositions({})
            return decomposed
        except Exception as error:
            shared = _sharing(exported)
            if shared is not None:
                raise CaptureError(
                    f"{shared[0]!r} and {shared[1]!r} share memory, which forward writes to or a torch.cond reads "
                    "twice; make one a copy (clone())"
                ) from error
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CaptureError(f"the exported program cannot be decomposed: {first}") from error


def _sharing(exported: ExportedProgram) -> tuple[str, str] | None:
    """Two tensors of the model that are different views of one storage."""
    owners: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in {**exported.state_dict, **exported.constants}.items():
        if isinstance(value, torch.Tensor):
            first, other = owners.setdefault(value.untyped_storage()._cdata, (name, value))
            if same_storage_view(other) != same_storage_view(value):
                return first, name
    return None


def _refuse_input_mutation(exported: ExportedProgram, names: Sequence[str]) -> None:
    nodes = [s.arg.name for s in exported.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    for spec in exported.graph_signature.output_specs:
        if spec.kind == OutputKind.USER_INPUT_MUTATION:
            name = names[nodes.index(str(spec.target))]
            raise CaptureError(f"forward writes into its input {name!r}; let it work on a copy ({name}.clone())")


def _refuse_nodes(module: GraphModule, limits: Limits) -> None:
    graphs = [child for child in module.modules() if isinstance(child, GraphModule)]
    count = sum(len(graph.graph.nodes) for graph in graphs)
    if count > limits.max_nodes:
        raise CaptureError(f"the model has {count} nodes, over the limit of {limits.max_nodes}; raise Limits.max_nodes")
    for graph in graphs:
        for node in graph.graph.nodes:
            if node.meta.get("unbacked_bindings"):
                raise CaptureError(
                    f"a size or number depends on the values of a tensor ({node.target}{_where(node)}), which graphopt "
                    "cannot express; keep it a tensor of known size, for example padded with a mask"
                )
            if draws_random(node):
                raise CaptureError(
                    f"the model draws random numbers ({node.target}{_where(node)}); export it in eval mode, or pass "
                    "the random tensor as an input"
                )


def _where(node: Node) -> str:
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    lines = [location(file, int(line)) for file, line in found if is_user_file(file)]
    return f" at {lines[-1]}" if lines else ""


def _input_names(exported: ExportedProgram) -> list[str]:
    specs = [s for s in exported.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    (call,) = (entry for entry in exported.module_call_graph if entry.fqn == "")
    if call.signature is None or call.signature.in_spec is None:
        return [s.arg.name for s in specs]
    arguments = call.signature.forward_arg_names
    names = []
    for path in spec_paths(call.signature.in_spec):
        kind, *rest = path
        if kind == "0" and arguments and int(rest[0]) < len(arguments):
            rest[0] = arguments[int(rest[0])]
        names.append(join(rest))
    return names if len(names) == len(specs) else [s.arg.name for s in specs]


def _output_names(exported: ExportedProgram) -> list[str]:
    count = sum(s.kind == OutputKind.USER_OUTPUT for s in exported.graph_signature.output_specs)
    paths = spec_paths(exported.call_spec.out_spec) if exported.call_spec.out_spec is not None else []
    return output_names(paths if len(paths) == count else [(str(index),) for index in range(count)])


def _placeholders(flat: Flat) -> list[Any]:
    return [node.meta["val"] for node in flat.graph_module.graph.find_nodes(op="placeholder")]


def _spec(name: str, value: Any, symbols: Mapping[str, str]) -> TensorSpec:
    return TensorSpec(name, value.dtype, tuple(size_text(size, symbols) for size in value.shape))


def _sizes(flat: Flat, known: Known) -> tuple[dict[str, str], dict[str, SizeRange]]:
    """Names and bounds of the symbols in the inputs' sizes, in order of appearance."""
    environment = fake_mode(flat.graph_module).shape_env
    symbols: dict[str, str] = {}
    sizes: dict[str, SizeRange] = {}
    taken = set(known.symbols.values())
    for value in _placeholders(flat):
        for size in value.shape:
            expression = size.node.expr if isinstance(size, torch.SymInt) else None
            free = () if expression is None else sorted(expression.free_symbols, key=str)
            for symbol in free:
                if str(symbol) in symbols:
                    continue
                fresh = next(f"s{i}" for i in range(len(symbols) + len(taken) + 1) if f"s{i}" not in taken)
                chosen = known.symbols.get(str(symbol), fresh)
                taken.add(chosen)
                symbols[str(symbol)] = chosen
                sizes[chosen] = known.sizes.get(chosen) or size_range(environment, symbol)
    return symbols, sizes


def _examples(program: Program, exported: ExportedProgram, known: Known, limits: Limits) -> tuple[torch.Tensor, ...]:
    found: Sequence[Any] | None = known.examples
    if found is None and exported.example_inputs is not None:
        found = [leaf for leaf in pytree.tree_leaves(exported.example_inputs) if isinstance(leaf, torch.Tensor)]
    if found is None or len(found) != len(program.inputs):
        return _drawn(program, limits)
    examples = tuple(value.detach().clone() for value in found)
    try:
        program.bind(examples)
    except FeedError as error:
        if known.examples is None:
            return _drawn(program, limits)
        raise CaptureError(f"example_inputs do not fit the model: {error}") from error
    return examples


def _drawn(program: Program, limits: Limits) -> tuple[torch.Tensor, ...]:
    refuse_large_inputs(program, drawn_sizes(program), limits)
    return draw_examples(program)


def with_request(
    exported: ExportedProgram, known: Known, example_inputs: Any, dynamic_shapes: Mapping[str, Any] | None
) -> Known:
    """Add what the caller gave along with an exported program: examples, and names of its dynamic sizes."""
    names = list(known.inputs) if known.inputs is not None else _input_names(exported)
    values = user_values(exported, names)
    if example_inputs is not None:
        known = replace(known, examples=match_examples(example_inputs, list(values)))
    if dynamic_shapes:
        environment = next((value.fake_mode.shape_env for value in values.values()), None)
        symbols, sizes = name_axes(read_request(dynamic_shapes, values), values, environment)
        known = replace(known, symbols={**known.symbols, **symbols}, sizes={**known.sizes, **sizes})
    return known


def user_values(exported: ExportedProgram, names: Sequence[str]) -> dict[str, Any]:
    """The fake tensors of the tensor inputs by name."""
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    specs = [s for s in exported.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    if len(specs) != len(names):
        raise CaptureError(f"the exported program names {len(names)} inputs but its graph has {len(specs)}")
    values = {name: nodes[spec.arg.name].meta.get("val") for name, spec in zip(names, specs, strict=True)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def match_examples(example_inputs: Any, names: list[str]) -> list[torch.Tensor]:
    """One tensor for each name, from a dict or a tuple in order. Raises CaptureError or UnknownNameError."""
    if isinstance(example_inputs, Mapping):
        for key in example_inputs:
            if key not in names:
                raise UnknownNameError("input", str(key), names)
        missing = [name for name in names if name not in example_inputs]
        if missing:
            raise CaptureError(f"example_inputs lack {missing[0]!r}")
        leaves = [example_inputs[name] for name in names]
    else:
        leaves = [leaf for leaf in pytree.tree_leaves(example_inputs) if isinstance(leaf, (torch.Tensor, np.ndarray))]
    if len(leaves) != len(names):
        given = f"example_inputs hold {len(leaves)}"
        raise CaptureError(f"the model takes {len(names)} inputs ({', '.join(names)}), {given}")
    return [torch.as_tensor(leaf).detach().clone() for leaf in leaves]
