"""`--suite int8`: models that ONNX Runtime quantized, the same file on every side, beside our own float32.

What two runtimes make of such a file is never the same: they add up float32 products in another order, a number close
to a half rounds to another code, and through the layers that follow one code becomes many. How far that alone goes is
measured too, as the distance of the file run by PyTorch in float32. Distances are from ONNX Runtime with graph
optimizations off.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.tools.benchmarking.comparison import Settings, compare, compile_to, save_compiled
from graphopt.tools.benchmarking.int8_inputs import CALIBRATING, Feed, draw_inputs, write_qdq
from graphopt.tools.benchmarking.int8_summary import FLOAT, UNFUSED
from graphopt.tools.benchmarking.models import MINILM, MODELS, SuiteModel
from graphopt.tools.benchmarking.networks import Network, Publish, run_networks
from graphopt.tools.benchmarking.peers import PEERS
from graphopt.tools.benchmarking.summary import judge, summarize
from graphopt.tools.benchmarking.turns import TURN, Entrant
from graphopt.tools.progress import progress

if TYPE_CHECKING:
    from graphopt.program import Program

NAMES = ("resnet50", "mobilenetv2", "minilm", "vit-s")
PASSES = "O2,qdq-fusion"
AGREEING = 200  # inputs that the distances are measured on
_CALIBRATION, _HELD_OUT = 0, 1  # seeds

Array = np.ndarray[Any, Any]
Run = Callable[[Feed], Array]


def run_int8(names: Sequence[str], peers: list[str], settings: Settings, publish: Publish) -> None:
    """`publish` is given the report after each model."""
    networks: list[Network] = [
        (
            {"name": name, "title": MODELS[name].title, "configuration": MODELS[name].describe(), "counts": True},
            partial(measure_model, name, MODELS[name], peers, settings),
        )
        for name in names
    ]

    def whole(report: Any) -> None:
        about = {"dtype": "int8", "turn_seconds": TURN, "peers": [*peers, FLOAT], **settings.tuning.describe()}
        publish({**report, **about, "summary": summarize(report["models"])})

    run_networks("int8", networks, settings, whole)


def measure_model(name: str, model: SuiteModel, peers: list[str], settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        return measure_built(name, model, peers, settings, Path(folder))


@dataclass(frozen=True)
class Fused:
    """The quantized file as our side runs it: the program before and after, and what is left of conversions."""

    imported: Program
    program: Program
    left: dict[str, int]
    fallbacks: dict[str, int]
    notes: tuple[str, ...]


def measure_built(name: str, model: SuiteModel, peers: list[str], settings: Settings, folder: Path) -> dict[str, Any]:
    import graphopt

    with progress(f"{model.title}: capturing"):
        module, examples = model.build()
        program = graphopt.capture(module, examples, name=name)
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, program.examples, strict=True)}
    with progress(f"{model.title}: quantizing"):
        path = write_qdq(program, list(draw_inputs(model, program, CALIBRATING, _CALIBRATION)), folder)
    with progress(f"{model.title}: compiling"):
        begin = time.perf_counter()
        fused = fuse(path, tuple(program.examples), settings)
        artifact = save_compiled(fused.program, str(folder / "int8.gopt"), settings)
        seconds = time.perf_counter() - begin
        floating = compile_to(program, folder, settings)
    reference = run_onnxruntime(path, settings, optimized=False)
    ours = [Entrant("graphopt", artifact), Entrant("graphopt", floating, name=FLOAT)]
    others = [Entrant(peer, path, PEERS[peer].sparing, peer) for peer in peers]
    with progress(f"{model.title}: measuring"):
        expected = [reference(feed)]
        report = compare([ours[0], *others, ours[1]], [], feed, expected, replace(settings, dtype="int8"))
    report["reference"] = "ONNX Runtime without graph optimizations"
    with progress(f"{model.title}: comparing results"):
        sides = {
            "graphopt": run_artifact(artifact, len(settings.cores)),
            UNFUSED: run_program(fused.imported),
            "onnxruntime": run_onnxruntime(path, settings, optimized=True),
        }
        inputs = islice(draw_inputs(model, program, AGREEING, _HELD_OUT), AGREEING)
        agreement = agree(reference, sides, list(inputs), nearest=model.architecture == MINILM)
    rows = [row for row in report["rows"] if row["side"] != FLOAT]
    float_row = next((row for row in report["rows"] if row["side"] == FLOAT), None)
    return {
        **report,
        **judge({**report, "rows": rows}),
        "over_float": None if float_row is None else float_row["median"] / rows[0]["median"],
        "compile_seconds": seconds,
        "conversions": fused.left,
        "fallbacks": fused.fallbacks,
        "notes": list(fused.notes),
        "agreement": agreement,
        "agreement_inputs": AGREEING,
    }


def fuse(path: str, examples: tuple[Any, ...], settings: Settings) -> Fused:
    import graphopt

    imported = graphopt.capture(path, examples)
    options = settings.tuning.options()
    result = graphopt.optimize(imported, PASSES, database=options["database"])
    last = result.report.passes[-1]
    reasons = {
        kind: dict(Counter(item.reason for item in last.declined if item.rule == f"{last.name}/{kind}"))
        for kind in ("conversion", "fallback")
    }
    return Fused(imported, result.program, reasons["conversion"], reasons["fallback"], tuple(last.notes))


# Results --------------------------------------------------------------------------------------------------------------
def run_onnxruntime(path: str, settings: Settings, *, optimized: bool) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(settings.cores)
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run(None, feed)[0]


def run_artifact(path: str, threads: int) -> Run:
    from graphopt.runtime.session import InferenceSession

    session = InferenceSession(path, threads=threads)
    return lambda feed: session.run(None, feed)[0]


def run_program(program: Program) -> Run:
    import torch

    names = [spec.name for spec in program.inputs]
    return lambda feed: program(*(torch.from_numpy(feed[name]) for name in names))[0].numpy()


def agree(reference: Run, sides: dict[str, Run], inputs: Sequence[Feed], *, nearest: bool) -> dict[str, Any]:
    """For each side the least and the mean cosine to the reference, and how often the first choice is the same.

    The first choice is the largest number of the last axis; with `nearest`, the most similar of the other inputs.
    """
    wanted = [reference(feed).astype(np.float64) for feed in inputs]
    found = {}
    for side, run in sides.items():
        given = [run(feed).astype(np.float64) for feed in inputs]
        cosines = [cosine(a, b) for a, b in zip(wanted, given, strict=True)]
        first = [choices(outputs, nearest) for outputs in (wanted, given)]
        found[side] = {
            "least_cosine": min(cosines),
            "mean_cosine": float(np.mean(cosines)),
            "same_first": float(np.mean(first[0] == first[1])),
        }
    return found


def cosine(a: Array, b: Array) -> float:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / lengths if lengths else float(not a.any() and not b.any())


def choices(outputs: Sequence[Array], nearest: bool) -> Array:
    if not nearest:
        return np.stack([output.argmax(-1) for output in outputs])
    rows = np.stack([output.ravel() / (np.linalg.norm(output) or 1.0) for output in outputs])
    similar = rows @ rows.T
    np.fill_diagonal(similar, -np.inf)
    return np.asarray(similar.argmax(-1))
