"""Which operators read codes, which values share a scale, and what stays float32."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import graphopt
import graphopt.data.dataset
from graphopt.contract import PassContext
from graphopt.errors import UsageError
from graphopt.interpreter import ProgramInterpreter
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantize.placement import MOVES
from graphopt.program import Program
from tests.models import program as model
from tests.passes.checking import captured, fingerprint

QUANTIZE = torch.ops.graphopt.quantize.default
DEQUANTIZE = torch.ops.graphopt.dequantize.default


def quantized(program: Program, target: str = "cpu", **options: Any) -> Program:
    torch.manual_seed(0)
    return Quantize(**options).run(program, PassContext(target=target)).program


def calls(program: Program, target: Any) -> list[Node]:
    return [node for node in program.nodes() if node.target is target]


def readers_of_codes(program: Program) -> Counter[str]:
    """Operators whose computed operands all are dequantized, by name."""
    found: Counter[str] = Counter()
    for node in program.nodes():
        if node.op != "call_function" or node.target in (QUANTIZE, DEQUANTIZE):
            continue
        operands = [item for item in node.all_input_nodes if item.op != "get_attr" and item.meta["val"] is not None]
        tensors = [item for item in operands if isinstance(item.meta["val"], Tensor)]
        if tensors and all(item.target is DEQUANTIZE for item in tensors):
            found[str(node.target).split(".")[1]] += 1
    return found


def test_a_residual_network_stays_in_codes_from_end_to_end() -> None:
    program = graphopt.optimize(model("resnet"), "O2", verify="off").program
    result = quantized(program)
    assert readers_of_codes(result) == {
        "conv2d": 12, "add": 3, "max_pool2d": 1, "adaptive_avg_pool2d": 1, "view": 1, "linear": 1
    }  # fmt: skip
    floats = [str(node.target) for node in result.nodes() if node.op == "call_function" and _is_float_work(node)]
    assert set(floats) == {"aten.relu.default"}  # each belongs to the product or the sum before it


def _is_float_work(node: Node) -> bool:
    """Whether it reads floats that stand for no codes, and is no quantize itself."""
    if node.target in (QUANTIZE, DEQUANTIZE) or not isinstance(node.meta["val"], Tensor):
        return False
    return not any(item.target is DEQUANTIZE for item in node.all_input_nodes)


def test_weights_are_stored_as_codes_and_biases_as_they_are() -> None:
    program = model("mlp")
    tensors = quantized(program).graph_module.state_dict().values()
    assert sorted((str(item.dtype), item.dim()) for item in tensors if item.numel() > 8) == [
        ("torch.float32", 1), ("torch.float32", 1), ("torch.float32", 1), ("torch.float32", 1),
        ("torch.int8", 2), ("torch.int8", 2),
    ]  # fmt: skip


def test_what_a_norm_reads_stays_float32() -> None:
    result = quantized(graphopt.optimize(model("bert"), "O2", verify="off").program)
    assert readers_of_codes(result) == {"linear": 8}
    for norm in calls(result, torch.ops.aten.layer_norm.default):
        assert norm.all_input_nodes[0].target is not DEQUANTIZE


def test_values_read_twice_are_quantized_once_and_dequantized_for_each() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = x.sin()
            return self.a(y), self.b(y), y

    program = captured(Two().eval(), torch.randn(3, 8))
    result = quantized(program)
    (codes,) = calls(result, QUANTIZE)
    assert len(codes.users) == 2 and all(user.target is DEQUANTIZE for user in codes.users)
    torch.testing.assert_close(result(*program.examples)[2], program(*program.examples)[2], rtol=0, atol=0)


class Moving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.max_pool2d(torch.relu(self.a(x)), 2)
        joined = torch.cat([pooled, nn.functional.max_pool2d(self.b(x) * 3, 2)], 1)
        return self.c(joined.transpose(2, 3))


def test_moved_values_have_the_scale_of_what_they_come_from_and_move_exactly() -> None:
    program = captured(Moving().eval(), torch.randn(2, 3, 10, 10))
    result = quantized(program)
    assert readers_of_codes(result) == {"conv2d": 3, "max_pool2d": 1, "cat": 1, "transpose": 1}
    for node in result.nodes():
        pairs = [item for item in node.all_input_nodes if item.target is DEQUANTIZE]
        codes = [user for user in node.users if user.target is QUANTIZE]
        if node.target in MOVES and pairs:
            assert len({item.args[1].target for item in (*pairs, *codes)}) == 1  # type: ignore[union-attr]
    values: dict[str, Tensor] = {}
    ProgramInterpreter(result.graph_module, see=values.__setitem__).run(*program.examples)
    (cat,) = calls(result, torch.ops.aten.cat.default)
    parts = [str(item.args[0]) for item in cat.args[0]]  # type: ignore[union-attr]
    (after,) = [user for user in cat.users if user.target is QUANTIZE]
    assert torch.equal(torch.cat([values[name] for name in parts], 1), values[after.name])


def test_sums_that_the_output_reads_stay_float32() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    program = captured(Sum().eval(), torch.randn(3, 8))
    assert readers_of_codes(quantized(program)) == {"linear": 2}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.c(torch.relu(y + self.b(y)))


@pytest.mark.parametrize(("target", "codes"), [("cpu", 2), ("cuda:sm_80", 1)])
def test_a_layer_adds_the_residual_itself_on_a_gpu(target: str, codes: int) -> None:
    program = captured(Residual().eval(), torch.randn(2, 4, 5, 5))
    (added,) = calls(quantized(program, target), torch.ops.aten.add.Tensor)
    assert sum(item.target is DEQUANTIZE for item in added.all_input_nodes) == codes


def test_codes_are_symmetric_where_the_target_takes_no_zero_point() -> None:
    program = model("mlp")
    for target, dtype in (("cpu", torch.uint8), ("cuda:sm_80", torch.int8)):
        for node in calls(quantized(program, target), QUANTIZE):
            assert node.kwargs["dtype"] is dtype
            assert (node.args[2] is None) is (dtype is torch.int8)


def test_products_of_two_computed_values_read_codes_on_both_sides() -> None:
    class Scores(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return (q.sin() @ k.cos().transpose(-1, -2)).softmax(-1)

    program = captured(Scores(), torch.randn(2, 5, 8), torch.randn(2, 6, 8))
    assert readers_of_codes(quantized(program)) == {"matmul": 1}
    assert readers_of_codes(quantized(program, weights="int8", activations="none")) == {}


def test_nothing_is_done_twice_and_refusals_leave_the_program() -> None:
    program = model("conv_net")
    printed = fingerprint(program)[0]
    result = Quantize().run(program, PassContext())
    assert fingerprint(program)[0] == printed
    again = Quantize().run(result.program, PassContext())
    assert not again.rewrites and "quantized already" in again.declined[0].reason
    refused = Quantize().run(program, PassContext(allow=lambda identity: False))
    assert refused.program is program and not refused.rewrites


def test_each_rewrite_alone_gives_a_program_that_runs() -> None:
    program = graphopt.optimize(model("resnet"), "O2", verify="off").program
    (before,) = program(*program.examples)
    for rewrite in Quantize().run(program, PassContext()).rewrites[::4]:
        alone = Quantize().run(program, PassContext(allow=lambda id, own=rewrite.id: id == own))  # type: ignore[misc]
        assert [item.id for item in alone.rewrites] == [rewrite.id]
        (after,) = alone.program(*program.examples)
        torch.testing.assert_close(after, before, rtol=0, atol=0.1 * float(before.abs().max()))


@pytest.mark.parametrize(
    ("entry", "left"),
    [
        ("linear_1", {"linear": 1}),
        ("*_1", {"linear": 1}),
        ("first", {"linear": 1}),
        ("aten.linear", {}),
        ("linear*", {}),
    ],
)
def test_ignored_operators_stay_float32(entry: str, left: dict[str, int]) -> None:
    program = model("mlp")
    result = Quantize(ignored=(entry,)).run(program, PassContext())
    assert readers_of_codes(result.program) == left
    assert any(f"ignored={entry}" in item.reason for item in result.declined)


def test_embeddings_are_listed_as_float32() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8)).eval()
    program = graphopt.capture(model, (torch.tensor([[1, 2]]),))
    report = graphopt.optimize(program, "quantize").report.passes[0]
    (reason,) = [item.reason for item in report.declined if item.node == "embedding"]
    assert reason == "the table of an embedding stays float32: only weights of products get codes"
    assert not graphopt.optimize(program, "quantize{weights=none}").report.passes[0].declined


def test_an_ignored_entry_that_means_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match="'conv3d' is no node, module or operator"):
        Quantize(ignored=("conv3d",)).run(model("mlp"), PassContext())


def test_branches_are_quantized_where_samples_go() -> None:
    program = model("branching")
    data = graphopt.data.dataset.open_data([{"x": program.examples[0]}, {"x": -program.examples[0]}] * 2, program)
    result = Quantize().run(program, PassContext(data=data))
    assert len(result.rewrites) == 3 and not result.declined
    one_sided = Quantize().run(program, PassContext())
    assert "no sample reaches" in one_sided.declined[0].reason
