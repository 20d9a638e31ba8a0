"""Run passes over a program, in order, each one checked before the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graphopt.contract import Pass, PassContext
from graphopt.data.dataset import open_data
from graphopt.data.metric import open_metric
from graphopt.database import Database, open_store
from graphopt.errors import UsageError
from graphopt.levels import spelled_passes
from graphopt.pipeline import Pipeline
from graphopt.program import Program
from graphopt.progress import tell
from graphopt.race import measure_on, race_on
from graphopt.recipes.recipe import is_recipe, read_recipe
from graphopt.registry import check_target
from graphopt.report import Report

Verify = Literal["off", "structure", "numeric"]
VERIFY = ("off", "structure", "numeric")


@dataclass(frozen=True)
class OptimizeResult:
    """The optimized program and the account of how it came about."""

    program: Program
    report: Report


def optimize(
    program: Program,
    passes: str | Sequence[Pass],
    *,
    data: Any = None,
    metric: Any = None,
    verify: Verify = "numeric",
    keep_if_faster: bool = False,
    target: str = "cpu",
    database: Database = None,
    threads: int | None = None,
    seed: int = 0,
    strict: bool = False,
) -> OptimizeResult:
    """Run `passes` ("a{x=1},b", a list of passes, "O0".."O3" or "recipe.yaml") over `program`, which stays as it is.

    A recipe also has settings, for the arguments that are left at their defaults; the name of a shipped one will do.

    `verify` checks after every pass: "structure" that the program is well-formed, "numeric" also that an exact pass
    stays within 4 times the error against float64 that there was before it, plus 1e-6 relative: each rewrite on its
    own, then the whole program. Wrong rewrites, and only they, are taken back and reported; with `strict` they are an
    error. With `keep_if_faster` those are taken back, too, with which the model is not measured to be faster on
    `target` with so many `threads`. What is measured, by it and by passes that measure, has the kernels that `database`
    knows to be best, as in `compile`.

    `data` (see `open_data`) is what passes learn from, but for its last fifth, on which `metric` (see `open_metric`) is
    measured before and after; its first sample is checked on as well. Passes that preserve approximately need both.
    `seed` is for them and for the inputs that are drawn.

    Raises UsageError for unusable arguments, PassError and its kinds where a pass fails, VerificationError where a
    result is wrong and leaving out rewrites does not make it right.
    """
    if isinstance(passes, str) and is_recipe(passes):
        recipe = read_recipe(passes)
        given = {"metric": metric, "verify": verify, "keep_if_faster": keep_if_faster}
        given |= {"target": target, "seed": seed, "strict": strict}
        settings = recipe.settings_beside(given, optimize.__kwdefaults__ or {})
        items = [step.item for step in recipe.passes]
        return optimize(program, items, data=data, database=database, threads=threads, **settings)
    open_store(database)
    if threads is not None and not keep_if_faster:
        raise UsageError(f"threads={threads!r} has no effect where nothing is measured; leave it out")
    chosen = choose_passes(passes)
    _check_arguments(program, chosen, verify, data, metric)
    if strict and verify != "numeric":
        raise UsageError(f"strict has no effect with verify={verify!r}, which takes nothing back; leave it out")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UsageError(f"seed={seed!r} is none; give an integer from 0 to 2**63 - 1")
    target = check_target(target)
    pipeline = Pipeline(
        passes=chosen,
        context=PassContext(
            target=target,
            data=None if data is None else open_data(data, program),
            metric=None if metric is None else open_metric(metric),
            seed=seed,
            progress=tell,
            measure=measure_on(target, threads, database),
        ),
        verify=verify,
        strict=strict,
        race=race_on(target, threads, database) if keep_if_faster else None,
    )
    return OptimizeResult(*pipeline.run(program))


def choose_passes(passes: str | Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes that this argument of `optimize` means. Raises UsageError and UnknownNameError."""
    if not isinstance(passes, Sequence):
        raise UsageError(f"passes is {passes!r}; give a list of passes, or text such as 'O2' or 'dead-code'")
    if not isinstance(passes, str):
        for item in passes:
            if not isinstance(item, Pass):
                raise UsageError(f"passes holds {item!r}, which is no Pass; give instances, such as DeadCode()")
        return tuple(passes)
    if is_recipe(passes):
        raise UsageError(f"{passes} is a recipe, not passes; write --recipe {passes}")
    return spelled_passes(passes)


def _check_arguments(program: Program, passes: tuple[Pass, ...], verify: str, data: Any, metric: Any) -> None:
    if not isinstance(program, Program):
        raise UsageError(f"optimize takes a Program, got {type(program).__name__}; make one with graphopt.capture")
    if verify not in VERIFY:
        raise UsageError(f"verify={verify!r} is none of {', '.join(VERIFY)}")
    learning = [item.name for item in passes if item.preserves == "approximate"]
    if learning and (data is None or metric is None):
        raise UsageError(f"{learning[0]} changes results and needs both data and metric to say by how much; give both")
    if metric is not None and data is None:
        raise UsageError("metric is measured on data; give data too")
    calibrated = any(item.preserves == "quantized" for item in passes)
    if data is not None and metric is None and not learning and not calibrated and verify != "numeric":
        raise UsageError(f"data has no effect without a metric and with verify={verify!r}; leave it out")
    if verify == "numeric" and passes and len(program.examples) != len(program.inputs):
        raise UsageError(
            f"{program.name} has no example inputs to check on; capture it with some or use verify='structure'"
        )
