"""`--suite exits`: what networks with early exits keep and how long they take, on held-out inputs, beside the whole."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from graphopt.errors import PassError
from graphopt.tools.benchmarking import networks
from graphopt.tools.benchmarking.comparison import Settings
from graphopt.tools.benchmarking.exits_cases import ExitCase, ExitSubject, Feed
from graphopt.tools.benchmarking.networks import TURN, Network, Publish, Report, format_tables, run_networks
from graphopt.tools.progress import progress
from graphopt.tools.table import format_table

if TYPE_CHECKING:
    from graphopt.passes.early_exit import EarlyExit
    from graphopt.passes.early_exit.insertion import Plan
    from graphopt.program import Program
    from graphopt.runtime.session import InferenceSession

MARGIN = 1e-4  # of a confidence from its threshold, within which compiled code may take another exit


def run_exits(cases: Mapping[str, ExitCase], settings: Settings, publish: Publish) -> None:
    """`publish` is given the report after each network."""
    networks: list[Network] = [
        (
            {"name": name, "title": case.title, "seed": seed, "quality": case.quality},
            partial(measure_case, case, seed, settings),
        )
        for name, case in cases.items()
        for seed in case.seeds
    ]
    run_networks("exits", networks, settings, publish)


def measure_case(case: ExitCase, seed: int, settings: Settings) -> dict[str, Any]:
    from graphopt.contract import PassContext
    from graphopt.data.dataset import open_data
    from graphopt.data.metric import open_metric

    with progress(f"{case.title}: building"):
        subject = case.build(seed)
    context = PassContext(data=open_data(subject.data, subject.program), metric=open_metric(subject.metric), seed=seed)
    points: list[dict[str, Any]] = []
    stage: dict[str, Any] = {}
    with progress(f"{case.title}: learning exits"):
        first = pass_for(case, None)
        learned = first.learn(subject.program, places_of(subject.program, first), context)
    for target in case.targets:
        pass_ = pass_for(case, target)
        with progress(f"{case.title}: choosing thresholds"):
            plan = pass_.plan(learned, context)
        with progress(f"{case.title}: compiling and timing"):
            points.append(measure_plan(subject, plan, pass_, settings) | {"target": target})
            stage = stage or measure_stage(subject, plan, pass_, settings)
    return {"points": points, "first_stage": stage}


def pass_for(case: ExitCase, target: float | None) -> EarlyExit:
    from graphopt.passes.early_exit import EarlyExit
    from graphopt.spec_string import parse_spec

    words = [case.options] if case.options else []
    words += [] if target is None else [f"target-accuracy={target}"]
    (found,) = parse_spec(f"early-exit{{{','.join(words)}}}" if words else "early-exit")
    assert isinstance(found, EarlyExit)
    return found


def places_of(program: Program, pass_: EarlyExit) -> list[str]:
    from graphopt.passes.early_exit.places import find_places

    found = find_places(program, pass_.exits, needs_product=pass_.policy != "cosine")
    if isinstance(found, str):
        raise PassError(f"{program.name}: {found}")
    return [node.name for node in found.exits]


def with_plan(program: Program, subject: ExitSubject, plan: Plan, pass_: EarlyExit, form: Any) -> Program:
    """`program`, a capture of the same network, with the exits of the plan at the same places."""
    from graphopt.contract import PassContext
    from graphopt.passes.early_exit.forms import with_exits

    names = dict(zip(places_of(subject.program, pass_), places_of(program, pass_), strict=True))
    exits = {names[place]: plan.products[place] for place in plan.places}
    return with_exits(program, PassContext(), exits, plan.policy, form, plan.point.shares).program


def measure_plan(subject: ExitSubject, plan: Plan, pass_: EarlyExit, settings: Settings) -> dict[str, Any]:
    """Quality and cost on held-out data; times of held-out inputs, one by one and in batches, beside the whole's."""
    from graphopt.passes.early_exit.thresholds import judge

    found = judge(plan.judged, plan.costs, plan.policy.thresholds)
    nested = with_plan(subject.single, subject, plan, pass_, "cond")
    staged = with_plan(subject.program, subject, plan, pass_, "staged")
    threads = len(settings.cores)
    sessions = [session_of(item, threads) for item in (subject.single, nested, subject.program, staged)]
    feeds = [subject.one, subject.one, subject.many, subject.many]
    times = latencies(sessions, feeds, settings)
    limits = plan.judged.confidence.new_tensor(plan.policy.thresholds)
    return {
        "kept": found.quality,
        "whole": float(plan.judged.quality[:, -1].mean()),
        "cost": found.cost,
        "shares": list(found.shares),
        "thresholds": list(plan.policy.thresholds),
        "one_ms": [1e3 * value for value in times[:2]],
        "many_ms": [1e3 * value for value in times[2:]],
        "one_ratio": times[1] / times[0],
        "many_ratio": times[3] / times[2],
        "differ": differing(nested, sessions[1], subject.one) + differing(staged, sessions[3], subject.many),
        "close": int(((plan.judged.confidence - limits).abs() < MARGIN).sum()),
    }


def measure_stage(subject: ExitSubject, plan: Plan, pass_: EarlyExit, settings: Settings) -> dict[str, Any]:
    """A network that always leaves at its first exit, over what comes before that exit with its head."""
    from dataclasses import replace

    from graphopt.passes.early_exit.thresholds import Point

    first = tuple(0.0 for _ in plan.places)
    point = Point(first, 0.0, 0.0, 0.0, (1.0, *first))
    always = replace(plan, policy=replace(plan.policy, thresholds=first), point=point)
    nested = with_plan(subject.single, subject, always, pass_, "cond")
    threads = len(settings.cores)
    sessions = [session_of(item, threads) for item in (first_stage(nested), nested)]
    alone, leaving = latencies(sessions, [subject.one] * 2, settings)
    return {"alone_ms": 1e3 * alone, "leaving_ms": 1e3 * leaving, "ratio": leaving / alone}


def first_stage(nested: Program) -> Program:
    """What runs up to the first exit, with its answers and without the decision."""
    from graphopt.stages import split_stages
    from graphopt.watched import without_outputs

    first = split_stages(nested)[0]
    return without_outputs(first, first.outputs[len(nested.answers) :])


def session_of(program: Program, threads: int) -> InferenceSession:
    from graphopt.backends.tuner.store import Store
    from graphopt.compile import compile
    from graphopt.optimize import optimize

    cleaned = optimize(program, "O2", verify="structure").program
    return compile(cleaned, database=Store.empty(), threads=threads).session(threads)


def latencies(sessions: Sequence[InferenceSession], feeds: Sequence[Sequence[Feed]], settings: Settings) -> list[float]:
    """Mean seconds of one input of each, medians over turns, all of them taking turns."""
    from graphopt.race import take_turns

    def run_all(session: InferenceSession, arrays: Sequence[Mapping[str, Any]]) -> None:
        for feed in arrays:
            session.run(None, feed)

    runs = []
    for session, some in zip(sessions, feeds, strict=True):
        arrays = [{name: value.numpy() for name, value in feed.items()} for feed in some]
        runs.append(lambda session=session, arrays=arrays: run_all(session, arrays))
    times = take_turns(runs, settings.rounds, TURN)
    return [statistics.median(side) / len(some) for side, some in zip(times, feeds, strict=True)]


def differing(program: Program, session: InferenceSession, feeds: Sequence[Feed]) -> int:
    """Samples that leave somewhere else in compiled code than in PyTorch."""
    assert program.exits is not None
    count = 0
    for feed in feeds:
        session.run(None, {name: value.numpy() for name, value in feed.items()})
        wanted = program(*(feed[spec.name] for spec in program.inputs))[program.exits.answers].tolist()
        assert session.last_run is not None and session.last_run.exits is not None
        count += sum(one != other for one, other in zip(session.last_run.exits, wanted, strict=True))
    return count


def is_right(model: Report) -> bool:
    """Whether it was measured, and compiled code left where PyTorch does, but for decisions too close to call."""
    return "failed" not in model and all(point["differ"] <= point["close"] for point in model["points"])


def rows(model: Report) -> list[dict[str, Any]]:
    """One row a target."""
    return [
        {
            "seed": model["seed"],
            "target": "" if point["target"] is None else f"{point['target']:g}",
            model["quality"]: f"{point['kept']:.4f}",
            "whole": f"{point['whole']:.4f}",
            "MACs": f"{point['cost']:.1%}",
            "leave at": " ".join(f"{share:.0%}" for share in point["shares"]),
            "one: ms": f"{point['one_ms'][1]:.3f}",
            "of whole": f"{point['one_ratio']:.2f}x",
            "batch: ms": f"{point['many_ms'][1]:.3f}",
            "of whole ": f"{point['many_ratio']:.2f}x",
            "differ": f"{point['differ']} ({point['close']} close)",
        }
        for point in model["points"]
    ]


def format_model(model: Report) -> str:
    if "failed" in model:
        return f"{model['title']}, seed {model['seed']}: {model['failed']}"
    stage = model["first_stage"]
    return "\n".join(
        (
            f"{model['title']}, seed {model['seed']}",
            format_table(rows(model)),
            f"always leaving at exit 0: {stage['leaving_ms']:.3f} ms, {stage['ratio']:.2f}x of the stage before it",
        )
    )


def format_suite(report: Report) -> str:
    lines = [networks.format_suite(report)]
    for title, points in by_title(report).items():
        if len(points) > 1 and all(point["target"] is None for point in points):
            lost, one, many = (
                statistics.mean(values)
                for values in zip(
                    *((p["whole"] - p["kept"], p["one_ratio"], p["many_ratio"]) for p in points), strict=True
                )
            )
            lines.append(
                f"{title}, mean of {len(points)} seeds: {lost:+.4f} lost, {one:.2f}x one by one, {many:.2f}x in batches"
            )
    return "\n".join(lines)


def by_title(report: Report) -> dict[str, list[Report]]:
    """All points of each network, over its seeds."""
    found: dict[str, list[Report]] = {}
    for model in report["models"]:
        found.setdefault(model["title"], []).extend(model.get("points", ()))
    return found


def format_markdown(report: Report) -> str:
    return format_tables(report, rows, format_suite(report))
