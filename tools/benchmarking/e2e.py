"""`--suite e2e`: each model of the suite beside every peer, and what all of it comes to."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError
from graphopt.runtime.features import cpu_name
from graphopt.tools.benchmarking.comparison import Settings, compare, compile_to
from graphopt.tools.benchmarking.models import MODELS, SuiteModel
from graphopt.tools.benchmarking.peers import peer_entrants
from graphopt.tools.benchmarking.summary import judge, summarize
from graphopt.tools.benchmarking.turns import TURN, Entrant
from graphopt.tools.progress import progress

if TYPE_CHECKING:
    from graphopt.tools.profiling.roofs import RoofMeter

PROFILE_ROUNDS = 10

Publish = Callable[[Mapping[str, Any]], None]


def run_models(names: Sequence[str], peers: list[str], settings: Settings, publish: Publish) -> None:
    """`publish` is given the report after each model."""
    report: dict[str, Any] = {
        "suite": "e2e",
        "cpu": cpu_name(),
        "cores": list(settings.cores),
        "dtype": settings.dtype,
        "rounds": settings.rounds,
        "turn_seconds": TURN,
        "transformers": version("transformers"),
        "peers": peers,
        **settings.tuning.describe(),
        "models": [],
        "summary": summarize([]),
    }
    meter = find_meter(len(settings.cores))
    for name in names:
        report["models"].append(measure_model(name, MODELS[name], peers, settings, meter))
        report["summary"] = summarize(report["models"])
        publish(report)


def measure_model(
    name: str, model: SuiteModel, peers: list[str], settings: Settings, meter: RoofMeter | None
) -> dict[str, Any]:
    """One model's part of the report; with `failed` in place of figures where it cannot be captured or compiled."""
    about = {"name": name, "title": model.title, "configuration": model.describe(), "counts": model.counts}
    try:
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            return {**about, **measure_built(name, model, peers, settings, meter, Path(folder))}
    except GraphoptError as e:
        return {**about, "failed": " ".join(str(e).split())}


def measure_built(
    name: str, model: SuiteModel, peers: list[str], settings: Settings, meter: RoofMeter | None, folder: Path
) -> dict[str, Any]:
    import graphopt

    with progress(f"{model.title}: capturing"):
        module, examples = model.build()
        program = graphopt.capture(module, examples, name=name)
        expected = [output.numpy() for output in program(*program.examples)]
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, program.examples, strict=True)}
    begin = time.perf_counter()
    with progress(f"{model.title}: compiling"):
        artifact = compile_to(program, folder, settings)
    compile_seconds = time.perf_counter() - begin
    with progress(f"{model.title}: exporting for the others"):
        entrants, failures = peer_entrants(program, peers, folder, settings.dtype)
    with progress(f"{model.title}: measuring"):
        report = compare([Entrant("graphopt", artifact), *entrants], failures, feed, expected, settings)
    with progress(f"{model.title}: measuring the kernels"):
        slow = slow_kernels(artifact, feed, len(settings.cores), meter)
    return {**report, **judge(report), "compile_seconds": compile_seconds, **slow}


def find_meter(threads: int) -> RoofMeter | None:
    from graphopt.tools.profile_artifact import find_meter

    return find_meter(threads)[0]


def slow_kernels(artifact: str, feed: dict[str, Any], threads: int, meter: RoofMeter | None) -> dict[str, Any]:
    """As `graphopt profile` counts them."""
    from graphopt.runtime.session import InferenceSession
    from graphopt.tools.profiling.measuring import measure

    profile, _ = measure(InferenceSession(artifact, threads=threads), feed, "main", PROFILE_ROUNDS, meter)
    slow = [{"kernel": row.kernel, "share": row.share, "reason": row.slow} for row in profile.slow]
    return {"kernels": len(profile.rows), "slow_kernels": slow}
