"""A program for some values of its symbolic sizes: tensors are shared, kernels for one size can be better ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg

from graphopt.capture.dynamic import resize
from graphopt.capture.expressions import size_text
from graphopt.errors import PropagationError, UnknownNameError, UsageError
from graphopt.program import Program, TensorSpec, evaluate_size
from graphopt.propagate import changes_downstream, find_mode


def fix_sizes(program: Program, values: Mapping[str, int]) -> Program:
    """The program with these of its sizes fixed; see `Program.fix_sizes`."""
    for name, value in values.items():
        if name not in program.sizes:
            raise UnknownNameError("size", name, program.sizes)
        if not isinstance(value, Integral):
            raise UsageError(f"size {name!r} cannot be {value!r}; give a whole number")
        bounds = program.sizes[name]
        if value < bounds.low or (bounds.high is not None and value > bounds.high):
            top = "and up" if bounds.high is None else f"to {bounds.high}"
            raise UsageError(f"size {name!r} cannot be {value}; it is {bounds.low} {top}")
    fixed = program.copy()
    graph = fixed.graph_module.graph
    mode = find_mode(fixed.graph_module)
    known = _by_symbol(program, values)
    places = graph.find_nodes(op="placeholder")
    given = {node: _fixed_input(node, mode, known) for node in places}
    try:
        changes = {**given, **changes_downstream(mode, given)}
    except PropagationError as error:
        raise UsageError(f"{program.name} has no form with {_named(values)} alone: {error}") from error
    for node, value in changes.items():
        node.meta["val"] = value
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), int):
            _replace(node, node.meta["val"])
    graph.eliminate_dead_code()
    graph.lint()
    fixed.graph_module.recompile()
    symbols = {symbol: name for symbol, name in program.symbols.items() if name not in values}
    results = [node.meta["val"] for node in graph.output_node().args[0]]  # type: ignore[union-attr]
    inputs = _specs(program.inputs, [node.meta["val"] for node in places], symbols)
    return replace(
        fixed,
        inputs=inputs,
        outputs=_specs(program.outputs, results, symbols),
        examples=_examples(program, values),
        sizes={name: bounds for name, bounds in program.sizes.items() if name not in values},
        symbols=symbols,
    )


def _named(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _by_symbol(program: Program, values: Mapping[str, int]) -> dict[str, int]:
    return {symbol: values[name] for symbol, name in program.symbols.items() if name in values}


def _fixed_input(node: Node, mode: FakeTensorMode, known: Mapping[str, int]) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    sizes = [_fixed_size(size, known) for size in value.shape]
    with mode:
        return torch.empty(sizes, dtype=value.dtype, device=value.device)


def _fixed_size(size: int | torch.SymInt, known: Mapping[str, int]) -> int | torch.SymInt:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    symbols = [symbol for symbol in expression.free_symbols if str(symbol) in known]
    left = expression.xreplace({symbol: sympy.Integer(known[str(symbol)]) for symbol in symbols})
    if left == expression:
        return size
    if left.is_Integer:
        return int(left)
    fixed: torch.SymInt = size.node.shape_env.create_symintnode(left, hint=None)
    return fixed


def _replace(node: Node, value: int) -> None:
    for user in list(node.users):
        args, kwargs = map_arg((user.args, user.kwargs), lambda other: value if other is node else other)
        user.args, user.kwargs = args, kwargs


def _specs(
    specs: tuple[TensorSpec, ...], values: list[torch.Tensor], symbols: Mapping[str, str]
) -> tuple[TensorSpec, ...]:
    return tuple(
        replace(spec, shape=tuple(size_text(size, symbols) for size in value.shape))
        for spec, value in zip(specs, values, strict=False)
    )


def _examples(program: Program, values: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
    if len(program.examples) != len(program.inputs):
        return program.examples
    sizes = {**program.bind(program.examples), **values}
    examples = []
    for spec, example in zip(program.inputs, program.examples, strict=True):
        for axis, size in enumerate(spec.shape):
            example = resize(example, axis, evaluate_size(size, sizes))
        examples.append(example)
    return tuple(examples)
