"""What every test starts from: the same random numbers, and no more threads than the machine has for this worker."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // WORKERS))


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
