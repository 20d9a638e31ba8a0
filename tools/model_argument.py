"""MODEL on the command line: a .onnx or .pt2 file, or package.module:function returning (module, example inputs)."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from graphopt.errors import CaptureError, UsageError
from graphopt.tools.array_file import read_arrays

if TYPE_CHECKING:
    from graphopt.program import Program

HELP = "a .onnx or .pt2 file, or package.module:function returning (module, example_inputs)"
HELP_ARTIFACT = f"a .gopt artifact, {HELP}"
FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
FUNCTION_OF_FILE = re.compile(r"(?:\./)?(\w+(?:/\w+)*)\.py:(\w+)")
AXIS = re.compile(r"(-?\d+)=([^:=]+)(?::(\d+)\.\.(\d+)?)?")
ARTIFACT = ".gopt"


def add_model_argument(parser: argparse.ArgumentParser, help: str = HELP) -> None:
    parser.add_argument("model", metavar="MODEL", help=help)
    add_capture_options(parser)


def add_capture_options(parser: argparse.ArgumentParser) -> None:
    help = "sizes that may change: ids:0=batch,1=seq, with bounds ids:1=seq:1..512, or computed mask:1=past+1"
    parser.add_argument("--dynamic", metavar="NAME:AXIS=SIZE,...", nargs="+", action="extend", default=[], help=help)
    help = "example inputs of a model file by name; an input of a .onnx that decides a shape is bound to its own"
    parser.add_argument("--examples", metavar="FILE.npz", help=help)


def load_model(arguments: argparse.Namespace) -> Program:
    """Capture `arguments.model`; raises UsageError or CaptureError when that is not possible."""
    return capture_model(arguments.model, arguments)


def capture_model(model: str, arguments: argparse.Namespace) -> Program:
    """Capture what `model` names, with the options of `add_capture_options`."""
    check_model(model)
    if arguments.examples is not None and not is_file(model):
        raise UsageError(f"{model} brings example inputs of its own; leave out --examples")
    from graphopt import capture

    if is_file(model):
        source, examples = model, None if arguments.examples is None else read_arrays(arguments.examples)
    else:
        source, examples = call_function(model)
    return capture(source, examples, dynamic_shapes=parse_dynamic(arguments.dynamic) or None)


def check_model(model: str) -> None:
    """Raises UsageError for what cannot be a model by its name, and for files that do not exist."""
    if is_artifact(model):
        raise UsageError(f"{model} is compiled already; give the model it was made from ({HELP})")
    if is_file(model) and not os.path.exists(model):
        raise UsageError(f"{model} does not exist; give {HELP}")
    if os.path.isdir(model) or (not is_file(model) and not FUNCTION.fullmatch(model)):
        raise UsageError(why_no_model(model))


def is_file(model: str) -> bool:
    return model.endswith((".pt2", ".onnx"))


def why_no_model(model: str) -> str:
    if os.path.isdir(model):
        return f"{model} is a folder, and neither a model nor an artifact; give {HELP}"
    if found := FUNCTION_OF_FILE.fullmatch(model):
        return f"{model} names a file; write {found[1].replace('/', '.')}:{found[2]}"
    if "/" in model and not os.path.exists(model):
        return f"{model} does not exist; give {HELP}"
    return f"{model!r} is not a model; give {HELP}"


def is_artifact(path: str) -> bool:
    return path.endswith((ARTIFACT, ARTIFACT + "/")) or os.path.isfile(os.path.join(path, "manifest.json"))


def check_artifact(path: str) -> None:
    """Raises UsageError for what is a model by its name; whether the file is an artifact is seen on opening."""
    if not is_artifact(path) and (path.endswith((".pt2", ".onnx")) or FUNCTION.fullmatch(path)):
        raise UsageError(f"{path} is a model, not an artifact; compile it first: graphopt compile {path} -o model.gopt")


def call_function(model: str) -> tuple[Any, Any]:
    """(module, example inputs) of "package.module:function"."""
    function = find_function(model, "(module, example_inputs)")
    try:
        result = function()
    except MemoryError:
        raise
    except (Exception, SystemExit) as e:
        raise CaptureError(f"{model} failed: {type(e).__name__}: {e}; run it alone to see where") from e
    if not isinstance(result, tuple) or len(result) != 2:
        raise CaptureError(f"{model} returned {type(result).__name__}; it must return (module, example_inputs)")
    return result


def find_function(name: str, result: str) -> Callable[..., Any]:
    """What "package.module:function" names, looked up from the current folder first; `result` is what it returns."""
    module_name, _, function_name = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except MemoryError:
        raise
    except (Exception, SystemExit) as e:
        raise UsageError(f"cannot import {module_name} for {name!r}: {type(e).__name__}: {e}") from e
    if not callable(function := getattr(module, function_name, None)):
        raise UsageError(f"{module_name} has no function {function_name!r}; name one that returns {result}")
    return function  # type: ignore[no-any-return]


def parse_dynamic(options: list[str]) -> dict[str, dict[int, Any]]:
    """["ids:0=batch,1=seq:1..512"] -> {"ids": {0: "batch", 1: Dim("seq", min=1, max=512)}}"""
    shapes: dict[str, dict[int, Any]] = {}
    for option in options:
        found = re.fullmatch(r"(.+?):(-?\d+=.*)", option)
        axes = [AXIS.fullmatch(item) for item in re.split(r",(?=-?\d+=)", found[2])] if found else []
        if not found or not all(axis and is_size(axis[2]) for axis in axes):
            raise UsageError(
                f"--dynamic {option!r} is not NAME:AXIS=SIZE,...; write for example ids:0=batch,1=seq:1..512"
            )
        shape = shapes.setdefault(found[1], {})
        shape |= {int(axis[1]): size(option, axis[2], axis[3], axis[4]) for axis in axes if axis}
    return shapes


def is_size(text: str) -> bool:
    """Whether it looks like a name or an expression; `capture` says which expressions it takes."""
    try:
        return isinstance(ast.parse(text.strip(), mode="eval").body, ast.Name | ast.BinOp | ast.Call)
    except SyntaxError:
        return False


def size(option: str, name: str, low: str | None, high: str | None) -> Any:
    name = name.strip()
    if low is None:
        return name
    if not name.isidentifier():
        raise UsageError(f"--dynamic {option!r} bounds {name!r}, which is computed; bound the names in it instead")
    if high is not None and int(high) < int(low):
        raise UsageError(f"--dynamic {option!r} bounds {name} by {low}..{high}; write the smaller one first")
    from torch.export import Dim

    return Dim(name, min=int(low), max=int(high) if high else None)
