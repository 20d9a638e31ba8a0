"""The early-exit pass: heads learn, thresholds and places are chosen by data that is not held out."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

import graphopt
from graphopt.contract import PassContext, Timing
from graphopt.data.dataset import open_data
from graphopt.data.metric import open_metric
from graphopt.errors import UsageError
from graphopt.passes.early_exit import EarlyExit
from graphopt.passes.early_exit.forms import with_exits
from graphopt.program import Program
from graphopt.stages import split_stages
from tests.passes.exit_models import CLASSES, heads, inputs, labelled, network, with_form

FORMS: Any = ("multi-output", "cond", "staged")
SURE = 0.62  # a threshold that some samples pass at each exit
MARGIN = 1e-4  # of a decision that may not differ


def run(pass_: EarlyExit, feeds: Any = None, rows: int | None = None, **context: Any) -> Any:
    program = network(rows)
    data = open_data(labelled() if feeds is None else feeds, program)
    return program, pass_.run(program, PassContext(data=data, metric=open_metric("accuracy"), **context))


def weights_of(program: Program) -> dict[str, str]:
    return {
        name: hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
        for name, value in program.graph_module.state_dict().items()
    }


def test_heads_learn_and_the_network_stays() -> None:
    program, result = run(EarlyExit(fit_steps=40))
    before, after = weights_of(program), weights_of(result.program)
    assert all(after[name] == digest for name, digest in before.items())
    added = set(after) - set(before)
    assert len(added) == 2 * len(result.rewrites) and all(name.startswith("early_exit_") for name in added)
    own = before["head.weight"], before["head.bias"]
    assert not set(own) & {after[name] for name in added}
    assert "fitting took the loss of the heads" in result.notes[0]
    untrained = run(EarlyExit(fit_steps=0))[1]
    copies = weights_of(untrained.program)
    assert {copies[name] for name in set(copies) - set(before)} == set(own)


def test_held_out_labels_change_nothing() -> None:
    """Neither heads nor thresholds nor places are chosen by what the pass is judged on; the part before it counts."""
    feeds = labelled()
    other = [*feeds[:24], *((feed, (label + 1) % CLASSES) for feed, label in feeds[24:])]
    first, second = (run(EarlyExit(fit_steps=10), some)[1].program for some in (feeds, other))
    assert first.exits == second.exits and weights_of(first) == weights_of(second)
    chosen_by = [*feeds[:20], *((feed, (label + 1) % CLASSES) for feed, label in feeds[20:24]), *feeds[24:]]
    third = run(EarlyExit(fit_steps=10, exits=(0, 1)), chosen_by)[1].program
    fourth = run(EarlyExit(fit_steps=10, exits=(0, 1)), feeds)[1].program
    assert weights_of(third) == weights_of(fourth) and third.exits.thresholds != fourth.exits.thresholds


@pytest.mark.parametrize(
    "options, form",
    [
        ({"threshold": 0.7}, "staged"),
        ({"threshold": (0.6, 0.8)}, "staged"),
        ({"target_cost": 0.6, "form": "cond"}, "cond"),
        ({"target_accuracy": 0.5}, "staged"),
        ({"shares": (0.25, 0.5)}, "staged"),
        ({"policy": "entropy", "form": "multi-output"}, "multi-output"),
        ({"policy": "margin", "threshold": 0.5}, "staged"),
    ],
)
def test_thresholds_are_as_asked_for(options: dict[str, Any], form: str) -> None:
    _, result = run(EarlyExit(fit_steps=0, exits=(0, 1), **options))
    exits = result.program.exits
    assert exits.form == form and exits.policy == options.get("policy", "pmax")
    if "threshold" in options and options.get("policy") != "margin":
        limits = options["threshold"]
        assert exits.thresholds == (limits if isinstance(limits, tuple) else (limits, limits))
    if "shares" in options:
        assert exits.shares == pytest.approx((0.25, 0.5, 0.25), abs=0.02)
    if "target_cost" in options:
        assert sum(s * m for s, m in zip(exits.shares, exits.macs, strict=True)) <= 0.61 * exits.macs[-1]
    assert sum(exits.shares) == pytest.approx(1)
    assert sum("AUROC" in note or "alike" in note for note in result.notes) == 2
    points = [point for point in result.trade_offs if point.variant == exits.policy]
    assert [point.value for point in points] == sorted((point.value for point in points), reverse=True)


def test_a_chart_tells_what_samples_are_expected_to_take() -> None:
    program = network(None)
    times = iter((4e-3, 3e-3))
    context = PassContext(
        data=open_data(labelled(), program), metric=open_metric("accuracy"), measure=lambda _: Timing(next(times), 3)
    )
    result = EarlyExit(exits=(0, 1), threshold=0.7, fit_steps=0, chart=True).run(program, context)
    (note,) = [note for note in result.notes if note.startswith("expected latency")]
    assert note.endswith("measured on the examples: 3 ms, without exits 4 ms")
    assert f"{4 * result.trade_offs[1].value:.4g} ms a run" in note
    assert [point.seconds for point in result.trade_offs[:2]] == [4e-3, 3e-3]


def test_gates_learn_which_exit_is_best() -> None:
    program = network(None)
    context = PassContext(data=open_data(labelled(), program), metric=open_metric("accuracy"))
    early_exit = EarlyExit(policy="gate", fit_steps=12, exits=(0, 1), threshold=0.5)
    plan = early_exit.plan(early_exit.learn(program, list(heads(program)), context), context)
    exits = {place: plan.products[place] for place in plan.places}
    everything, staged = (
        with_exits(program, context, exits, plan.policy, form).program for form in ("multi-output", "staged")
    )
    x = inputs(32)
    values = dict(zip([spec.name for spec in everything.outputs], everything(x), strict=True))
    gates, spent = [], torch.zeros(32)
    for number, gate_ in enumerate(plan.policy.gates):
        weight, bias = gate_.weight.detach(), gate_.bias.detach()
        assert weight.abs().sum() > 0
        p = values[f"output_at_{number}"].softmax(-1)
        top = p.topk(2).values
        q = p.square() / p.square().sum(-1, keepdim=True)
        entropies = [-(v * v.clamp_min(1e-12).log()).sum(-1) for v in (p, q)]
        seen = torch.stack([top[:, 0], entropies[0], top[:, 0] - top[:, 1], entropies[1]], 1)
        gate = torch.sigmoid(seen @ weight[0] + bias)
        left = (1 - spent).clamp_min(1e-12)
        gates.append((torch.minimum(gate, left) / left).clamp(0, 1))
        spent = spent + gate
    assert len(gates) == 2
    for number, gate in enumerate(gates):
        assert torch.allclose(values[f"confidence_at_{number}"], gate, atol=1e-5)
    answer, taken = staged(x)
    assert torch.equal(answer, values["output"]) and torch.equal(taken, values["exit"])
    assert [len(stage.inputs) for stage in split_stages(staged)] == [1, 2, 1]  # gates go on from what was spent


def test_the_last_token_decides_for_all() -> None:
    program = network(None, gives="steps")
    x = inputs(40)
    everything = with_form(program, "multi-output", [SURE, SURE])
    values = dict(zip([spec.name for spec in everything.outputs], everything(x), strict=True))
    assert values["output"].shape == (40, 4, CLASSES)
    confidence = values["output_at_0"][:, -1].softmax(-1).amax(-1)
    assert torch.equal(values["exit"] == 0, confidence >= SURE)
    early = values["exit"] == 0
    assert early.any() and torch.equal(values["output"][early], values["output_at_0"][early])
    nested = with_form(program, "cond", [SURE, SURE])(x)
    assert torch.equal(nested[0], values["output"]) and torch.equal(nested[1], values["exit"])
    feeds = []
    for seed in range(10):
        some = inputs(8, seed)
        feeds.append(({"x": some}, program(some)[0].argmax(-1)))
    data = open_data(feeds, program)
    result = EarlyExit(fit_steps=5, exits=(1,)).run(program, PassContext(data=data, metric=open_metric("accuracy")))
    assert len(result.rewrites) == 1 and len(split_stages(result.program)) == 2


def test_an_embedder_leaves_when_its_embedding_stands_still() -> None:
    program = network(None, blocks=4, gives="embeddings")
    feeds = [{"x": inputs(16, seed)} for seed in range(20)]
    data, metric = open_data(feeds, program), open_metric("cosine")
    pass_ = EarlyExit(policy="cosine", fit_steps=20, target_accuracy=0.9, form="multi-output")
    result = pass_.run(program, PassContext(data=data, metric=metric))
    assert len(result.rewrites) == 3 and "fitting took the loss" in result.notes[0]
    x = inputs(32, 77)
    values = dict(zip([spec.name for spec in result.program.outputs], result.program(x), strict=True))
    heads_ = [values[f"output_at_{number}"] for number in range(3)]
    assert not values["confidence_at_0"].any()
    for number in (1, 2):
        cosine = torch.nn.functional.cosine_similarity(heads_[number - 1], heads_[number], dim=-1).clamp(0, 1)
        assert torch.allclose(values[f"confidence_at_{number}"], cosine, atol=1e-5)
    assert values["output"].norm(dim=-1).allclose(torch.ones(32))
    untrained = EarlyExit(policy="cosine", fit_steps=0, threshold=0.0, form="multi-output")
    first = untrained.run(program, PassContext(data=data, metric=metric)).program
    assert torch.equal(first(x)[0], dict(zip([s.name for s in first.outputs], first(x), strict=True))["output_at_0"])
    refused = EarlyExit(fit_steps=0).run(program, PassContext(data=data, metric=metric))
    assert refused.program is program and "no value before the last product" in refused.notes[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": 0.5, "target_cost": 0.5}, "exclude each other"),
        ({"exits": ()}, "makes none"),
        ({"target_accuracy": 1.5}, "target-accuracy=1.5"),
        ({"shares": (0.7, 0.7)}, "add up to at most 1"),
        ({"fit_steps": -1}, "fit-steps=-1"),
        ({"policy": "gate", "fit_steps": 0}, "policy=gate learns"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EarlyExit(**options)


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(UsageError, match="2 numbers for 1 exits"):
        run(EarlyExit(fit_steps=0, exits=(0,), threshold=(0.5, 0.6)))
    with pytest.raises(UsageError, match="give data and a metric"):
        EarlyExit().run(network(None), PassContext())
    with pytest.raises(UsageError, match="dynamic first axis"):
        EarlyExit(form="staged").run(network(1), PassContext())
    assert EarlyExit().requires(with_form(network(None), "cond", [SURE, SURE])) == "it has exits already"


def test_from_the_command_line_spelling_to_the_report() -> None:
    program = network(None)
    spec = "early-exit{exits=[0,1],threshold=0.7,fit-steps=5,form=cond}"
    result = graphopt.optimize(program, spec, data=labelled(), metric="accuracy")
    (report,) = result.report.passes
    assert [item.rule for item in report.rewrites] == ["early-exit", "early-exit"]
    assert report.metric is not None and result.program.exits is not None
    assert [point.variant for point in report.trade_offs[:2]] == ["taken", "taken"]
    kept = result.program.history[-1]
    assert kept["name"] == "early-exit" and kept["options"]["form"] == "cond"
