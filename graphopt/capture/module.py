"""A torch module as a Program: exported in eval mode, the module itself left as it was."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils import _pytree as pytree

from graphopt.capture import source_line
from graphopt.capture.dynamic import Request, distinct_sizes, example_sizes, name_axes, read_request, resize
from graphopt.capture.exported import Known, from_exported, user_values
from graphopt.capture.least_sizes import raise_least_sizes
from graphopt.capture.linear_export import linear_export
from graphopt.capture.names import argument_names, leaf_paths
from graphopt.capture.quiet import quiet
from graphopt.capture.recurrent import RecurrentLayers
from graphopt.errors import CaptureError, UnknownNameError
from graphopt.program import Program, SizeRange, evaluate_size
from graphopt.untrusted.limits import Limits
from graphopt.untrusted.names import join

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def from_module(
    module: torch.nn.Module,
    example_inputs: Any,
    dynamic_shapes: Mapping[str, Any] | None,
    *,
    name: str,
    limits: Limits,
) -> Program:
    """Export `module` on the examples; see `graphopt.capture.capture` for the arguments and errors."""
    if isinstance(module, GraphModule):
        _LazyGraphModule.force_recompile(module)  # only then has forward the graph's own arguments
    arguments = read_examples(module, example_inputs)
    names = [join(path) for path, _ in _named_leaves(module, arguments)]
    leaves = pytree.tree_leaves(arguments)
    inputs = {n: leaf for n, leaf in zip(names, leaves, strict=True) if isinstance(leaf, torch.Tensor)}
    request = read_request(dynamic_shapes, inputs)
    with _left_as_it_was(module):
        exported, symbols, sizes = _export(module, arguments, names, request)
    examples = [leaf if not _out_of_bounds(n, leaf, request, sizes) else None for n, leaf in inputs.items()]
    known = Known(
        inputs=names,
        symbols=symbols,
        sizes=sizes,
        examples=[example for example in examples if example is not None],
    )
    return raise_least_sizes(from_exported(exported, known, name=name, limits=limits), request.low)


def read_examples(module: torch.nn.Module, example_inputs: Any) -> Arguments:
    """Positional and named arguments for forward, arrays as tensors. Raises CaptureError or UnknownNameError."""
    if example_inputs is None:
        raise CaptureError("a module needs example_inputs: a tuple of tensors, or a dict from argument name to tensor")
    if isinstance(example_inputs, (torch.Tensor, np.ndarray)):
        example_inputs = (example_inputs,)
    parameters = inspect.signature(module.forward).parameters
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for key in example_inputs:
            if key not in parameters and not anything:
                raise UnknownNameError("input", str(key), parameters)
        order = [*(n for n in parameters if n in example_inputs), *(n for n in example_inputs if n not in parameters)]
        kwargs = {key: example_inputs[key] for key in order}
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    else:
        raise CaptureError(f"example_inputs must be a tuple or a dict, got {type(example_inputs).__name__}")
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(f"example_inputs do not fit forward{inspect.signature(module.forward)}: {error}") from error
    converted: Arguments = pytree.tree_map(_tensor, (args, kwargs))
    return converted


def _tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(value.copy())
        except TypeError as error:
            raise CaptureError(f"example_inputs hold an array of {value.dtype}, which torch does not have") from error
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _named_leaves(module: torch.nn.Module, arguments: Arguments) -> list[tuple[tuple[str, ...], Any]]:
    positional = argument_names(module, len(arguments[0]))
    return [
        ((positional[int(path[1])], *path[2:]) if path[0] == "0" else path[1:], leaf)
        for path, leaf in leaf_paths(arguments)
    ]


@contextmanager
def _left_as_it_was(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards training flags, gradients' mode and random states are what they were."""
    flags = {child: child.training for child in module.modules()}
    python, array, generator = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        for child in flags:
            child.training = False
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for child, flag in flags.items():
            child.training = flag
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(generator)


def _export(
    module: torch.nn.Module, arguments: Arguments, names: list[str], request: Request
) -> tuple[ExportedProgram, dict[str, str], dict[str, SizeRange]]:
    leaves, spec = pytree.tree_flatten(arguments)
    inputs = {n: leaf for n, leaf in zip(names, leaves, strict=True) if isinstance(leaf, torch.Tensor)}
    asked = example_sizes(request, inputs)
    fixed = {size for n, leaf in inputs.items() for i, size in enumerate(leaf.shape) if not _asks(request, n, i)}

    def attempt(sizes: Mapping[str, int]) -> tuple[ExportedProgram, dict[str, str], dict[str, SizeRange]]:
        scaled = [_scale(n, leaf, request, sizes) for n, leaf in zip(names, leaves, strict=True)]
        exported = _run_export(
            module, pytree.tree_unflatten(scaled, spec), _shapes(module, names, scaled, spec, request)
        )
        values = user_values(exported, names)
        return exported, *name_axes(request, values, _environment(values))

    errors: list[CaptureError] = []
    for sizes in distinct_sizes(request, asked, fixed):
        try:
            return attempt(sizes)
        except CaptureError as error:
            errors.append(error)
    kept = {name: size * (1 if min(asked.values()) >= 2 else 2) for name, size in asked.items()}
    common = {name: max(2, *asked.values()) for name in asked}
    raise _explain(errors[0], attempt, [kept, common] if asked else [])


def _explain(
    error: CaptureError, attempt: Callable[[Mapping[str, int]], Any], others: list[Mapping[str, int]]
) -> CaptureError:
    """The better message where distinct sizes fail because the model ties them: what it makes of tied sizes."""
    if "cannot be exported" not in str(error):
        return error
    for sizes in others:
        try:
            attempt(sizes)
        except CaptureError as other:
            if "cannot be exported" not in str(other):
                return _located(other, error)
    return error


def _located(error: CaptureError, failure: CaptureError) -> CaptureError:
    """`error` with the source line of `failure` where it has none of its own."""
    where = str(failure).rpartition(" at ")[2]
    if " at /" in str(error) or ": `" not in where:
        return error
    text, separator, advice = str(error).partition("; ")
    return CaptureError(f"{text} at {where}{separator}{advice}")


def _asks(request: Request, name: str, axis: int) -> bool:
    return any(entry.input == name and entry.axis == axis for entry in request.axes)


def _scale(name: str, leaf: Any, request: Request, sizes: Mapping[str, int]) -> Any:
    for entry in request.axes:
        if entry.input == name:
            leaf = resize(leaf, entry.axis, evaluate_size(entry.size, sizes))
    return leaf


def _shapes(
    module: torch.nn.Module, names: list[str], leaves: list[Any], spec: pytree.TreeSpec, request: Request
) -> Any:
    """dynamic_shapes for torch.export: every axis asked for may vary; what the model makes of it is checked after."""
    if not request.axes:
        return None
    shapes: list[Any] = []
    for name, leaf in zip(names, leaves, strict=True):
        axes = {
            entry.axis: Dim.AUTO(min=request.low.get(entry.size) or 1, max=request.high.get(entry.size))
            for entry in request.axes
            if entry.input == name
        }
        shapes.append(axes if isinstance(leaf, torch.Tensor) else None)
    args, kwargs = pytree.tree_unflatten(shapes, spec)
    signature = inspect.signature(module.forward)
    bound = dict(signature.bind(*args, **kwargs).arguments)  # torch wants one entry a parameter, a tuple for *args
    for name in bound:
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            raise CaptureError(
                f"torch.export has no dynamic sizes where arguments are passed through **{name}; name them in forward"
            )
    return bound


def _run_export(module: torch.nn.Module, arguments: Arguments, shapes: Any) -> ExportedProgram:
    args, kwargs = arguments
    try:
        with quiet(), linear_export(), RecurrentLayers(), source_line.guards_located(__file__):
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        where = source_line.of_exception(error, __file__)
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise CaptureError(f"the model cannot be exported: {reason}{f' at {where}' if where else ''}") from error


def _environment(values: Mapping[str, Any]) -> Any:
    return next((value.fake_mode.shape_env for value in values.values()), None)


def _out_of_bounds(name: str, leaf: torch.Tensor, request: Request, sizes: Mapping[str, SizeRange]) -> bool:
    for entry in request.axes:
        bounds = sizes.get(entry.size)
        if entry.input == name and bounds is not None and leaf.shape[entry.axis] < bounds.low:
            return True
    return False
