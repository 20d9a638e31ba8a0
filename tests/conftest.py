"""What every test starts from: the same random numbers, no more threads than the machine has for this worker, and a
cache of its own: nothing depends on what a developer has tuned."""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

SLOW_UNTIL = float(os.environ.get("GRAPHOPT_SLOW_UNTIL", "inf"))  # seconds since 1970; no slow test begins later
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("MPLCONFIGDIR", str(_cache / "matplotlib"))  # what others keep takes long to make again
os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(_cache / "zig"))
_own = tempfile.TemporaryDirectory(prefix="graphopt-cache-")  # lives as long as this process
os.environ["XDG_CACHE_HOME"] = _own.name
torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // WORKERS))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slow") and time.time() > SLOW_UNTIL:
        pytest.skip("no time is left for slow tests")


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
