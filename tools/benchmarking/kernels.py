"""`--suite kernels`: each kernel as it ships, as a share of what this machine can do, beside torch's own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError
from graphopt.runtime.features import cpu_name
from graphopt.tools.benchmarking.comparison import Settings, compare
from graphopt.tools.benchmarking.kernel_cases import Case
from graphopt.tools.benchmarking.kernel_sides import kernels_of
from graphopt.tools.benchmarking.kernel_summary import summarize
from graphopt.tools.benchmarking.turns import TURN, Entrant
from graphopt.tools.progress import progress

if TYPE_CHECKING:
    from graphopt.program import Program
    from graphopt.tools.profiling.roofs import Roofs

ROUNDS = 20_000  # of the multiply-add kernel: about half a millisecond

Publish = Callable[[Mapping[str, Any]], None]


def run_kernels(cases: Sequence[Case], settings: Settings, publish: Publish) -> None:
    """`publish` is given the report after each kernel. Raises CompileError where the machine cannot be measured."""
    from graphopt.backends import roofs as kernels
    from graphopt.tools.profiling.roofs import measure_roofs

    threads = len(settings.cores)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as name:
        folder = Path(name)
        with progress("measuring the machine"):
            roofs = measure_roofs(threads)
            (folder / "roofs.so").write_bytes(kernels.build_roofs(threads))
        target = kernels.target_here(threads)
        task = {"library": str(folder / "roofs.so"), "function": kernels.MULTIPLY_ADD, "lanes": target.lanes}
        write_task(folder / "peak.json", {**task, "rounds": ROUNDS})
        operations = ROUNDS * threads * kernels.operations(target)
        report: dict[str, Any] = {
            "suite": "kernels",
            "cpu": cpu_name(),
            "cores": list(settings.cores),
            "rounds": settings.rounds,
            "turn_seconds": TURN,
            **settings.tuning.describe(),
            "roofs": asdict(roofs),
            "kernels": [],
            "summary": summarize([]),
        }
        for case in cases:
            report["kernels"].append(measure_case(case, settings, roofs, operations, folder))
            report["summary"] = summarize(report["kernels"])
            publish(report)


def write_task(path: Path, task: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(task))


def measure_case(case: Case, settings: Settings, roofs: Roofs, operations: int, folder: Path) -> dict[str, Any]:
    """One kernel's part of the report, with `failed` in place of figures where it cannot be built or run.

    `operations` are those of one call of the multiply-add kernel, whose file is in `folder`.
    """
    import graphopt

    about = {"kind": case.kind, "name": case.name, "calls": case.calls}
    try:
        with progress(f"{case.name}: compiling"):
            module, examples = case.build()
            program = graphopt.capture(module, examples, name="kernel")
            artifact, saved = str(folder / "kernel.gopt"), str(folder / "kernel.pt2")
            graphopt.compile(program, threads=len(settings.cores), **settings.tuning.options()).save(artifact)
            program.save(saved)
        nodes = case.wanted(program)
        task = folder / "kernel.json"
        write_task(task, {"artifact": artifact, "program": saved, "nodes": nodes})
        entrants = [Entrant("kernel", str(task)), Entrant("torch", str(task))]
        entrants.append(Entrant("multiply-adds", str(folder / "peak.json")))
        feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, program.examples, strict=True)}
        expected = [output.numpy() for output in program(*program.examples)]
        with progress(f"{case.name}: measuring"):
            report = compare(entrants, [], feed, expected, settings)
        return {**about, **judge(report, artifact, nodes, weight_bytes(program), roofs, operations)}
    except GraphoptError as e:
        return {**about, "failed": " ".join(str(e).split())}


def weight_bytes(program: Program) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in program.graph_module.state_dict().values())


def judge(
    report: Mapping[str, Any], artifact: str, nodes: Sequence[str], weights: int, roofs: Roofs, operations: int
) -> dict[str, Any]:
    """Seconds, work and share of the nearer roof of one operator; `peak` is what the multiply-adds reached meanwhile.

    Raises GraphoptError without torch or the peak.
    """
    from graphopt.runtime.session import InferenceSession
    from graphopt.tools.profiling.shares import Work, nearest_roof

    if report["failures"]:
        raise GraphoptError(report["failures"][0]["reason"])
    ours, torch, peak = report["rows"]
    kernels = InferenceSession(artifact).variant.kernels
    names = kernels_of(kernels, set(nodes))
    calls = ours["about"]["calls"]
    works = {name: Work.of(kernels[name], {}) for name in calls}
    flops, moved, packed = (
        round(sum(calls[name] * (getattr(work, what) or 0) for name, work in works.items()))
        for what in ("flops", "bytes", "weight_bytes")
    )
    reached = replace(roofs, flops_per_second=operations / peak["fastest"])
    found = nearest_roof(Work(flops, moved, packed), ours["median"], reached, weights)
    return {
        "seconds": ours["median"],
        "torch_seconds": torch["median"],
        "ratio": torch["median"] / ours["median"],
        "flops": flops,
        "bytes": moved,
        "peak": reached.flops_per_second,
        "roof": found[0] if found else None,
        "share_of_roof": found[1] if found else None,
        "share_of_peak": flops / ours["median"] / reached.flops_per_second,
        "error": ours["error"],
        "valid": all(row["valid"] for row in report["rows"]),
        "rules": sorted({kernels[name].rule for name in names}),
        "configuration": {name: dict(kernels[name].configuration) for name in names},
        "rows": report["rows"],
        "interference": report["interference"],
    }
