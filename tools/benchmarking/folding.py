"""`--suite folding`: how good and how fast networks are with fewer and fewer of their blocks, each point measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from graphopt.errors import PassError
from graphopt.tools.benchmarking.comparison import Settings
from graphopt.tools.benchmarking.folding_cases import FoldingCase, Subject
from graphopt.tools.benchmarking.networks import (
    TURN,
    Network,
    Publish,
    Report,
    format_suite,
    format_tables,
    run_networks,
)
from graphopt.tools.progress import progress
from graphopt.tools.table import format_table

if TYPE_CHECKING:
    from graphopt.data.dataset import View
    from graphopt.passes.block_folding import BlockFolding
    from graphopt.program import Program

STRAIGHT = 0.05  # how far a point may be from the line, over the line


def run_folding(cases: Mapping[str, FoldingCase], settings: Settings, publish: Publish) -> None:
    """`publish` is given the report after each network."""
    networks: list[Network] = [
        ({"name": name, "title": case.title}, partial(measure_case, case, settings)) for name, case in cases.items()
    ]
    run_networks("folding", networks, settings, publish)


def measure_case(case: FoldingCase, settings: Settings) -> dict[str, Any]:
    from graphopt.contract import PassContext
    from graphopt.data.dataset import open_data
    from graphopt.data.metric import open_metric
    from graphopt.passes.block_folding.blocks import find_blocks

    with progress(f"{case.title}: building"):
        subject = case.build()
    data = open_data(subject.data, subject.program)
    context = PassContext(data=data, metric=open_metric(subject.metric))
    folding = pass_with_options(case)
    found = find_blocks(subject.program, "auto")
    if isinstance(found, str):
        raise PassError(f"{case.title}: {found}")
    total = len(found.blocks)
    with progress(f"{case.title}: ranking blocks"):
        notes: list[str] = []
        order = folding.choose(subject.program, found, context, notes)
    points = [point(subject, total, "whole", subject.program, data.held_out, 0.0)]
    programs = [subject.program]
    for count in range(1, len(order) + 1):
        with progress(f"{case.title}: healing without {count} blocks"):
            began = time.perf_counter()
            folded, healed = folding.fold(subject.program, context, order[:count])
            seconds = time.perf_counter() - began
        programs.append(folded.program)
        points.append(point(subject, total - count, "as folded", folded.program, data.held_out, 0.0))
        if healed is not None:
            points.append(point(subject, total - count, "healed", healed.program, data.held_out, seconds))
    with progress(f"{case.title}: compiling and timing"):
        times = latencies(programs, subject.timed, settings)
    kept = [total - count for count in range(len(programs))]
    line, deviation = straight_line(kept, times)
    timed = [
        {"kept": number, "milliseconds": 1e3 * value, "from_line": value / (line[0] + line[1] * number) - 1}
        for number, value in zip(kept, times, strict=True)
    ]
    return {
        "about": f"{subject.about}; {notes[0]}; blocks go in the order {', '.join(map(str, order))}",
        "heal_steps": case.heal_steps,
        "points": points,
        "latency": timed,
        "line": {"fixed_ms": 1e3 * line[0], "ms_a_block": 1e3 * line[1], "deviation": deviation},
    }


def pass_with_options(case: FoldingCase) -> BlockFolding:
    from graphopt.passes.block_folding import BlockFolding
    from graphopt.spec_string import parse_spec

    options = f"remove={case.most},heal-steps={case.heal_steps}{',' if case.options else ''}{case.options}"
    (found,) = parse_spec(f"block-folding{{{options}}}")
    assert isinstance(found, BlockFolding)
    return found


def point(
    subject: Subject, kept: int, variant: str, program: Program, held_out: View, seconds: float
) -> dict[str, Any]:
    """`seconds` is what healing took."""
    figures = dict(subject.figures(program, held_out))
    return {"kept": kept, "variant": variant, "figures": figures, "seconds": seconds}


def latencies(programs: Sequence[Program], inputs: Sequence[Any], settings: Settings) -> list[float]:
    """Median seconds of one run of each, compiled at O2, all of them taking turns."""
    from graphopt.backends.tuner.store import Store
    from graphopt.compile import compile
    from graphopt.optimize import optimize
    from graphopt.race import take_turns

    threads = len(settings.cores)
    runs = []
    for program in programs:
        cleaned = optimize(program, "O2", verify="structure").program
        session = compile(cleaned, database=Store.empty(), threads=threads).session(threads)
        feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, inputs, strict=True)}
        runs.append(lambda session=session, feed=feed: session.run(None, feed))
    return [statistics.median(times) for times in take_turns(runs, settings.rounds, TURN)]


def straight_line(kept: Sequence[int], times: Sequence[float]) -> tuple[tuple[float, float], float]:
    """(constant, slope) of least squares, and the largest distance of a point from it, over the line there."""
    slope, constant = statistics.linear_regression(kept, times)
    return (constant, slope), max(
        abs(time_ / (constant + slope * number) - 1) for number, time_ in zip(kept, times, strict=True)
    )


def recovered(model: Report) -> dict[int, float]:
    """By blocks kept, the share of the first figure's loss that healing took back."""
    figure = next(iter(model["points"][0]["figures"]))
    by_place = {(point["kept"], point["variant"]): point["figures"][figure] for point in model["points"]}
    whole = model["points"][0]["figures"][figure]
    shares = {}
    for (kept, variant), value in by_place.items():
        if variant == "healed" and (lost := whole - by_place[kept, "as folded"]) > 0:
            shares[kept] = (value - by_place[kept, "as folded"]) / lost
    return shares


def is_right(model: Report) -> bool:
    """Whether it was measured, and latency falls on a straight line."""
    return "failed" not in model and bool(model["line"]["deviation"] <= STRAIGHT)


def format_model(model: Report) -> str:
    if "failed" in model:
        return f"{model['title']}: {model['failed']}"
    line = model["line"]
    return "\n".join(
        (
            f"{model['title']}: {model['about']}; healed for {model['heal_steps']} steps",
            format_table(rows(model)),
            f"latency {line['fixed_ms']:.3f} ms + {line['ms_a_block']:.3f} ms a block, "
            f"all points within {line['deviation']:.1%} of it",
        )
    )


def rows(model: Report) -> list[dict[str, Any]]:
    """One row a point; a time belongs to a number of blocks, whatever the weights."""
    latency = {item["kept"]: item for item in model["latency"]}
    shares = recovered(model)
    found = []
    for point in model["points"]:
        first = point["variant"] != "healed"
        timed = latency[point["kept"]]
        share = None if first else shares.get(point["kept"])
        found.append(
            {
                "blocks": point["kept"],
                "": point["variant"],
                **{name: f"{value:.4f}" for name, value in point["figures"].items()},
                "recovered": "" if share is None else f"{share:.0%}",
                "ms": f"{timed['milliseconds']:.3f}" if first else "",
                "from line": f"{timed['from_line']:+.1%}" if first else "",
                "healing s": f"{point['seconds']:.0f}" if not first else "",
            }
        )
    return found


def format_markdown(report: Report) -> str:
    return format_tables(report, rows, format_suite(report))
