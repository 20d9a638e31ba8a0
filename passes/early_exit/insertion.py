"""Let a network answer as soon as it is sure: heads at earlier values, a policy, and forms that skip the rest.

Before: y = head(block3(block2(block1(x))))
After:  h1 = block1(x);  y1 = head1(h1)
        y = y1 where confidence(y1) >= threshold, else head(block3(block2(h1)))

Heads share all weights of the network's own head but those of its last product, of which each trains a copy on labels,
or on the network's own logits where there are no labels; the network itself stays as it is. Thresholds are chosen on a
fifth of the data that was never fitted on, and which is not that held out. Without a threshold or a target they cost as
few multiply-accumulates as keep the accuracy within half a point of the whole network's; of embeddings, the mean cosine
at 0.98. The curve of quality by cost is of the held-out data; `chart` also measures one run
of the network without and with exits.

`form=auto` is `staged` where the number of samples may change, and `cond` where it is fixed. Exits that are not named
are those, up to three, by which the curve rises most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from graphopt.contract import Declined, Pass, PassContext, PassResult
from graphopt.errors import UsageError
from graphopt.passes.early_exit import thresholds as selection
from graphopt.passes.early_exit.account import account, latency, trade_offs
from graphopt.passes.early_exit.decisions import Policy
from graphopt.passes.early_exit.forms import Form, with_exits
from graphopt.passes.early_exit.gate import learn_gates
from graphopt.passes.early_exit.heads import Product
from graphopt.passes.early_exit.learning import ALIKE, Learned, learn
from graphopt.passes.early_exit.places import find_places
from graphopt.passes.early_exit.thresholds import Outcomes, Point
from graphopt.program import Program

LOSS = 0.005  # of accuracy, where neither a threshold nor a target is given
MOST_EXITS = 3
LEAST_GAIN = 0.001  # of the area under the curve of quality by cost, for which one more exit is worth its kernels
POINTS = 200  # of that curve


@dataclass(frozen=True)
class Plan:
    """Exits as they are to be: `places` are nodes, `products` what their heads have of their own, by node.

    `point` is what the policy's thresholds came to where they were chosen; outcomes are of the samples that they were
    chosen by and of those held out; `costs` [exits + 1] are shares of the network's multiply-accumulates.
    """

    places: tuple[str, ...]
    products: Mapping[str, Product]
    policy: Policy
    point: Point
    costs: tuple[float, ...]
    choosing: Outcomes
    judged: Outcomes
    notes: tuple[str, ...]


@dataclass(frozen=True)
class EarlyExit(Pass):
    """Let a network answer as soon as it is sure, and skip the rest."""

    name = "early-exit"
    preserves = "approximate"
    measured = False
    exits: Literal["auto"] | tuple[int, ...] | tuple[str, ...] = "auto"
    policy: Literal["pmax", "entropy", "margin", "gate", "cosine"] = "pmax"
    threshold: Literal["auto"] | float | tuple[float, ...] = "auto"
    target_accuracy: float | None = None
    target_cost: float | None = None
    shares: tuple[float, ...] | None = None
    form: Literal["auto", "cond", "staged", "multi-output"] = "auto"
    fit_steps: int = 200
    chart: bool = False

    def __post_init__(self) -> None:
        given = [self.threshold != "auto", self.target_accuracy is not None, self.target_cost is not None]
        if sum([*given, self.shares is not None]) > 1:
            raise UsageError("threshold, target-accuracy, target-cost and shares exclude each other; give one of them")
        if self.exits == ():
            raise UsageError("exits=[] makes none; give exits=auto, numbers of blocks or names of nodes")
        for name in ("target_accuracy", "target_cost"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UsageError(f"{name.replace('_', '-')}={value} must be over 0 and at most 1")
        if self.shares is not None and (min(self.shares, default=0) < 0 or sum(self.shares) > 1):
            raise UsageError(f"shares={list(self.shares)} must be 0 or more and add up to at most 1, the rest goes on")
        if self.policy == "gate" and not self.fit_steps:
            raise UsageError("policy=gate learns its gates, but fit-steps=0; give steps, or another policy")
        if self.fit_steps < 0:
            raise UsageError(f"fit-steps={self.fit_steps} must be 0 or more")

    def requires(self, program: Program) -> str | None:
        if program.state:
            return f"it has state ({program.state[0].spec.name}), which a run that ends early would leave as it was"
        return "it has exits already" if program.exits is not None else None

    def run(self, program: Program, context: PassContext) -> PassResult:
        found = find_places(program, self.exits, needs_product=self.policy != "cosine")
        if isinstance(found, str):
            return PassResult(program, notes=(found,))
        form, why = self._form(program)
        plan = self.plan(self.learn(program, [node.name for node in found.exits], context), context)
        exits = {name: plan.products[name] for name in plan.places}
        result = with_exits(program, context, exits, plan.policy, form, plan.point.shares)
        declined = (*(Declined(self.name, node.name, reason) for node, reason in found.refused), *result.declined)
        if result.program is program:
            return replace(result, declined=declined)
        times = self._times(program, result, context)
        told = account(plan.places, plan.judged, plan.costs, plan.point)
        return replace(
            result,
            declined=declined,
            notes=(*plan.notes, *why, *told, *latency(plan.judged, plan.costs, plan.point, times)),
            trade_offs=trade_offs(plan.judged, plan.costs, plan.point, self.policy, times),
        )

    def _times(self, program: Program, result: PassResult, context: PassContext) -> tuple[float | None, float | None]:
        """Seconds of one run without and with exits, where they are asked for and a device is at hand."""
        if not self.chart:
            return None, None
        context.progress(f"{self.name}: measuring", 0, 1)
        timings = [context.measure(item) for item in (program, result.program)]
        before, after = (None if timing is None else timing.seconds for timing in timings)
        return before, after

    def learn(self, program: Program, places: Sequence[str], context: PassContext) -> Learned:
        """Heads behind all of these nodes, and what comes of them; targets and thresholds play no part in it."""
        return learn(program, places, context, self.fit_steps, embeds=self.policy == "cosine")

    def plan(self, learned: Learned, context: PassContext) -> Plan:
        """Which nodes get an exit, with trained heads and thresholds as the options have them."""
        policy = Policy("pmax" if self.policy == "gate" else self.policy)
        chosen = self._exits(learned, policy)
        costs = learned.whole.costs(chosen)
        if self.policy == "gate":
            learned, policy = learn_gates(learned, chosen, costs, context, self.fit_steps)
        choosing, held_out = (
            part.answers(learned.heads).of(chosen).outcomes(policy) for part in (learned.choosing, learned.held_out)
        )
        point = self._choose(choosing, costs)
        return Plan(
            places=tuple(learned.heads.places[index] for index in chosen),
            products=learned.heads.products(),
            policy=replace(policy, thresholds=point.thresholds),
            point=point,
            costs=costs,
            choosing=choosing,
            judged=held_out,
            notes=learned.notes,
        )

    def _form(self, program: Program) -> tuple[Form, tuple[str, ...]]:
        """The form, and why, where it is chosen here: `staged` where the number of samples may change."""
        rows = program.outputs[0].shape[0] if program.outputs[0].shape else 0
        if self.form == "staged" and not isinstance(rows, str):
            raise UsageError(
                f"form=staged takes samples out between stages, but the program takes {rows} at a time; "
                "capture it with a dynamic first axis, or give form=cond"
            )
        if self.form != "auto":
            return self.form, ()
        if isinstance(rows, str):
            return "staged", ("form=staged, as the number of samples may change: each leaves on its own",)
        alone = "is" if rows == 1 else "would leave together"
        return "cond", (f"form=cond, as {'one sample' if rows == 1 else f'{rows} samples'} {alone} all there is",)

    def _exits(self, learned: Learned, policy: Policy) -> list[int]:
        """Which of the places: all that were named; else one after another, as long as the curve rises by it.

        Embeddings are compared from exit to exit, which takes all of them.
        """
        answers = learned.choosing.answers(learned.heads)
        places = range(len(learned.heads.places))
        if self.exits != "auto" or policy.name == "cosine":
            return list(places)
        chosen: list[int] = []
        best = 0.0
        while len(chosen) < min(MOST_EXITS, len(places)):
            areas = {}
            for index in set(places) - set(chosen):
                some = sorted((*chosen, index))
                outcomes = answers.of(some).outcomes(policy)
                areas[index] = selection.area(selection.curve(outcomes, learned.whole.costs(some), POINTS))
            index = max(areas, key=lambda index: (areas[index], -index))
            if areas[index] < best + LEAST_GAIN:
                break
            best = areas[index]
            chosen = sorted((*chosen, index))
        return chosen

    def _choose(self, outcomes: Outcomes, costs: Sequence[float]) -> Point:
        """Thresholds as the options have them, and what they come to."""
        count = len(costs) - 1
        if self.target_cost is not None:
            return selection.for_cost(outcomes, costs, self.target_cost)
        if self.shares is not None:
            return selection.for_shares(outcomes, costs, _of_each("shares", self.shares, count))
        if self.threshold == "auto":
            whole = float(outcomes.quality[:, -1].mean())
            target = (
                whole - (1 - ALIKE if self.policy == "cosine" else LOSS)
                if self.target_accuracy is None
                else self.target_accuracy
            )
            return selection.for_quality(outcomes, costs, target)
        limits = (self.threshold,) * count if isinstance(self.threshold, float) else self.threshold
        return selection.judge(outcomes, costs, _of_each("threshold", limits, count))


def _of_each(option: str, values: Sequence[float], count: int) -> Sequence[float]:
    if len(values) != count:
        raise UsageError(f"{option}={list(values)} has {len(values)} numbers for {count} exits; name the exits too")
    return values
