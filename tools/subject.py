"""A model in PyTorch or an artifact, seen alike: something with named inputs that computes named arrays."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import FeedError, UnknownNameError, UsageError
from graphopt.runtime.sizes import parse_size
from graphopt.tools.model_argument import capture_model, is_artifact

if TYPE_CHECKING:
    from graphopt.program import Program
    from graphopt.runtime.session import InferenceSession

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Subject:
    """`draw` makes inputs for sizes by name (missing ones as in the example) and a seed; `run` computes the outputs.

    `program` is None for an artifact.
    """

    inputs: Mapping[str, Shape]
    draw: Callable[[Mapping[str, int], int], Arrays]
    run: Callable[[Mapping[str, Array]], Arrays]
    program: Program | None = None


def open_subject(path: str, arguments: argparse.Namespace, entry: str | None = None) -> Subject:
    """An artifact, or a model captured with the options of `add_capture_options`."""
    return open_artifact(path, entry) if is_artifact(path) else program_subject(capture_model(path, arguments))


def program_subject(program: Program) -> Subject:
    from graphopt.arrays import array_of, result_of, tensor_of
    from graphopt.capture.inputs import draw_inputs

    names = [spec.name for spec in program.inputs]

    def draw(sizes: Mapping[str, int], seed: int) -> Arrays:
        check_sizes(sizes, program.sizes)
        example = program.bind(program.examples)
        drawn = draw_inputs(program, {**{name: example[name] for name in program.sizes}, **sizes}, seed)
        return {name: array_of(value) for name, value in zip(names, drawn, strict=True)}

    def run(feed: Mapping[str, Array]) -> Arrays:
        if unknown := set(feed) - set(names):
            raise UnknownNameError("input", min(unknown), names)
        if missing := [name for name in names if name not in feed]:
            raise FeedError(f"input {missing[0]!r} is missing; the model takes {', '.join(names)}")
        inputs = tuple(tensor_of(np.ascontiguousarray(feed[spec.name]), spec.dtype) for spec in program.inputs)
        program.bind(inputs)
        outputs = program(*inputs)
        return {spec.name: result_of(value) for spec, value in zip(program.outputs, outputs, strict=True)}

    return Subject({spec.name: spec.shape for spec in program.inputs}, draw, run, program)


def open_artifact(path: str, entry: str | None = None) -> Subject:
    from graphopt.runtime.session import InferenceSession

    session = InferenceSession(path)
    name = choose_entry(session, entry)
    shapes: dict[str, Shape] = {item.name: tuple(item.shape) for item in session.get_inputs(name)}
    outputs = [item.name for item in session.get_outputs(name)]

    def draw(sizes: Mapping[str, int], seed: int) -> Arrays:
        example = session.samples(name)[0]
        known = {key: size for input, shape in shapes.items() for key, size in symbols(shape, example[input].shape)}
        check_sizes(sizes, known)
        known |= sizes
        return {key: fit(example[key], [resolve(size, known) for size in shape]) for key, shape in shapes.items()}

    def run(feed: Mapping[str, Array]) -> Arrays:
        return dict(zip(outputs, session.run(None, feed, entry=name), strict=True))

    return Subject(shapes, draw, run)


def add_entry_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--entry", help="which entry of the artifact (default main, or the only one)")


def choose_entry(session: InferenceSession, entry: str | None) -> str:
    """`entry`, else "main", else the only one there is. Raises UsageError or UnknownNameError."""
    entries = session.entries
    if entry is not None:
        if entry not in entries:
            raise UnknownNameError("entry", entry, entries)
        return entry
    if "main" in entries:
        return "main"
    if len(entries) != 1:
        raise UsageError(f"the artifact has the entries {', '.join(entries)}; choose one with --entry")
    return entries[0]


def symbols(shape: Shape, sizes: tuple[int, ...]) -> list[tuple[str, int]]:
    """The names in a shape with their sizes; expressions over names such as "past + 1" are left out."""
    return [(name, size) for name, size in zip(shape, sizes, strict=True) if isinstance(name, str) and is_name(name)]


def is_name(size: str) -> bool:
    return parse_size(size).names == {size}


def resolve(size: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    expression = parse_size(size)
    if missing := sorted(expression.names - set(sizes)):
        raise UsageError(f"size {size} needs {missing[0]}, which no input has by itself; give --size {missing[0]}=N")
    value = expression.value(sizes)
    if value is None or value < 0:
        raise UsageError(f"size {size} cannot be computed from the sizes given; give others with --size")
    return value


def check_sizes(sizes: Mapping[str, int], known: Mapping[str, Any]) -> None:
    for name in sizes:
        if name not in known:
            raise UnknownNameError("size", name, known)


def fit(sample: Array, shape: list[int]) -> Array:
    """The sample's values, repeated or cut to `shape`: they stay in the range the model expects."""
    for axis, size in enumerate(shape):
        sample = np.take(sample, np.arange(size) % sample.shape[axis], axis=axis)
    return np.ascontiguousarray(sample)


def add_size_options(parser: argparse.ArgumentParser) -> None:
    size = "value of a symbolic size, such as batch=1,seq=128 (default: as in the example)"
    parser.add_argument("--size", metavar="NAME=N", nargs="+", action="extend", default=[], help=size)
    shape = "shape of an input, such as input_ids:1x128; the same as --size for each of its axes"
    parser.add_argument("--shape", metavar="NAME:NxN...", nargs="+", action="extend", default=[], help=shape)
    parser.add_argument("--seed", type=int, default=0, help="of the drawn inputs (default 0)")


def chosen_sizes(arguments: argparse.Namespace, inputs: Mapping[str, Shape]) -> dict[str, int]:
    """What --size and --shape say; raises UsageError when they contradict each other or the model."""
    chosen: dict[str, int] = {}
    for option in (item for text in arguments.size for item in text.split(",")):
        name, _, value = option.partition("=")
        if not value.isdecimal():
            raise UsageError(f"--size {option!r} is not NAME=N; write for example --size seq=128")
        add_size(chosen, name, int(value))
    for option in arguments.shape:
        name, _, text = option.rpartition(":")
        sizes = text.split("x") if text else []
        if not name or not all(size.isdecimal() for size in sizes):
            raise UsageError(f"--shape {option!r} is not NAME:NxN...; write for example --shape input_ids:1x128")
        if name not in inputs:
            raise UnknownNameError("input", name, inputs)
        if len(sizes) != len(inputs[name]):
            raise UsageError(f"--shape {option!r} has {len(sizes)} axes, {name} has {len(inputs[name])}")
        for axis, (wanted, size) in enumerate(zip(inputs[name], map(int, sizes), strict=True)):
            if isinstance(wanted, int) and wanted != size:
                raise UsageError(f"axis {axis} of {name} is fixed at {wanted}, not {size}; capture it with --dynamic")
            if isinstance(wanted, str):
                add_size(chosen, *solve(wanted, size, chosen))
    return chosen


def solve(wanted: str, size: int, known: Mapping[str, int]) -> tuple[str, int]:
    """The one unknown name in the size `wanted`, and its value where that is `size`."""
    if is_name(wanted):
        return wanted, size
    expression = parse_size(wanted)
    name = min(expression.names - set(known), default=min(expression.names))
    others = {key: value for key, value in known.items() if key != name}
    value = expression.solve(name, others, size) if expression.names <= {name, *others} else None
    if value is None or value < 0:
        raise UsageError(f"axis {wanted} cannot be made {size}; give its names with --size")
    return name, value


def add_size(chosen: dict[str, int], name: str, size: int) -> None:
    if chosen.setdefault(name, size) != size:
        raise UsageError(f"size {name} is given as {chosen[name]} and as {size}")
