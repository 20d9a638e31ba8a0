"""What holds for every kernel: threads do not change results, denormals are cheap, builds repeat, fusion counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.backends import cpu
from graphopt.backends.target import resolve_target
from graphopt.capture import capture
from graphopt.compile import compile
from graphopt.optimize import optimize
from tests import models


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    program = optimize(models.program("bert"), "O2").program
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, program.examples, strict=True)}
    artifact = compile(program)
    results = [artifact.session(threads=threads).run(None, feed) for threads in (1, 2)]
    assert all(np.array_equal(one, two) for one, two in zip(*results, strict=True))
    single = compile(program, threads=1).session().run(None, feed)
    assert all(np.array_equal(one, two) for one, two in zip(single, results[0], strict=True))


def test_equal_programs_give_equal_libraries() -> None:
    target = resolve_target("cpu")
    program = models.program("mlp")
    builds = [cpu.build(cpu.lower({"main": program}, target).module, target) for _ in range(2)]
    assert builds[0] == builds[1]


PRINT_HASH = """
import hashlib, torch
from graphopt.backends import cpu
from graphopt.backends.target import resolve_target
from graphopt.capture import capture
torch.manual_seed(0)
module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4), torch.nn.Softmax(1))
program = capture(module, (torch.randn(2, 3, 8),), dynamic_shapes={"input": {0: "b", 1: "s"}})
target = resolve_target("cpu", threads=2)
print(hashlib.sha256(cpu.build(cpu.lower({"main": program}, target).module, target)).hexdigest())
"""


@pytest.mark.slow
def test_processes_build_the_same_bytes_for_sizes_known_at_run_time() -> None:
    root = Path(__file__).parents[2]
    runs = [subprocess.run([sys.executable, "-c", PRINT_HASH], cwd=root, capture_output=True, text=True) for _ in "123"]
    assert [run.returncode for run in runs] == [0, 0, 0], runs[0].stderr
    assert len({run.stdout for run in runs}) == 1


class Tiny(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5


def test_denormals_are_zero_inside_a_run_and_untouched_outside() -> None:
    session = compile(capture(Tiny(), (torch.randn(64),))).session()
    tiny = np.full(64, 1e-39, np.float32)
    assert not session.run(None, {"x": tiny})[0].any()
    assert (tiny * np.float32(0.5)).all()
    assert (torch.from_numpy(tiny) * 0.5).all()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_denormals_are_zero_on_all_threads() -> None:
    shape = 64, 1 << 14  # rows for more than one thread
    session = compile(capture(Tiny(), (torch.zeros(shape),)), threads=2).session(threads=2)
    for _ in range(2):
        assert not session.run(None, {"x": np.full(shape, 1e-39, np.float32)})[0].any()


def kernels(module: nn.Module, *inputs: torch.Tensor) -> dict[str, str]:
    program = optimize(capture(module, inputs), "O2").program
    lowered = cpu.lower({"main": program}, resolve_target("cpu"))
    return {name: kernel.rule for name, kernel in lowered.kernels.items()}


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(32, 96), nn.Linear(96, 32), nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(nn.functional.gelu(self.up(x))))


def test_only_inputs_are_checked_on_every_call() -> None:
    module = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    program = capture(module, (torch.ones(2, 4),))
    target = resolve_target("cpu")
    with cpu.native_target(target):
        code = cpu.finalize()(cpu.lower({"main": program}, target).module)["main"].script()
    assert [code.count(name) for name in ("check_tensor_info", "match_shape")] == [1, 1]


def test_bias_activation_and_residual_live_in_the_product() -> None:
    found = kernels(FeedForward(), torch.randn(2, 5, 32))
    assert sorted(found.values()) == ["packed-gemm", "packed-gemm", "row-reduction"]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = FeedForward(), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.left(x), lambda x: torch.relu(self.right(x)), (x,))


def test_both_sides_of_a_condition_are_fused() -> None:
    found = kernels(Branches(), torch.randn(2, 5, 32))
    assert sorted(found.values()).count("packed-gemm") == 3
    assert len(found) <= 6  # four in the branches, the sum and the comparison outside


def test_entries_may_have_the_names_of_kernels() -> None:
    program = capture(nn.Softmax(-1), (torch.randn(3, 5),))
    artifact = compile({"softmax": program, "copy": program.copy(), "main": program.copy()})
    session = artifact.session()
    results = [session.run(None, {"input": np.zeros((3, 5), np.float32)}, entry=name)[0] for name in session.entries]
    assert all(np.allclose(result, 0.2) for result in results) and "softmax" not in artifact.report["kernels"]


def test_a_weight_used_twice_is_stored_once() -> None:
    program = optimize(models.program("tied"), "O2").program
    module = cpu.lower({"first": program, "second": program.copy()}, resolve_target("cpu"))
    assert module.arguments["first"] == module.arguments["second"]
    assert len(module.weights) == len(set(module.arguments["first"]))
