"""The emulator of AMX, built once for the tests of all its kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backends.amx_runs import build_emulator


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_emulator(tmp_path_factory.mktemp("amx"))
