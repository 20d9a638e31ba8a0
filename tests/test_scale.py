"""Work is linear in nodes: counted in function calls, which do not depend on the machine.

`python -m pytest -m slow -k scale -s` prints processor seconds too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from graphopt import capture, optimize
from graphopt.program import Program, TensorSpec

aten = torch.ops.aten
WIDTH = 4


class Growing:
    """A graph on [2, WIDTH] that grows call by call, each with its fake value."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self.graph = Graph()
        self.root = nn.Module()
        self.x = self.graph.placeholder("x")
        with self.mode:
            self.x.meta["val"] = torch.empty(2, WIDTH)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        values, named = map_arg((args, kwargs), lambda argument: argument.meta["val"])
        with self.mode:
            node.meta["val"] = target(*values, **named)
        return node

    def weight(self, *shape: int) -> Node:
        name = f"weight_{len(self.root._buffers)}"
        value = torch.linspace(0.2, 0.7, max(1, torch.Size(shape).numel())).reshape(shape)
        self.root.register_buffer(name, value)
        node = self.graph.get_attr(name)
        node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        return node

    def program(self, result: Node) -> Program:
        self.graph.output((result,)).meta["val"] = (result.meta["val"],)
        shape = tuple(result.meta["val"].shape)
        specs = (TensorSpec("x", torch.float32, (2, WIDTH)),), (TensorSpec("output", torch.float32, shape),)
        return Program(GraphModule(self.root, self.graph, "Model"), *specs, examples=(torch.ones(2, WIDTH),))


Body = Callable[[Growing, Node, int], Node]


def residual(g: Growing, x: Node, index: int) -> Node:
    y = g.call(aten.layer_norm.default, x, [WIDTH], g.weight(WIDTH), g.weight(WIDTH))
    y = g.call(aten.relu.default, g.call(aten.linear.default, y, g.weight(WIDTH, WIDTH), g.weight(WIDTH)))
    return g.call(aten.add.Tensor, x, g.call(aten.linear.default, y, g.weight(WIDTH, WIDTH), g.weight(WIDTH)))


def rewritten(g: Growing, x: Node, index: int) -> Node:
    """Every pass of O2 finds something here."""
    y = g.call(aten.linear.default, g.call(aten.mul.Tensor, x, 0.5), g.weight(WIDTH, WIDTH), g.weight(WIDTH))
    folded = g.call(aten.mul.Tensor, g.weight(WIDTH, WIDTH), 2.0)
    y = g.call(aten.linear.default, y, folded, g.weight(WIDTH))
    statistics = [g.weight(WIDTH) for _ in range(4)]
    y = g.call(aten.batch_norm.default, y, *statistics, False, 0.1, 1e-5, True)
    first, again = g.call(aten.relu.default, y), g.call(aten.relu.default, y)
    same = g.call(aten.clone.default, first)
    left, right = (g.call(aten.linear.default, same, g.weight(WIDTH, WIDTH), g.weight(WIDTH)) for _ in range(2))
    y = g.call(aten.add.Tensor, g.call(aten.add.Tensor, left, right), again)
    g.call(aten.sigmoid.default, y)
    return g.call(aten.layer_norm.default, y, [WIDTH])


def views(g: Growing, x: Node, index: int) -> Node:
    """One chain of views, each of them made twice."""
    shape = [WIDTH, 2] if index % 2 == 0 else [2, WIDTH]
    first, again = (g.call(aten.view.default, x, shape) for _ in range(2))
    return g.call(aten.add.Tensor, first, again) if index % 50 == 0 else first


def chain(body: Body, count: int) -> Program:
    g = Growing()
    x = g.x
    index = 0
    while len(g.graph.nodes) < count:
        x = body(g, x, index)
        index += 1
    return g.program(x)


def fan(count: int) -> Program:
    """Equal views of the input, and no-ops on it, that meet in a tree of sums."""
    g = Growing()
    values: list[Node] = []
    while len(g.graph.nodes) < count // 2:
        view = g.call(aten.view.default, g.x, [2, WIDTH])
        values.append(g.call(aten.mul.Tensor, g.call(aten.view.default, view, [WIDTH, 2]), float(len(values))))
    while len(values) > 1:
        values = [g.call(aten.add.Tensor, *values[i : i + 2]) for i in range(0, len(values) - 1, 2)]
    return g.program(values[0])


PROGRAMS: dict[str, Callable[[int], Program]] = {
    "residual": lambda count: chain(residual, count),
    "rewritten": lambda count: chain(rewritten, count),
    "views": lambda count: chain(views, count),
    "fan": fan,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.inner(self.norm(x)))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other over tensors of 8 numbers would be most of the time printed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def calls_in(work: Callable[[], object], label: str) -> int:
    """How many functions, of Python and of C, `work` calls."""
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    start = time.process_time()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    print(f"{label}: {count} calls, {time.process_time() - start:.1f} s while counted")
    return count


def check_linear(small: int, large: int, factor: int) -> None:
    """`large` is for `factor` times the nodes of `small`; a quarter more is allowed, as 5 times for 4 times is."""
    assert large <= 1.25 * factor * small


@pytest.mark.parametrize("name", PROGRAMS)
def test_passes_are_linear(name: str) -> None:
    optimize(PROGRAMS[name](50), "O2")  # what is only done once in a process
    factor = 8 if name in ("views", "fan") else 4
    programs = [PROGRAMS[name](count) for count in (400, 400 * factor)]
    small, large = (calls_in(lambda p=p: optimize(p, "O2"), name) for p in programs)  # type: ignore[misc]
    check_linear(small, large, factor)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_passes_are_linear_at_scale(name: str) -> None:
    programs = [PROGRAMS[name](count) for count in (10_000, 40_000)]
    for program in programs:
        start = time.process_time()
        result = optimize(program, "O2")
        counts = result.report.nodes_before, result.report.nodes_after
        print(f"{name}: {len(list(program.nodes()))} nodes, {counts}, {time.process_time() - start:.1f} s")
    small, large = (calls_in(lambda p=p: optimize(p, "O2"), name) for p in programs)  # type: ignore[misc]
    check_linear(small, large, 4)


@pytest.mark.slow
def test_import_is_linear_at_scale(tmp_path: Path) -> None:
    x = (torch.ones(2, WIDTH),)
    counts: dict[str, list[int]] = {"module": [], ".pt2": []}
    capture(nn.Sequential(Block()), x).save(str(tmp_path / "0.pt2"))
    capture(tmp_path / "0.pt2")
    for blocks in (150, 600):
        module, path = nn.Sequential(*(Block() for _ in range(blocks))), tmp_path / f"{blocks}.pt2"
        capture(module, x).save(str(path))
        counts["module"].append(calls_in(lambda m=module: capture(m, x), f"{blocks} blocks"))  # type: ignore[misc]
        counts[".pt2"].append(calls_in(lambda p=path: capture(p), f"{blocks} blocks as .pt2"))  # type: ignore[misc]
    for small, large in counts.values():
        check_linear(small, large, 4)
