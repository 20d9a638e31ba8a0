"""Tuning whole models on made-up times: what is found is used, kept, and found again byte for byte."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.backends import target as targets
from graphopt.backends.tuner.store import NAME, Store
from graphopt.errors import UsageError
from graphopt.program import Program
from graphopt.runtime import features
from graphopt.tuning import find_tasks, points_of, tune
from tests import models
from tests.fake_device import SECONDS, FakeMeasurer, install

compiling = importlib.import_module("graphopt.compile")


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> type[FakeMeasurer]:
    return install(monkeypatch)


def saved(program: Program, path: Path, **options: Any) -> bytes:
    graphopt.compile(program, **options).save(path)
    return path.read_bytes()


def test_what_was_found_is_used_and_gives_the_same_bytes(tmp_path: Path, device: type[FakeMeasurer]) -> None:
    program, store = models.program("mlp"), tmp_path / "store"
    outcome = tune(program, seconds=SECONDS, database=store)
    assert outcome.rows and not outcome.failures and all(row.tried == row.space > 1 for row in outcome.rows)
    assert sum(row.share for row in outcome.rows) <= 1.0001
    gained = {kernel for row in outcome.rows if row.seconds != row.default_seconds for kernel in row.kernels}
    artifact = graphopt.compile(program, database=store)
    assert set(artifact.report["tuned"]) == gained != set() and not artifact.report["notes"]

    one, two = (saved(program, tmp_path / f"{n}.gopt", database=store) for n in (1, 2))
    untuned = saved(program, tmp_path / "untuned.gopt", database=Store.empty())
    assert one == two != untuned
    before = device.races
    assert saved(program, tmp_path / "again.gopt", database=store, tune=SECONDS) == one
    assert device.races == before  # nothing was left to try


def test_the_same_seed_finds_the_same(tmp_path: Path) -> None:
    program = models.program("mlp")
    stores = [Store.empty() for _ in range(2)]
    for store in stores:
        tune(program, seconds=SECONDS, database=store, seed=3)
    one, two = ([(r.workload, dict(r.configuration), r.seconds) for r in store.records()] for store in stores)
    assert one == two and one
    assert saved(program, tmp_path / "a.gopt", database=stores[0]) == saved(
        program, tmp_path / "b.gopt", database=stores[1]
    )


def test_compile_tunes_first(tmp_path: Path) -> None:
    artifact = graphopt.compile(models.program("conv_net"), tune=SECONDS, database=tmp_path / "store")
    assert artifact.report["tuned"] and (tmp_path / "store" / NAME).exists()


def test_the_users_store_is_read_and_an_empty_one_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = models.program("mlp")
    graphopt.compile(program)
    assert not list(tmp_path.iterdir())
    tune(program, seconds=SECONDS)
    assert (tmp_path / "graphopt" / "tuning" / NAME).exists()
    assert graphopt.compile(program).report["tuned"]
    assert not graphopt.compile(program, database=Store.empty()).report["tuned"]


def test_records_for_other_threads_are_not_used(tmp_path: Path) -> None:
    program = models.program("mlp")
    tune(program, seconds=SECONDS, database=tmp_path, threads=1)
    assert graphopt.compile(program, database=tmp_path, threads=1).report["tuned"]
    assert not graphopt.compile(program, database=tmp_path, threads=2).report["tuned"]


def test_a_configuration_of_another_version_is_ignored_and_noted(tmp_path: Path) -> None:
    program, store, other = models.program("mlp"), Store(tmp_path / "a"), Store(tmp_path / "b")
    tune(program, seconds=SECONDS, database=store)
    for record in store.records():
        changed = {name: 1000 if name == "rows" else value for name, value in record.configuration.items()}
        other.append(type(record)(**{**vars(record), "configuration": changed, "seconds": 1e-9}))
    artifact = graphopt.compile(program, database=other)
    assert not artifact.report["tuned"]
    assert artifact.report["notes"] and all(
        "ignored a tuned configuration" in note for note in artifact.report["notes"]
    )


def test_ctrl_c_keeps_what_was_found(tmp_path: Path, device: type[FakeMeasurer]) -> None:
    program = models.program("mlp")
    count = len(tune(program, seconds=SECONDS, database=Store.empty()).rows)
    device.interrupted_after = 2 * device.races  # at the last race of the last workload
    with pytest.raises(KeyboardInterrupt):
        tune(program, seconds=SECONDS, database=tmp_path)
    kept = len(Store(tmp_path).records())
    assert 0 < kept < count
    device.interrupted_after = None
    outcome = tune(program, seconds=SECONDS, database=tmp_path)
    assert [row.new for row in outcome.rows].count(False) == kept


def test_measurements_of_optimize_use_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []
    original = compiling.compile

    def compile(*arguments: Any, database: Any = None, **options: Any) -> Any:
        used.append(database)
        return original(*arguments, database=database, **options)

    monkeypatch.setattr(compiling, "compile", compile)
    program = models.program("conv_net")
    graphopt.optimize(program, "batch-norm-folding", keep_if_faster=True, database=tmp_path)
    assert len(used) >= 2 and set(used) == {tmp_path}


@pytest.mark.parametrize("seconds", [0, -1.0, True, "60", float("nan"), float("inf")])
def test_seconds_that_are_none(seconds: Any) -> None:
    with pytest.raises(UsageError, match="give a number above 0"):
        graphopt.compile(models.program("mlp"), tune=seconds)


def test_what_cannot_be_tuned_here(monkeypatch: pytest.MonkeyPatch) -> None:
    program = models.program("mlp")
    with pytest.raises(UsageError, match=r"seed=-1 is none"):
        tune(program, seconds=1, seed=-1)
    with pytest.raises(UsageError, match=r"database=3 is no store"):
        graphopt.compile(program, database=3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"database=3 is no store"):
        graphopt.optimize(program, "O1", database=3)  # type: ignore[arg-type]
    threads = len(os.sched_getaffinity(0)) + 1
    with pytest.raises(UsageError, match=f"threads is {threads} and this process may use"):
        tune(program, seconds=1, threads=threads)
    for module in (targets, features):
        monkeypatch.setattr(module, "host_features", lambda: frozenset({"x86_64"}))
    with pytest.raises(UsageError, match=r"nothing can be measured for cpu:x86-64-v4 here: this machine lacks avx"):
        tune(program, "cpu:x86-64-v4", seconds=1)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.second(self.first(x)))


def test_equal_workloads_are_one_task_with_the_share_of_both() -> None:
    program = graphopt.capture(Pair().eval(), (torch.randn(6, 8),), dynamic_shapes={"x": {0: "rows"}})
    compilation = compiling.prepare({"a": program, "b": program.copy()}, "cpu", 1)
    module = compilation.lower(Store.empty())
    seconds = {name: 3.0 if "gemm_8x8" in name else 1.0 for name in module.kernels}
    tasks = {task.kernels[0]: task for task in find_tasks(module, seconds, compilation.functions)}
    assert {name: round(task.share, 2) for name, task in tasks.items()} == {"gemm_8x8": 0.75, "gemm_4x8": 0.25}
    assert [list(point.values()) for point in tasks["gemm_8x8"].piece.points] == [[6], [1], [24]]


def test_open_sizes_are_measured_at_the_example_the_least_and_some_times_the_example() -> None:
    rows = torch.export.Dim("rows", min=2, max=9)
    program = graphopt.capture(Pair().eval(), (torch.randn(3, 8),), dynamic_shapes={"x": {0: rows}})
    assert [list(point.values()) for point in points_of(program)] == [[3], [2], [9]]
    assert points_of(models.program("mlp").copy())[0] is not None
