"""What the manifest says of kernels: work at two sizes, what it leaves out, and which nodes they compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.backends import cpu
from graphopt.backends.operators import views
from graphopt.backends.target import resolve_target
from graphopt.capture import capture
from graphopt.optimize import optimize
from graphopt.program import Program, evaluate_size
from graphopt.runtime.manifest import KernelInfo
from graphopt.runtime.sizes import parse_size
from tests import models

F = nn.functional


def lowered(programs: Program | Mapping[str, Program]) -> dict[str, KernelInfo]:
    entries = {"main": programs} if isinstance(programs, Program) else programs
    return dict(cpu.lower(entries, resolve_target("cpu", threads=2)).kernels)


class Function(nn.Module):
    def __init__(self, function: Any, **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        inputs = (x,) if y is None else (x, y)
        return self.function(*inputs, *self.buffers())


def kernels(function: Any, *inputs: Tensor, dynamic: Sequence[str] = (), **parameters: Tensor) -> dict[str, KernelInfo]:
    """By name; `dynamic` names the first axes of every input."""
    shapes = {name: dict(enumerate(dynamic)) for name, _ in zip("xy", inputs, strict=False)} if dynamic else None
    return lowered(capture(Function(function, **parameters), inputs, dynamic_shapes=shapes))


def only(found: Mapping[str, KernelInfo]) -> KernelInfo:
    (kernel,) = found.values()
    return kernel


def at(size: int | str | None, **sizes: int) -> int:
    """Both readers of size expressions agree."""
    assert size is not None
    value = evaluate_size(size, sizes)
    assert isinstance(size, int) or parse_size(size).value(sizes) == value
    return value


def test_a_product_with_a_weight() -> None:
    weight, bias = torch.randn(96, 32), torch.randn(96)
    kernel = only(kernels(F.linear, torch.randn(5, 32), w=weight))
    assert kernel.rule == "packed-gemm" and kernel.flops == 2 * 5 * 96 * 32
    assert kernel.bytes == 4 * (5 * 32 + 5 * 96 + 96 * 32) and kernel.weight_bytes == 4 * 96 * 32
    assert kernel.configuration["rows"] == 5 and kernel.configuration["row_shares"] == 1
    with_bias = only(kernels(lambda x, w, b: F.linear(x, w, b).abs(), torch.randn(5, 32), w=weight, b=bias))
    assert with_bias.flops == 2 * 5 * 96 * 32 + 2 * 5 * 96  # the bias and the absolute value
    assert with_bias.weight_bytes == 4 * (96 * 32 + 96)


def test_sizes_known_at_run_time_are_expressions() -> None:
    kernel = only(kernels(F.linear, torch.randn(3, 5, 32), dynamic=("b", "s"), w=torch.randn(96, 32)))
    for b, s in ((1, 1), (7, 13)):
        assert at(kernel.flops, b=b, s=s) == 2 * b * s * 96 * 32
        assert at(kernel.bytes, b=b, s=s) == 4 * (b * s * (32 + 96) + 96 * 32)
    assert kernel.weight_bytes == 4 * 96 * 32


def attend(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(q, k, k, is_causal=causal)


def test_attention_counts_both_products_and_the_softmax() -> None:
    q, k = torch.randn(2, 3, 10, 16), torch.randn(2, 3, 20, 16)
    whole = kernels(attend, q, k)["attention"]
    products = 4 * 2 * 3 * 10 * 20 * 16
    assert whole.rule == "fused-attention" and products < at(whole.flops) < 1.6 * products
    assert whole.bytes == 4 * (2 * q.numel() + k.numel()) and whole.configuration["mask"] == "none"
    causal = kernels(lambda q, k: attend(q, k, True), q, k)["attention"]
    assert at(causal.flops) * 10 * 20 == at(whole.flops) * sum(range(1, 11))
    assert causal.configuration["mask"] == "causal"


def test_causal_attention_over_sizes_known_at_run_time() -> None:
    q = torch.randn(2, 3, 10, 16)
    shapes = {"x": {2: "s"}}
    program = capture(Function(lambda q: attend(q, q, True)), (q,), dynamic_shapes=shapes)
    flops = lowered(program)["attention"].flops
    assert at(flops, s=1) * 28 == at(flops, s=7)


def test_element_wise_kernels_read_each_operand_once_and_write_once() -> None:
    x = torch.randn(6, 50)
    kernel = only(kernels(lambda x, y: (x + y) * x - 1, x, x))
    assert (kernel.flops, kernel.bytes) == (3 * 300, 3 * 4 * 300)
    row = only(kernels(lambda x, w: x * w, x, w=torch.randn(50)))
    assert (row.flops, row.bytes, row.weight_bytes) == (300, 4 * (2 * 300 + 50), 4 * 50)
    assert only(kernels(lambda x, y: x > y, x, x)).bytes == (4 + 4 + 1) * 300
    gelu = only(kernels(F.gelu, x))
    assert 20 * 300 < at(gelu.flops) < 50 * 300  # the polynomial as it is computed


def test_a_gather_reads_what_it_writes_and_a_slice_its_part() -> None:
    table = torch.randn(1000, 8)
    ids = torch.tensor([[1, 2, 3]])
    gathered = only(kernels(lambda ids, table: table[ids], ids, table=table))
    assert gathered.bytes == 3 * 8 + 2 * 4 * 24 and gathered.weight_bytes == 4 * 24 and gathered.flops == 0
    part = only(kernels(lambda x: x[:, 10:14] + 1, torch.randn(6, 50)))
    assert part.bytes == 4 * (2 * 24)


def test_reductions() -> None:
    x = torch.randn(4, 6, 50)
    assert only(kernels(lambda x: x.sum(-1), x)).flops == x.numel()
    assert only(kernels(lambda x: x.amax(1), x)).flops == x.numel()
    assert only(kernels(lambda x: x.int().amax(1), x)).flops == 0
    product = only(kernels(torch.matmul, x, torch.randn(4, 50, 7)))
    assert product.rule == "batched-gemm" and product.flops == 2 * 4 * 6 * 50 * 7
    softmax = only(kernels(lambda x: x.softmax(-1), x))
    assert 4 * x.numel() < at(softmax.flops) < 40 * x.numel() and softmax.bytes == 8 * x.numel()
    assert only(kernels(lambda x: F.layer_norm(x, (50,)), x)).flops == 6 * x.numel()


def test_equal_kernels_for_different_sizes_are_two_that_say_so() -> None:
    x, y = torch.randn(3, 8), torch.randn(5, 8)
    shapes = {"x": {0: "one"}, "y": {0: "two"}}
    program = capture(Function(lambda x, y: (x.relu(), y.relu())), (x, y), dynamic_shapes=shapes)
    assert {kernel.bytes for kernel in lowered(program).values()} == {"64*one", "64*two"}
    same = capture(Function(lambda x, y: (x.relu(), y.relu())), (x, x), dynamic_shapes=None)
    assert only(lowered(same)).nodes == {"main": ("relu", "relu_1")}


def test_nodes_are_kept_by_entry() -> None:
    program = optimize(models.program("mlp"), "O2").program
    found = lowered({"first": program, "second": program.copy()})
    assert found and all(kernel.nodes["first"] == kernel.nodes["second"] for kernel in found.values())


WITHOUT_A_KERNEL = frozenset(views.TABLE)  # memory read in another way
CONSTANTS = frozenset({torch.ops.aten.arange.start_step, torch.ops.aten.arange.default, torch.ops.aten.full.default})


def is_read(node: torch.fx.Node) -> bool:
    """Not only asked for its size."""
    return any(isinstance(user.meta.get("val"), (Tensor, tuple, list)) or user.op == "output" for user in node.users)


@pytest.mark.parametrize("name", ["bert", "conv_net", "branching", "tied"])
def test_every_computing_node_is_in_a_kernel(name: str) -> None:
    """In one, except where a node takes several kernels or every reader computes it anew."""
    program = optimize(models.program(name), "O2").program
    counts = Counter(node for kernel in lowered(program).values() for node in kernel.nodes["main"])
    nodes = {
        f"{path}.{node.name}" if path else node.name: node
        for path, module in program.graphs()
        for node in module.graph.nodes
        if node.op == "call_function" and node.target is not torch.ops.higher_order.cond
    }
    assert not set(counts) - set(nodes)
    computing = {
        label
        for label, node in nodes.items()
        if isinstance(node.meta["val"], Tensor) and node.target not in WITHOUT_A_KERNEL and is_read(node)
    }
    assert not computing - set(counts)
    several = {label for label in computing if counts[label] > 1 and nodes[label].target not in CONSTANTS}
    assert all("conv" in label or "mean" in label or "sum" in label for label in several)


def test_work_that_no_expression_says_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.backends import kernel_report
    from graphopt.errors import CaptureError

    def refuse(*_: Any) -> int:
        raise CaptureError("no")

    monkeypatch.setattr(kernel_report, "expression_text", refuse)
    kernel = only(kernels(torch.relu, torch.randn(3, 8)))
    assert (kernel.flops, kernel.bytes, kernel.weight_bytes) == (None, None, None)
