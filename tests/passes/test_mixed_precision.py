from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends import target as targets
from graphopt.backends.target import LEVELS
from graphopt.contract import PassContext, PassResult
from graphopt.passes.mixed_precision import MixedPrecision
from graphopt.program import Program
from tests.passes.checking import captured

PAIRS = "cpu:x86-64-v4-bf16"


class Block(nn.Module):
    """A transformer block with the norm before: embedding, norm, attention, norm, two linears, residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        parts = self.qkv(self.first(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


def block() -> Program:
    torch.manual_seed(0)
    return captured(Block().eval(), torch.randint(0, 50, (2, 9)))


def run(program: Program, dtype: Any = "bf16", target: str = PAIRS) -> PassResult:
    return MixedPrecision(dtype=dtype).run(program, PassContext(target=target))


def casts(program: Program, dtype: torch.dtype) -> list[str]:
    """What is cast to `dtype`, by the operator that made it."""
    nodes = [n for n in program.nodes() if n.target is torch.ops.aten._to_copy.default and n.meta["val"].dtype is dtype]
    return [str(node.all_input_nodes[0].target).removeprefix("aten.") for node in nodes]


def test_operands_of_products_are_rounded_where_they_are_made() -> None:
    result = run(block())
    rounded = casts(result.program, torch.bfloat16)
    norms = ["layer_norm.default"] * 2
    assert sorted(rounded) == sorted([*norms, "linear.default", "gelu.default"])
    state = result.program.graph_module.state_dict().values()
    matrices = [tensor for tensor in state if tensor.dim() == 2]
    assert len(matrices) == 5 and all(tensor.dtype is torch.bfloat16 for tensor in matrices)
    assert all(tensor.dtype is torch.float32 for tensor in state if tensor.dim() == 1)


def test_only_views_are_taken_of_rounded_numbers() -> None:
    """Norms, sums and the residual stream stay float32; attention takes and gives bfloat16."""
    allowed = {
        "scaled_dot_product_attention",
        "_to_copy",
        "embedding",
        "unflatten",
        "view",
        "permute",
        "transpose",
        "unbind",
        "flatten",
    }
    for node in run(block()).program.nodes():
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and value.dtype is torch.bfloat16:
            name = str(node.target).partition(".")[2].partition(".")[0]
            assert name in allowed or "getitem" in str(node.target), node


def test_the_program_multiplies_rounded_numbers_and_sums_in_float32() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(33, 7), torch.randn(5, 33)
    result = run(captured(linear, x))
    (found,) = result.program(x)
    exact = x.bfloat16().double() @ linear.weight.bfloat16().double().T + linear.bias.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_accuracy_is_in_the_report_and_near_float32() -> None:
    program = block()
    report = graphopt.optimize(program, "mixed-precision{dtype=bf16}", target=PAIRS).report
    (item,) = report.passes
    assert any("largest difference on the examples" in note for note in item.notes)
    (before,), (after,) = program(*program.examples), run(program).program(*program.examples)
    assert 0 < float((after - before).abs().max()) < 0.02 * float(before.abs().max())


def test_inputs_and_outputs_keep_their_types_and_nothing_is_done_twice() -> None:
    program = block()
    result = run(program)
    assert [spec.dtype for spec in result.program.inputs] == [spec.dtype for spec in program.inputs]
    assert [spec.dtype for spec in result.program.outputs] == [torch.float32]
    assert not run(result.program).rewrites
    refused = MixedPrecision().run(program, PassContext(target=PAIRS, allow=lambda identity: False))
    assert refused.program is program and not refused.rewrites


def test_each_rewrite_alone_gives_a_program_that_runs() -> None:
    program = block()
    (before,) = program(*program.examples)
    for rewrite in run(program).rewrites:
        alone = MixedPrecision().run(program, PassContext(target=PAIRS, allow=lambda id, own=rewrite.id: id == own))  # type: ignore[misc]
        (after,) = alone.program(*program.examples)
        torch.testing.assert_close(after, before, rtol=0, atol=0.02 * float(before.abs().max()))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).relu() @ self.table.weight.t()


def test_a_table_that_is_also_a_weight_is_stored_once() -> None:
    class Head(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.table(ids).relu(), self.table.weight)

    result = run(captured(Head().eval(), torch.randint(0, 20, (2, 3))))
    (table,) = result.program.graph_module.state_dict().values()
    assert table.dtype is torch.bfloat16


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.depthwise(x + self.inner(x))


def test_convolutions_of_pairs() -> None:
    result = run(captured(Images().eval(), torch.randn(1, 3, 9, 9)))
    assert casts(result.program, torch.bfloat16) == ["x", "relu.default"]
    reasons = " ".join(item.reason for item in result.declined)
    assert "its channels make no pairs: 1 in each of 8 groups" in reasons
    pointwise = run(captured(nn.Conv2d(3, 8, 1).eval(), torch.randn(1, 3, 9, 9)))
    assert "its channels make no pairs: 3 in each of 1 groups" in " ".join(item.reason for item in pointwise.declined)


@pytest.mark.parametrize(("dtype", "target"), [("bf16", "cpu:x86-64-v3"), ("fp16", PAIRS), ("fp16", "cpu:aarch64")])
def test_a_target_that_multiplies_none_gets_narrow_weights_only(dtype: str, target: str) -> None:
    result = run(block(), dtype, target)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert not casts(result.program, kind)
    assert kind in {tensor.dtype for tensor in result.program.graph_module.state_dict().values()}
    assert f"{target} multiplies no {dtype}, so only weights are stored in it" in result.notes[0]


def test_this_machine_is_asked_for_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for level, rounded in (("cpu:x86-64-v4", False), (PAIRS, True)):
        monkeypatch.setattr(targets, "_host_level", lambda level=level: level)
        assert bool(casts(run(block(), target="cpu").program, torch.bfloat16)) is rounded
    assert PAIRS in LEVELS


def test_float16_keeps_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(4, 4), nn.Linear(4, 4)
            self.huge = nn.Parameter(torch.full((4, 4), 1e5))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.small(x.relu()), self.large(x.exp() * 5000), nn.functional.linear(x.sin(), self.huge)

    monkeypatch.setattr("graphopt.passes.mixed_precision.multiplies", lambda target, dtype: True)
    result = run(captured(Large().eval(), torch.randn(3, 4)), "fp16")
    assert sorted(casts(result.program, torch.float16)) == ["relu.default", "sin.default"]
    reasons = " ".join(item.reason for item in result.declined)
    assert "too near to the largest fp16" in reasons and "its largest value is not finite in fp16" in reasons
