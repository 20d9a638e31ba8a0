"""Early exits: every form takes the same exit for every sample, eager, compiled, in ONNX and read back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends import cpu
from graphopt.backends.target import resolve_target
from graphopt.checking.structure import find_defect
from graphopt.contract import PassContext
from graphopt.errors import CompileError, UnknownNameError, UsageError
from graphopt.passes.early_exit.decisions import Policy
from graphopt.passes.early_exit.forms import with_exits
from graphopt.passes.early_exit.places import Places, find_places
from graphopt.program import Program
from graphopt.runtime.session import InferenceSession
from graphopt.stages import split_stages
from graphopt.tools.benchmarking.small_transformers import Block, seeded
from tests.passes.exit_models import CLASSES, heads, inputs, network, with_form

FORMS: Any = ("multi-output", "cond", "staged")
SURE = 0.62  # a threshold that some samples pass at each exit
MARGIN = 1e-4  # of a decision that may not differ


@pytest.fixture(scope="module")
def program() -> Program:
    return network(None)


@pytest.fixture(scope="module")
def forms(program: Program) -> dict[str, Program]:
    return {form: with_form(program, form, [SURE, SURE]) for form in FORMS}


def host_decisions(program: Program, x: Tensor, thresholds: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Answers, exits and the least margin of any decision, from the logits of all heads."""
    names = [spec.name for spec in program.outputs]
    values = dict(zip(names, program(x), strict=True))
    logits = [values[f"output_at_{number}"] for number in range(len(thresholds))]
    confidence = torch.stack([item.softmax(-1).amax(-1) for item in logits], 1)
    exits = torch.tensor(
        [next((n for n, limit in enumerate(thresholds) if row[n] >= limit), len(thresholds)) for row in confidence]
    )
    margin = (confidence - torch.tensor(thresholds)).abs().amin(1)
    return torch.stack([*logits, values["output"]], 1)[range(len(x)), exits], exits, margin


def test_all_forms_give_what_the_host_would_decide(program: Program, forms: dict[str, Program]) -> None:
    x = inputs(64)
    everything = forms["multi-output"](x)
    final = program(x)[0]
    values = dict(zip([spec.name for spec in forms["multi-output"].outputs], everything, strict=True))
    logits = [values["output_at_0"], values["output_at_1"], final]
    confidence = torch.stack([item.softmax(-1).amax(-1) for item in logits], 1)
    assert torch.equal(confidence[:, 0], values["confidence_at_0"])
    sure = confidence >= torch.tensor([SURE, SURE, 0])
    exits = sure.int().argmax(1)
    assert sorted(set(exits.tolist())) == [0, 1, 2]
    answers = torch.stack(logits, 1)[range(64), exits]
    for form in FORMS:
        answer, taken, *more = forms[form](x)
        assert torch.equal(answer, answers) and torch.equal(taken, exits), form
        assert len(more) == (4 if form == "multi-output" else 0)
        assert find_defect(program, forms[form]) is None
        assert forms[form].answers == program.outputs


@pytest.mark.parametrize("policy", ["pmax", "margin", "entropy"])
def test_above_one_it_is_the_network_and_at_zero_the_first_head(program: Program, policy: str) -> None:
    x = inputs(9)
    everything = with_form(program, "multi-output", [2.0, 2.0], policy)
    assert torch.equal(everything(x)[0], program(x)[0]) and everything(x)[1].tolist() == [2] * 9
    for form in FORMS:
        last = with_form(program, form, [1.5, 1.5], policy)(x)
        assert torch.equal(last[0], program(x)[0]) and last[1].tolist() == [2] * 9
        first = with_form(program, form, [0.0, 0.0], policy)(x)
        assert torch.equal(first[0], everything(x)[2]) and first[1].tolist() == [0] * 9


def test_no_number_is_sure_of_nothing(forms: dict[str, Program]) -> None:
    x = inputs(3)
    x[1] = torch.nan
    for form in FORMS:
        answer, exits = forms[form](x)[:2]
        assert answer[1].isnan().all() and exits[1] == 2 and answer[0].isfinite().all()


def test_one_sample_chooses_among_nothing() -> None:
    program = network(1)
    everything, nested = (with_form(program, form, [SURE, SURE]) for form in ("multi-output", "cond"))
    targets = [str(node.target) for node in nested.nodes()]
    assert "aten.where.self" not in targets and targets.count("cond") == 2
    seen = set()
    for seed in range(40):
        x = inputs(1, seed)
        assert all(torch.equal(one, other) for one, other in zip(everything(x)[:2], nested(x), strict=True))
        seen.add(int(nested(x)[1]))
    assert seen == {0, 1, 2}


def test_work_adds_up(program: Program) -> None:
    """Per sample: 8x16 for each of four tokens, 2x16x32 for a block, 16x5 for a head; three samples."""
    first, block, head = 4 * 8 * 16, 4 * 2 * 16 * 32, 16 * CLASSES
    for form in FORMS:
        exits = with_form(program, form, [0.5, 0.5]).exits
        assert exits is not None
        stages = [first + block + head, block + head, block + head]
        assert exits.macs == tuple(3 * sum(stages[: number + 1]) for number in range(3))


def test_stages_read_no_more_than_they_need(forms: dict[str, Program]) -> None:
    first, second, last = split_stages(forms["staged"])
    assert [spec.name for spec in first.outputs][:2] == ["output", "done"] and len(first.outputs) == 3
    assert [spec.name for spec in second.inputs] == [first.outputs[2].name]
    assert [spec.name for spec in last.outputs] == ["output"]
    targets = [node.target for stage in (first, second, last) for node in stage.nodes()]
    assert torch.ops.higher_order.cond not in targets


def test_stages_need_their_conditions(program: Program, forms: dict[str, Program]) -> None:
    with pytest.raises(CompileError, match="no condition left"):
        split_stages(replace(program, exits=forms["staged"].exits))


# Compiled -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def session(forms: dict[str, Program]) -> Iterator[InferenceSession]:
    entries = {form.replace("-", "_"): item for form, item in forms.items()}
    yield graphopt.compile(entries).session()


@pytest.mark.parametrize("rows", [1, 2, 13, 64])
def test_compiled_forms_take_the_same_exits(session: InferenceSession, forms: dict[str, Program], rows: int) -> None:
    x = inputs(rows, seed=rows)
    answers, exits, margin = host_decisions(forms["multi-output"], x, [SURE, SURE])
    clear = (margin > MARGIN).numpy()
    assert clear.sum() >= rows - 1
    for form in FORMS:
        results = session.run(None, {"x": x.numpy()}, entry=form.replace("-", "_"))
        assert [result.shape for result in results] == [(rows, CLASSES)]
        assert session.last_run is not None and session.last_run.exits is not None
        taken = np.array(session.last_run.exits)
        assert (taken == exits.numpy())[clear].all(), form
        same = taken == exits.numpy()
        assert np.allclose(results[0][same], answers.numpy()[same], atol=1e-5), form


def test_what_tells_of_exits_is_given_by_name(session: InferenceSession) -> None:
    x = inputs(5)
    for entry in ("cond", "staged", "multi_output"):
        answer, exits = session.run(["output", "exit"], {"x": x.numpy()}, entry=entry)
        assert answer.shape == (5, CLASSES) and session.last_run is not None
        assert exits.dtype == np.int64 and tuple(exits.tolist()) == session.last_run.exits
    (confidence,) = session.run(["confidence_at_1"], {"x": x.numpy()}, entry="multi_output")
    assert confidence.shape == (5,)


def test_stages_are_entries_of_their_own(session: InferenceSession) -> None:
    stages = [f"staged_stage_{number}" for number in range(3)]
    assert set(session.entries) == {"multi_output", "cond", "staged", *stages}
    for entry in session.entries:
        feed, expected = session.samples(entry)
        for name, want in expected.items():
            assert np.allclose(session.run([name], feed, entry=entry)[0], want, atol=1e-5)
    assert session.last_run is not None and session.last_run.exits is None
    assert [item.name for item in session.get_outputs("staged")] == ["output"]


class Attending(nn.Module):
    """Logits of x [samples, 3, 8] after three blocks, each with products of one input that can be merged."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8, 2, 16, causal=False) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x.mean(1)))
        return found


@pytest.mark.parametrize("form", ["cond", "staged"])
def test_passes_go_on_in_what_comes_after_an_exit(form: Any) -> None:
    """Weights that a pass makes there belong to one branch, whatever others of that name there are."""
    module = seeded(0, Attending).eval()
    program = graphopt.capture(module, (torch.zeros(3, 3, 8),), dynamic_shapes={"x": {0: "batch"}})
    x = torch.randn(16, 3, 8, generator=torch.Generator().manual_seed(4))
    told = with_form(program, "multi-output", [2.0, 2.0])
    confidence = dict(zip((spec.name for spec in told.outputs), told(x), strict=True))["confidence_at_0"]
    limit = float(confidence.median()) + MARGIN
    result = graphopt.optimize(with_form(program, form, [limit, limit]), "merge-linears")
    assert len(result.report.passes[0].rewrites) == 3
    session = graphopt.compile(result.program).session()
    assert np.allclose(session.run(None, {"x": x.numpy()})[0], result.program(x)[0].numpy(), atol=1e-5)
    assert session.last_run is not None and len(set(session.last_run.exits or ())) > 1


def test_samples_that_are_done_run_no_more(session: InferenceSession) -> None:
    """Kernels of later stages are not called when all samples leave; a clone and a profile run stages, too."""
    program = session.clone()
    x = inputs(64, seed=5)
    program.run(None, {"x": x.numpy()}, entry="staged")
    assert program.last_run is not None and program.last_run.exits is not None
    early = np.array(program.last_run.exits) == 0
    assert early.any() and not early.all()
    calls = [
        sum(count for count, _ in program.profile({"x": some}, entry="staged", rounds=1).values())
        for some in (x.numpy()[early], x.numpy())
    ]
    assert calls[0] < calls[1] / 2
    nested = [
        sum(count for count, _ in program.profile({"x": some}, entry="cond", rounds=1).values())
        for some in (x.numpy()[early], x.numpy())
    ]
    assert nested[0] < nested[1] / 2


def test_an_exit_takes_one_kernel_more() -> None:
    """Heads have the kernels of the network's own; both sides of every condition are fused as the network is."""
    program = network(1)
    plain, nested = (
        cpu.lower({"main": item}, resolve_target("cpu")).kernels
        for item in (program, with_form(program, "cond", [0.5, 0.6]))
    )
    assert set(plain) <= set(nested) and len(nested) <= len(plain) + 2
    decisions = [info.nodes["main"] for name, info in nested.items() if name not in plain]
    assert sorted(len(nodes) for nodes in decisions) == [3, 3]  # softmax, its largest, the comparison
    one = cpu.lower({"main": with_form(program, "cond", [0.5, 0.5])}, resolve_target("cpu")).kernels
    assert len(one) == len(plain) + 1


# Files ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [None, 1])
def test_onnx_has_conditions(tmp_path: Path, rows: int | None) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    nested = with_form(network(rows), "cond", [SURE, SURE])
    path = str(tmp_path / "exits.onnx")
    nested.to_onnx(path)
    model = onnx.load(path)
    assert [node.op_type for node in model.graph.node].count("If") == 1
    told = {entry.key: entry.value for entry in model.metadata_props}["graphopt.exits"]
    assert '"policy": "pmax"' in told and str(SURE) in told
    again = graphopt.capture(path)
    assert again.exits == nested.exits and again.answers == nested.answers
    peer = onnxruntime.InferenceSession(path)
    for seed in range(6):
        x = inputs(rows or 1 + seed, seed)
        want = nested(x)
        for got in (peer.run(None, {"x": x.numpy()}), again(x)):
            assert np.allclose(got[0], want[0], atol=1e-5) and np.array_equal(got[1], want[1])


def test_a_saved_program_has_its_stages(tmp_path: Path, forms: dict[str, Program]) -> None:
    path = str(tmp_path / "exits.pt2")
    forms["staged"].save(path)
    again = graphopt.capture(path)
    assert again.exits == forms["staged"].exits
    cleaned = graphopt.optimize(again, "O2").program
    assert cleaned.exits == again.exits and len(split_stages(cleaned)) == 3
    x = inputs(4)
    assert torch.equal(cleaned(x)[1], forms["staged"](x)[1])


# Places ---------------------------------------------------------------------------------------------------------------
class Convolutions(nn.Module):
    """Three convolutions; the last two give as many channels, so that the head fits both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.second, self.third = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.second, self.third):
            x = torch.relu(layer(x))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


def test_places_of_a_network_without_repeated_blocks() -> None:
    program = graphopt.capture(Convolutions().eval(), (torch.randn(1, 1, 9, 9),))
    found = find_places(program, "auto", needs_product=True)
    assert isinstance(found, Places)
    assert [node.name for node in found.exits] == ["relu_1"] and found.head.source.name == "relu_2"
    named = find_places(program, ("relu", "conv2d_1"), needs_product=True)
    assert isinstance(named, Places) and [node.name for node in named.exits] == ["conv2d_1"]
    ((node, reason),) = named.refused
    assert node.name == "relu" and "the head does not take its value" in reason


def test_what_has_no_head_has_no_exits() -> None:
    program = graphopt.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.randn(2, 4),))
    assert "no value before the last product" in str(find_places(program, "auto", needs_product=True))
    with pytest.raises(UnknownNameError):
        find_places(network(None), ("nothing",), needs_product=True)
    with pytest.raises(UsageError, match="there is no exit 7"):
        find_places(network(None), (7,), needs_product=True)


def test_an_exit_that_is_refused_is_left_out(program: Program) -> None:
    found = heads(program)
    first, second = found

    def allow(identity: str) -> bool:
        return identity != f"early-exit@{second}"

    result = with_exits(program, PassContext(allow=allow), found, Policy("pmax", (SURE, SURE)), "cond")
    assert [item.id for item in result.rewrites] == [f"early-exit@{first}"]
    assert [item.node for item in result.declined] == [second]
    assert result.program.exits is not None and len(result.program.exits.macs) == 2
    none = with_exits(program, PassContext(allow=lambda identity: False), found, Policy("pmax", (1.0, 1.0)), "cond")
    assert none.program is program and len(none.declined) == 2
