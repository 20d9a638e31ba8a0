"""One architecture in its three forms, from torch and from both ONNX exporters: imported, compiled, compared."""

from __future__ import annotations

import functools
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import graphopt
from graphopt import Program
from graphopt.analysis.blocks import find_repeats
from graphopt.analysis.rotary import find_rotaries
from graphopt.capture import capture
from graphopt.contract import PassContext
from graphopt.optimize import optimize
from graphopt.passes.batch_norm_folding import NORMS, BatchNormFolding
from graphopt.spec_string import parse_spec
from tests.architectures import zoo

FORMS: dict[str, dict[str, Any] | None] = {
    "torch": None,
    "dynamo": {"dynamo": True, "opset_version": 20},
    "torchscript": {"dynamo": False, "opset_version": 17},
}
COUNTED = (
    *("linear", "layer_norm", "rms_norm", "scaled_dot_product_attention"),
    *("gelu", "silu", "hardswish", "hardsigmoid"),
)
CHANGING = "scale-folding,merge-linears,gated-attention"  # passes that fire on the model, not on what exporters leave
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
    ("gptj", "dynamo"): "its attention is written out in PyTorch, which stays so",
    ("gptj", "torchscript"): "its attention is written out in PyTorch, which stays so",
    ("mpnet", "dynamo"): "its attention is written out in PyTorch, which stays so",
    ("mpnet", "torchscript"): "its attention is written out in PyTorch, which stays so",
}
OTHER_SIZES = ((1, 5), (3, 11))  # batch and length; the examples have 2 and 8
ANY_BATCH = ("vit", "resnet")
ANY_LENGTH = ("bert", "llama")


@dataclass(frozen=True)
class Outcome:
    """error: the largest one, relative to the largest value, against PyTorch and ONNX Runtime."""

    error: float
    kernels: int
    operators: dict[str, int]


@functools.cache
def built(name: str) -> tuple[torch.nn.Module, tuple[Tensor, ...], list[Any]]:
    """The model, its inputs and what PyTorch answers."""
    module, inputs = zoo.build(name)
    return module, inputs, answers(module, inputs)


def answers(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> list[Any]:
    with torch.no_grad():
        answer = module(*inputs)
    return [value.numpy() for value in (answer if isinstance(answer, tuple) else (answer,))]


def counts(program: Program) -> dict[str, int]:
    """How often the program calls each of the operators that raising restores, and its rotary embeddings."""
    found = Counter(operator.split(".")[-2] for operator in calls(program).elements() if "." in operator)
    found["linear"] += found.pop("addmm", 0)  # of GPT-2
    listed = {name: found[name] for name in COUNTED}
    listed["rotary"] = sum(1 for path, _ in program.graphs() for _ in find_rotaries(program, path))
    return {name: count for name, count in listed.items() if count}


def calls(program: Program) -> Counter[str]:
    """How often the program calls each operator."""
    return Counter(str(node.target) for node in program.nodes() if node.op == "call_function")


def fired(program: Program) -> dict[str, int]:
    """How much passes that change a model rewrite once cleanup has gone over it, and the blocks that repeat in it.

    Exporters fold batch normalizations themselves, so those that stay are counted in the place of those that go.
    """
    clean = optimize(program, "O1", verify="off").program
    found = {step.name: len(step.run(clean, PassContext()).rewrites) for step in parse_spec(CHANGING)}
    folded = BatchNormFolding().run(clean, PassContext()).program
    found["batch norms left"] = sum(node.target in NORMS for node in folded.nodes())
    found["repeated blocks"] = sum(len(repeat.blocks) for repeat in find_repeats(clean))
    return found


@functools.lru_cache(maxsize=len(FORMS))
def taken_in(name: str, form: str) -> tuple[Program, tuple[Tensor, ...], list[list[Any]]]:
    """The program of this form, its inputs, and what PyTorch and ONNX Runtime answer."""
    module, inputs, wanted = built(name)
    options = FORMS[form]
    if options is None:
        return capture(module, inputs), inputs, [wanted]
    with tempfile.TemporaryDirectory() as folder:
        path = _exported(module, inputs, Path(folder), options)
        theirs, kept = _in_onnxruntime(path, [inputs])
        return capture(path), tuple(inputs[place] for place in kept), [wanted, theirs[0]]


def outcome(name: str, form: str) -> Outcome:
    """Run the architecture in this form, eagerly and compiled."""
    program, inputs, wanted = taken_in(name, form)
    artifact = graphopt.compile(program)
    found = _answers(program, artifact.session(), inputs)
    error = max(_worst(ours, theirs) for ours in found for theirs in wanted)
    return Outcome(error, len(artifact.manifest.variants[0].kernels), counts(program))


def error_at_other_sizes(name: str, form: str) -> float:
    """The largest error of the architecture compiled for any batch, and length, at sizes that it was not shown."""
    module, inputs, _ = built(name)
    axes = [{0: "batch", 1: "length"} if name in ANY_LENGTH else {0: "batch"} for _ in inputs]
    others = [tuple(_resized(value, *sizes) for value in inputs) for sizes in OTHER_SIZES]
    wanted = [[answers(module, values)] for values in others]
    kept = list(range(len(inputs)))
    options = FORMS[form]
    if options is None:
        names = {f"values.{place}": named for place, named in enumerate(axes)}
        program = capture(module, inputs, dynamic_shapes=names)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = _exported(module, inputs, Path(folder), options, axes)
            theirs, kept = _in_onnxruntime(path, others)
            program = capture(path)
        wanted = [[*known, more] for known, more in zip(wanted, theirs, strict=True)]
    session = graphopt.compile(program).session()
    return max(
        _worst(ours, theirs)
        for values, known in zip(others, wanted, strict=True)
        for ours in _answers(program, session, tuple(values[place] for place in kept))
        for theirs in known
    )


def _resized(value: Tensor, *sizes: int) -> Tensor:
    """Cut, or begun again, along the first axis, and along the second one of tokens."""
    for axis, size in enumerate(sizes if value.ndim == 2 else sizes[:1]):
        value = value.index_select(axis, torch.arange(size) % value.shape[axis])
    return value


def _answers(program: Program, session: Any, inputs: tuple[Tensor, ...]) -> Iterator[list[Any]]:
    """Eagerly and compiled."""
    yield [value.detach().numpy() for value in program(*inputs)]
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, inputs, strict=True)}
    yield session.run(None, feed)


def _exported(
    module: torch.nn.Module,
    inputs: tuple[Tensor, ...],
    folder: Path,
    options: dict[str, Any],
    axes: list[dict[int, str]] | None = None,
) -> str:
    names = [f"in_{place}" for place in range(len(inputs))]
    path = str(folder / "model.onnx")
    if axes is not None and options["dynamo"]:
        options = {**options, "dynamic_shapes": (tuple(axes),)}
    elif axes is not None:
        options = {**options, "dynamic_axes": dict(zip(names, axes, strict=True))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            torch.onnx.export(module, inputs, path, input_names=names, verbose=False, **options)
        finally:
            logging.disable(logging.NOTSET)
    return path


def _in_onnxruntime(path: str, feeds: list[tuple[Tensor, ...]]) -> tuple[list[list[Any]], list[int]]:
    """The answers to each of the inputs, and which of them the file has kept."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options)
    names = [value.name for value in session.get_inputs()]
    kept = [place for place in range(len(feeds[0])) if f"in_{place}" in names]
    return [session.run(None, {f"in_{place}": values[place].numpy() for place in kept}) for values in feeds], kept


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
