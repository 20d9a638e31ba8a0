"""MODEL on the command line: a .pt2, an .onnx, or package.module:function returning (module, example inputs)."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from graphopt.errors import CaptureError, UsageError

if TYPE_CHECKING:
    from graphopt.program import Program

HELP = "a .pt2 or .onnx file, or package.module:function returning (module, example_inputs)"
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
AXIS = re.compile(r"(\d+)=([A-Za-z_]\w*)(?::(\d+)\.\.(\d+)?)?")
ARTIFACT = ".gopt"


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=HELP)
    add_dynamic_option(parser)


def add_dynamic_option(parser: argparse.ArgumentParser) -> None:
    help = "sizes that may change, such as ids:0=batch,1=seq or, with bounds, ids:1=seq:1..512; one for each input"
    parser.add_argument("--dynamic", metavar="NAME:AXIS=SIZE,...", nargs="+", action="extend", default=[], help=help)


def load_model(arguments: argparse.Namespace) -> Program:
    """Capture `arguments.model`; raises UsageError or CaptureError when that is not possible."""
    return capture_model(arguments.model, arguments.dynamic)


def capture_model(model: str, dynamic: list[str]) -> Program:
    if is_artifact(model):
        raise UsageError(f"{model} is compiled already; give the model it was made from ({HELP})")
    is_file = model.endswith((".pt2", ".onnx"))
    if not is_file and not FUNCTION.fullmatch(model):
        raise UsageError(f"{model!r} is not a model; give {HELP}")
    if is_file and not os.path.isfile(model):
        raise UsageError(f"{model} does not exist; give {HELP}")
    from graphopt import capture

    source, examples = (model, None) if is_file else call_function(model)
    return capture(source, examples, dynamic_shapes=parse_dynamic(dynamic) or None)


def is_artifact(path: str) -> bool:
    return path.endswith((ARTIFACT, ARTIFACT + "/")) or os.path.isfile(os.path.join(path, "manifest.json"))


def call_function(model: str) -> tuple[Any, Any]:
    """(module, example inputs) of "package.module:function", looked up from the current folder first."""
    module_name, _, name = model.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as e:
        raise UsageError(f"cannot import {module_name} for {model!r}: {type(e).__name__}: {e}") from e
    if not callable(function := getattr(module, name, None)):
        raise UsageError(f"{module_name} has no function {name!r}; name one that returns (module, example_inputs)")
    try:
        result = function()
    except Exception as e:
        raise CaptureError(f"{model} failed: {type(e).__name__}: {e}; run it alone to see where") from e
    if not isinstance(result, tuple) or len(result) != 2:
        raise CaptureError(f"{model} returned {type(result).__name__}; it must return (module, example_inputs)")
    return result


def parse_dynamic(options: list[str]) -> dict[str, dict[int, Any]]:
    """["ids:0=batch,1=seq:1..512"] -> {"ids": {0: "batch", 1: Dim("seq", min=1, max=512)}}"""
    shapes: dict[str, dict[int, Any]] = {}
    for option in options:
        found = re.fullmatch(r"(.+?):(\d+=.*)", option)
        axes = [AXIS.fullmatch(item) for item in found[2].split(",")] if found else []
        if not found or not all(axes):
            raise UsageError(
                f"--dynamic {option!r} is not NAME:AXIS=SIZE,...; write for example ids:0=batch,1=seq:1..512"
            )
        shapes[found[1]] = {int(axis[1]): size(axis[2], axis[3], axis[4]) for axis in axes if axis}
    return shapes


def size(name: str, low: str | None, high: str | None) -> Any:
    if low is None:
        return name
    from torch.export import Dim

    return Dim(name, min=int(low), max=int(high) if high else None)
