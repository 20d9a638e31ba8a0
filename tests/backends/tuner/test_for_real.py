"""`graphopt tune` with a compiler, children and a clock: minutes on a machine that others use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import graphopt
from graphopt.backends.tuner.store import NAME, Store
from graphopt.tuning import tune
from tests import models

ROOT = Path(__file__).parents[3]
MODEL = "tests.tools.tiny_models:two_products"
PATIENCE = 600.0  # seconds

pytestmark = pytest.mark.slow


def test_a_tuned_network_computes_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile` compares it with PyTorch; a small space is tried to its end, however slow the machine is."""
    monkeypatch.setattr("graphopt.backends.choice.MOST_CANDIDATES", 9)
    program = models.program("conv_net")
    outcome = tune(program, seconds=PATIENCE, database=tmp_path)
    measured = [row for row in outcome.rows if row.seconds is not None]
    assert len(measured) == len(outcome.rows) > 1 and not outcome.failures
    assert all(row.tried == row.space for row in outcome.rows)
    assert all(row.default_seconds and row.seconds and row.seconds <= row.default_seconds for row in measured)
    tuned, plain = (graphopt.compile(program, database=each).session() for each in (tmp_path, Store.empty()))
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, program.examples, strict=True)}
    for one, other in zip(tuned.run(None, feed), plain.run(None, feed), strict=True):
        assert np.allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def children_of(process: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process and fields[0] != "Z":
            found.add(int(stat.parent.name))
    return found


def test_ctrl_c_ends_everything_and_keeps_what_was_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = [sys.executable, "-m", "graphopt", "tune", MODEL, "--budget", "1000", "--store", "s"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as done:
        try:
            end = time.monotonic() + PATIENCE
            while not (tmp_path / "s" / NAME).exists():
                assert time.monotonic() < end and done.poll() is None
                time.sleep(0.1)
            children = children_of(done.pid)
            assert children
            done.send_signal(signal.SIGINT)
            _, error = done.communicate(timeout=PATIENCE)
        finally:
            done.kill()
    assert done.returncode == 130 and error.splitlines()[-2:] == [
        f"graphopt: what was found so far is in {tmp_path / 's'}",
        "graphopt: interrupted",
    ]
    assert not {process for process in children if Path(f"/proc/{process}").exists()}
    assert Store(tmp_path / "s").records()
