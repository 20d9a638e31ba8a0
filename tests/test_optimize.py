from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphopt
from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Edit
from graphopt.errors import PassError, PostconditionError, PreconditionError, UsageError, VerificationError
from graphopt.passes.dead_code import DeadCode
from graphopt.passes.no_op_removal import NoOpRemoval
from graphopt.program import Program
from graphopt.rewrite import RewritePass, Rule
from tests import models
from tests.passes.checking import captured, fingerprint, targets


def capture_case(case: models.Case) -> Program:
    module, inputs, dynamic = case
    return graphopt.capture(module, inputs, dynamic_shapes=dynamic)


@cache
def program_named(name: str) -> Program:
    """A model of tests/models.py, captured once."""
    return capture_case(getattr(models, name)())


@cache
def optimized(name: str) -> graphopt.OptimizeResult:
    return graphopt.optimize(program_named(name), "O2")


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "branching", "counter"])
def test_o2_on_real_models_is_exact_pure_and_idempotent(name: str) -> None:
    program = program_named(name)
    printed, tensors = fingerprint(program)
    result = optimized(name)
    assert result.program.count_operators() == result.report.nodes_after
    assert fingerprint(program)[0] == printed
    assert all(torch.equal(a, b) for a, b in zip(fingerprint(program)[1], tensors, strict=True))
    again = graphopt.optimize(result.program, "O2", verify="structure")
    assert not any(item.rewrites for item in again.report.passes)


def test_a_transformer_gets_one_linear_for_queries_keys_and_values() -> None:
    result = optimized("bert")
    counts = Counter(targets(result.program))
    assert counts["aten.linear"] == 2 * (1 + 3)
    assert counts["aten.split_with_sizes"] == 2
    assert "aten.clone" not in counts
    assert not any("query" in name for name in result.program.graph_module.state_dict())


def test_a_convolutional_network_loses_its_normalizations() -> None:
    program = program_named("resnet")
    norms = sum("batch_norm" in name for name in targets(program))
    result = optimized("resnet")
    folding = next(item for item in result.report.passes if item.name == "batch-norm-folding")
    assert len(folding.rewrites) == norms > 5
    assert not any("norm" in name for name in targets(result.program))


def test_nothing_happens_at_o0() -> None:
    program = capture_case(models.mlp())
    result = graphopt.optimize(program, "O0")
    assert result.program is program and result.report.passes == ()


def test_the_symbolic_sizes_of_a_program_stay() -> None:
    program, result = program_named("bert"), optimized("bert").program
    ids, mask = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64)
    assert torch.allclose(program(ids, mask)[0], result(ids, mask)[0], atol=1e-5)
    assert (result.inputs, result.outputs, result.sizes) == (program.inputs, program.outputs, program.sizes)


def test_the_report_is_json_and_counts() -> None:
    report = graphopt.optimize(program_named("bert"), "constant-folding{max-bytes=0},no-op-removal").report
    plain = json.loads(json.dumps(report.to_json()))
    assert [item["name"] for item in plain["passes"]] == ["constant-folding", "no-op-removal"]
    assert plain["passes"][0]["options"] == {"max-bytes": 0}
    last = plain["passes"][1]
    assert last["nodes_before"] - last["nodes_after"] == len(last["rewrites"])
    assert set(last["rewrites"][0]) == {"id", "rule", "before", "after"}
    assert last["error"] < 1e-5


@pytest.fixture(scope="module")
def mlp() -> Program:
    return capture_case(models.mlp())


@dataclass(frozen=True)
class Given(Pass):
    """Runs the function it is given."""

    name = "given"
    function: Callable[[Program], Any] = lambda program: PassResult(program)

    def run(self, program: Program, context: PassContext) -> PassResult:
        return self.function(program)


@dataclass(frozen=True)
class Learned(Given):
    """A pass that needs data."""

    name = "learned"
    preserves = "approximate"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"passes": "recipe.yaml"}, "the recipe recipe.yaml cannot be read: No such file"),
        ({"passes": "dead-cod"}, "did you mean 'dead-code'"),
        ({"passes": [DeadCode]}, "which is no Pass; give instances"),
        ({"passes": DeadCode()}, "give a list of passes, or text such as"),
        ({"strict": True, "verify": "structure"}, "strict has no effect with verify='structure'"),
        ({"seed": "one"}, "seed='one' is none; give an integer"),
        ({"seed": -1}, "seed=-1 is none"),
        ({"verify": "all"}, "verify='all' is none of off, structure, numeric"),
        ({"threads": 2}, "threads=2 has no effect where nothing is measured"),
        ({"database": 5}, "database=5 is no store"),
        ({"data": [1], "verify": "structure"}, "data has no effect without a metric"),
        ({"metric": "cosine"}, "metric is measured on data; give data too"),
        ({"target": "gpu"}, "unknown target 'gpu'"),
        ({"passes": [Learned()]}, "learned changes results and needs both data and metric"),
        ({"passes": [Learned()], "data": [1]}, "needs both data and metric"),
    ],
)
def test_arguments_that_cannot_be_used(mlp: Program, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        graphopt.optimize(mlp, **{"passes": "O1", **arguments})
    assert words in str(caught.value)


def test_a_program_is_asked_for() -> None:
    with pytest.raises(UsageError, match="takes a Program, got Linear"):
        graphopt.optimize(nn.Linear(2, 2), "O1")  # type: ignore[arg-type]


def test_a_program_without_examples_is_checked_by_structure_only(mlp: Program) -> None:
    bare = replace(mlp, examples=())
    with pytest.raises(UsageError, match="no example inputs"):
        graphopt.optimize(bare, "O1")
    assert graphopt.optimize(bare, "O1", verify="structure").report.nodes_after > 0


def crash(program: Program) -> PassResult:
    raise KeyError("lost")


def with_edit(program: Program, edit: Callable[[torch.fx.Graph], None]) -> PassResult:
    copy = program.copy()
    edit(copy.graph_module.graph)
    copy.graph_module.recompile()
    return PassResult(copy)


def scale_weights(program: Program) -> PassResult:
    edit = Edit(program, PassContext(), "given")
    (editor,) = edit.graphs()
    node = next(node for node in editor.nodes() if node.target is torch.ops.aten.relu.default)
    editor.replace("scale", [node], lambda builder: [builder.call(torch.ops.aten.mul.Tensor, node.args[0], 1.001)])
    return edit.finish()


def scale_silently(program: Program) -> PassResult:
    return replace(scale_weights(program), rewrites=(), instances=())


def test_a_pass_that_crashes_is_named_with_those_before_it(mlp: Program) -> None:
    with pytest.raises(PassError, match="pass given, after dead-code: KeyError: 'lost'") as caught:
        graphopt.optimize(mlp, [DeadCode(), Given(crash)])
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_pass_that_returns_something_else(mlp: Program) -> None:
    with pytest.raises(PassError, match="returned Program; return a PassResult"):
        graphopt.optimize(mlp, [Given(lambda program: program)])


def test_a_wrong_result_of_a_pass_that_never_asked_is_an_error_naming_pass_and_size(mlp: Program) -> None:
    words = r"pass given, after dead-code: output.* is off by .* at most .* no rewrite that it asked for"
    with pytest.raises(VerificationError, match=words):
        graphopt.optimize(mlp, [DeadCode(), Given(scale_silently)])
    assert graphopt.optimize(mlp, [Given(scale_silently)], verify="structure").report.nodes_after


def test_an_inexact_pass_starts_a_new_reference(mlp: Program) -> None:
    data = [{"x": torch.randn(2, 16)} for _ in range(10)]
    report = graphopt.optimize(mlp, [Learned(scale_weights), NoOpRemoval()], data=data, metric="snr").report
    learned, cleanup = report.passes
    assert (learned.error, learned.metric) == (None, report.metric.after if report.metric else None)
    assert cleanup.metric is None and cleanup.error is not None and cleanup.error < 1e-6
    assert report.metric and report.metric.before == 300 and report.metric.after < 0  # without relu little is left
    assert report.metric.samples == 2


def test_the_metric_of_exact_passes_is_measured_on_the_held_out_fifth(mlp: Program) -> None:
    seen: list[int] = []

    def spread(outputs: list[torch.Tensor], labels: list[torch.Tensor]) -> float:
        seen.append(len(outputs[0]))
        return float(outputs[0].std() + labels[0].float().mean() * 0)

    data = [({"x": torch.randn(2, 16)}, np.zeros(2, np.int64)) for _ in range(10)]
    report = graphopt.optimize(mlp, "O1", data=data, metric=spread).report
    assert report.metric and report.metric.name == "spread" and seen == [4, 4]
    assert report.metric.before == pytest.approx(report.metric.after)


def test_the_first_sample_of_the_data_is_checked_on(mlp: Program) -> None:
    class AboveTen(Rule):
        """Wrong only for values that the data has and the examples do not."""

        @staticmethod
        def pattern(x: Any) -> Any:
            return torch.ops.aten.relu.default(x)

        @staticmethod
        def rewrite(x: Any) -> Any:
            return torch.ops.aten.clamp.default(x, 0.0, 1000.0)

    @dataclass(frozen=True)
    class Clamp(RewritePass):
        name = "clamp"
        rules = (AboveTen,)

    assert not graphopt.optimize(mlp, [Clamp()]).report.passes[0].rolled_back
    (wrong,) = graphopt.optimize(mlp, [Clamp()], data=[{"x": 1e5 * torch.ones(1, 16)}]).report.passes[0].rolled_back
    assert wrong.reason.endswith("on the first sample of the data")


def test_conditions_of_a_pass_are_checked_on_the_right_program(mlp: Program) -> None:
    @dataclass(frozen=True)
    class Picky(Given):
        name = "picky"

        def requires(self, program: Program) -> str | None:
            return f"it has {program.count_operators()} operators" if program.count_operators() > 3 else None

        def ensures(self, program: Program) -> str | None:
            return "it has operators left"

    with pytest.raises(PreconditionError, match="pass picky: cannot take the program: it has 4 operators"):
        graphopt.optimize(mlp, [Picky()])
    with pytest.raises(PostconditionError, match=r"pass picky, after no-op-removal: .* operators left"):
        graphopt.optimize(mlp, [NoOpRemoval(), Picky()])


def call_inplace(graph: torch.fx.Graph) -> None:
    next(node for node in graph.nodes if node.op == "call_function").target = torch.ops.aten.relu_.default


def drop_meta(graph: torch.fx.Graph) -> None:
    next(node for node in graph.nodes if node.op == "call_function").meta.pop("val")


def rename_input(graph: torch.fx.Graph) -> None:
    next(node for node in graph.nodes if node.op == "placeholder").target = "other"


def nest_output(graph: torch.fx.Graph) -> None:
    output = next(iter(reversed(graph.nodes)))
    output.args = ((output.args[0],),)


def lose_attribute(graph: torch.fx.Graph) -> None:
    next(node for node in graph.nodes if node.op == "get_attr").target = "nowhere"


def call_python(graph: torch.fx.Graph) -> None:
    next(node for node in graph.nodes if node.op == "call_function").target = torch.relu


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (call_inplace, "writes to its input"),
        (drop_meta, "has no value in its meta"),
        (rename_input, "its placeholders are"),
        (nest_output, "no flat tuple of nodes"),
        (lose_attribute, "nowhere"),
        (call_python, "on tensors; write the ATen overload"),
    ],
)
def test_ill_formed_results_are_refused(edit: Callable[[torch.fx.Graph], None], words: str) -> None:
    program = captured(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4))

    def broken(program: Program) -> PassResult:
        copy = program.copy()
        edit(copy.graph_module.graph)
        return PassResult(copy)

    with pytest.raises(PostconditionError, match="pass given: the result is ill-formed") as caught:
        graphopt.optimize(program, [Given(broken)])
    assert words in str(caught.value)


def test_a_changed_interface_is_refused(mlp: Program) -> None:
    def rename(program: Program) -> PassResult:
        return PassResult(replace(program, outputs=(replace(program.outputs[0], name="renamed"),)))

    with pytest.raises(PostconditionError, match="its outputs are"):
        graphopt.optimize(mlp, [Given(rename)])


@pytest.mark.parametrize("level", ["O9", "02", "-O2", "3"])
def test_a_level_that_is_none_is_answered_with_those_there_are(level: str) -> None:
    with pytest.raises(UsageError, match="the levels are O0, O1, O2, O3"):
        graphopt.optimize(models.program("mlp"), level)


class Ticks(nn.Module):
    """Counts its calls and takes nothing."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2))

    def forward(self) -> torch.Tensor:
        self.total.add_(1)
        return self.total * 2


def test_a_model_without_inputs_is_optimized() -> None:
    program = graphopt.capture(Ticks(), ())
    result = graphopt.optimize(program, "O1").program
    assert torch.equal(result()[0], torch.full((2,), 2.0))


def test_a_pass_may_not_change_what_state_starts_from() -> None:
    def change(program: Program) -> PassResult:
        first, *others = program.state
        return PassResult(replace(program.copy(), state=(replace(first, initial=first.initial + 1), *others)))

    with pytest.raises(PostconditionError, match="initial value of its state has changed"):
        graphopt.optimize(models.program("counter"), [Given(change)], verify="structure")
