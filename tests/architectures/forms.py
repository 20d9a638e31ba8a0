"""One architecture in its three forms, from torch and from both ONNX exporters: imported, compiled, compared."""

from __future__ import annotations

import functools
import logging
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import graphopt
from graphopt import Program
from graphopt.capture import capture
from tests.architectures import zoo

FORMS: dict[str, dict[str, Any] | None] = {
    "torch": None,
    "dynamo": {"dynamo": True, "opset_version": 20},
    "torchscript": {"dynamo": False, "opset_version": 17},
}
COUNTED = ("linear", "layer_norm", "rms_norm", "scaled_dot_product_attention", "gelu", "silu")
TOLERANCE = 1e-4  # of the largest value

CANNOT: dict[tuple[str, str], str] = {
    ("mamba2", "torchscript"): "ONNX Runtime refuses the file: a Transpose of an axis -2",
    ("whisper", "torchscript"): "torch's exporter has no form for diff",
    ("t5", "dynamo"): "torch's exporter cannot decompose it",
    ("beit", "dynamo"): "torch's exporter cannot decompose it",
    ("swin", "dynamo"): "torch's exporter cannot decompose it",
}

COUNTS_DIFFER: dict[tuple[str, str], str] = {
    ("deberta_v2", "dynamo"): "the exporter computes the projections of its constant positions",
    ("falcon", "dynamo"): "its layers are x @ weight.T in PyTorch, which stays a matrix product",
    ("falcon", "torchscript"): "its layers are x @ weight.T in PyTorch, which stays a matrix product",
}


@dataclass(frozen=True)
class Outcome:
    """error: the largest one, relative to the largest value, against PyTorch and ONNX Runtime."""

    error: float
    kernels: int
    operators: dict[str, int]


@functools.cache
def built(name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], list[Any]]:
    """The model, its inputs and what PyTorch answers."""
    module, inputs = zoo.build(name)
    with torch.no_grad():
        answer = module(*inputs)
    answers = answer if isinstance(answer, tuple) else (answer,)
    return module, inputs, [value.numpy() for value in answers]


def counts(program: Program) -> dict[str, int]:
    """How often the program calls each of the operators that raising restores."""
    calls = [node for node in program.nodes() if node.op == "call_function"]
    found = Counter(str(node.target).split(".")[-2] for node in calls if "." in str(node.target))
    found["linear"] += found.pop("addmm", 0)  # of GPT-2
    return {name: found[name] for name in COUNTED if found[name]}


def outcome(name: str, form: str) -> Outcome:
    """Run the architecture in this form, eagerly and compiled."""
    module, inputs, wanted = built(name)
    options = FORMS[form]
    errors = []
    if options is None:
        program = capture(module, inputs)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = _exported(module, inputs, Path(folder), options)
            theirs, names = _in_onnxruntime(path, inputs)
            errors.append(_worst(theirs, wanted))
            program = capture(path)
        inputs = tuple(value for place, value in enumerate(inputs) if f"in_{place}" in names)
    eager = [value.detach().numpy() for value in program(*inputs)]
    artifact = graphopt.compile(program)
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, inputs, strict=True)}
    results = artifact.session().run(None, feed)
    errors += [_worst(eager, wanted), _worst(results, wanted)]
    return Outcome(max(errors), len(artifact.manifest.variants[0].kernels), counts(program))


def _exported(module: torch.nn.Module, inputs: Any, folder: Path, options: dict[str, Any]) -> str:
    names = [f"in_{place}" for place in range(len(inputs))]
    path = str(folder / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            torch.onnx.export(module, inputs, path, input_names=names, verbose=False, **options)
        finally:
            logging.disable(logging.NOTSET)
    return path


def _in_onnxruntime(path: str, inputs: tuple[torch.Tensor, ...]) -> tuple[list[Any], list[str]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options)
    names = [value.name for value in session.get_inputs()]
    feed = {f"in_{place}": value.numpy() for place, value in enumerate(inputs) if f"in_{place}" in names}
    return session.run(None, feed), names


def _worst(found: list[Any], wanted: list[Any]) -> float:
    """The largest difference over the largest value; infinite where shapes, types or what is no number differ."""
    worst = 0.0
    for ours, theirs in zip(found, wanted, strict=True):
        finite = np.isfinite(theirs)
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype or not np.array_equal(np.isfinite(ours), finite):
            return float("inf")
        gap, largest = (float(np.abs(value[finite]).max(initial=0.0)) for value in (ours - theirs, theirs))
        worst = max(worst, gap / max(largest, 1e-30))
    return worst
