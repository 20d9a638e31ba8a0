"""The dynamic sizes of an ONNX model's inputs as symbols: one for each name, whatever its value."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from graphopt.capture.onnx.narrow import NARROW, Narrow
from graphopt.capture.onnx.tensors import dtype_of
from graphopt.errors import CaptureError, FeedError
from graphopt.program import evaluate_size, placeholder_name

_PRIMES = (5, 7, 11, 13, 17, 19, 23)


@dataclass(frozen=True)
class Input:
    """An input of the graph; a size is a number, a name, or an expression over the names of other axes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    narrow: Narrow | None = None


@dataclass(frozen=True)
class Symbols:
    """One symbol of the mode's ShapeEnv for each name in the file."""

    mode: FakeTensorMode
    values: Mapping[str, torch.SymInt]

    @property
    def names(self) -> dict[str, str]:
        """ShapeEnv name -> name in the file."""
        return {str(size.node._expr): name for name, size in self.values.items()}


def read_inputs(graph: Any) -> list[Input]:
    """The inputs that are no initializers. Raises CaptureError for what is no tensor of known rank."""
    held = {proto.name for proto in graph.initializer}
    return [read_input(value) for value in graph.input if value.name not in held]


def read_input(value: Any) -> Input:
    """Name, type and sizes that the file declares. Raises CaptureError for what is no tensor of known rank."""
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        raise CaptureError(f"input {value.name!r} of the ONNX model is no tensor with a known number of axes")
    tensor = value.type.tensor_type
    shape: list[int | str] = []
    for axis, size in enumerate(tensor.shape.dim):
        if size.HasField("dim_value") and size.dim_value >= 0:
            shape.append(int(size.dim_value))
        else:
            shape.append(size.dim_param or _unnamed(value.name, axis))
    dtype = dtype_of(tensor.elem_type, f"input {value.name!r}")
    return Input(value.name, dtype, tuple(shape), NARROW.get(tensor.elem_type))


def _unnamed(name: str, axis: int) -> str:
    return f"{placeholder_name(name)}_axis_{axis}"


def unnamed_sizes(inputs: Sequence[Input]) -> set[str]:
    """The sizes that neither the file nor the caller has a name for: nothing says that two of them differ."""
    return {_unnamed(item.name, axis) for item in inputs for axis in range(len(item.shape))}


def renamed(inputs: Sequence[Input], wanted: Mapping[str, Any]) -> list[Input]:
    """The inputs with the caller's names and expressions for dynamic sizes; files often lack "past + seq"."""
    return [replace(item, shape=_renamed(item.shape, wanted.get(item.name))) for item in inputs]


def _renamed(shape: tuple[int | str, ...], wanted: Any) -> tuple[int | str, ...]:
    """What `read_request` will not take is left alone, and refused there."""
    axes = wanted if isinstance(wanted, Mapping) else {}
    texts = {axis % len(shape): size for axis, size in axes.items() if shape and isinstance(axis, int)}
    names = {axis: size if isinstance(size, str) else getattr(size, "__name__", None) for axis, size in texts.items()}
    return tuple(size if isinstance(size, int) else names.get(axis) or size for axis, size in enumerate(shape))


def with_sizes(inputs: Sequence[Input], numbers: Mapping[str, int]) -> list[Input]:
    """The inputs with numbers in place of these sizes, in expressions too."""
    return [replace(item, shape=tuple(_with_numbers(size, numbers) for size in item.shape)) for item in inputs]


def _with_numbers(size: int | str, numbers: Mapping[str, int]) -> int | str:
    if isinstance(size, int) or not numbers:
        return size
    pattern = r"\b(" + "|".join(map(re.escape, numbers)) + r")\b"
    text = re.sub(pattern, lambda found: str(numbers[found.group()]), size)
    try:
        return evaluate_size(text, {})
    except (FeedError, SyntaxError):  # names are left in it
        return text


def size_names(inputs: Sequence[Input]) -> list[Input]:
    """The inputs with names that size expressions can use."""
    alone = {size for item in inputs for size in item.shape if isinstance(size, str) and size.isidentifier()}
    cleaned = {
        size: size if size in alone or _computed(size, alone) else placeholder_name(size)
        for item in inputs
        for size in item.shape
        if isinstance(size, str)
    }
    return [replace(item, shape=tuple(cleaned[s] if isinstance(s, str) else s for s in item.shape)) for item in inputs]


def free_sizes(inputs: Sequence[Input]) -> list[str]:
    """The names that stand alone somewhere."""
    sizes = (size for item in inputs for size in item.shape)
    return list(dict.fromkeys(size for size in sizes if isinstance(size, str) and size.isidentifier()))


def _computed(text: str, names: set[str]) -> bool:
    """Whether it is arithmetic on sizes that other axes have."""
    try:
        evaluate_size(text, dict.fromkeys(names, 7))
    except (FeedError, SyntaxError, ValueError, ArithmeticError):
        return False
    return True


def make_symbols(hints: Mapping[str, int]) -> Symbols:
    """One symbol a name. Two symbols of one value stay two: names, not values, say what is equal."""
    environment = ShapeEnv(duck_shape=False)
    values: dict[str, torch.SymInt] = {}
    for name, hint in hints.items():
        source = ConstantSource(f"__size_{name}")
        symbol = environment.create_symbol(hint, source, DimDynamic.DYNAMIC, None)
        size = environment.create_symintnode(symbol, hint=hint, source=source)
        assert isinstance(size, torch.SymInt)
        values[name] = size
    return Symbols(FakeTensorMode(shape_env=environment), values)


def fake_input(item: Input, symbols: Symbols) -> torch.Tensor:
    """The fake tensor of an input."""
    shape = [_size(size, symbols.values) for size in item.shape]
    try:
        with symbols.mode:
            return torch.empty(shape, dtype=item.dtype)
    except (RuntimeError, TypeError) as error:  # TypeError: a size over 2^63, which a node's numbers may fix
        raise CaptureError(f"input {item.name!r} has the shape {list(item.shape)}, which no tensor can have") from error


def _size(size: int | str, values: Mapping[str, Any]) -> Any:
    """`evaluate_size` computes with whatever numbers it is given, symbolic ones included."""
    return evaluate_size(size, values)


def hint_choices(names: Sequence[str], given: Mapping[str, int]) -> list[dict[str, int]]:
    """Values to read the graph with: those of the examples, or small primes, one number for all, sizes of images.

    One number for all is for files that give one size several names.
    """
    if set(names) <= set(given):
        return [{name: max(given[name], 2) for name in names}]
    small = {name: _PRIMES[index % len(_PRIMES)] for index, name in enumerate(names)}
    images = [{name: step * (index + 2) for index, name in enumerate(names)} for step in (16, 32, 112)]
    return [{**choice, **given} for choice in (small, dict.fromkeys(names, 6), *images)]
