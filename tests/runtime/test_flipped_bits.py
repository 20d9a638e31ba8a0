"""Of 1,000 changed bits none crashes the process or changes an answer; two builds give the same bytes."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = """import sys, graphopt
from tests.models import program
graphopt.compile(program("conv_net"), sys.argv[2], threads=2).save(sys.argv[1])"""


def build(path: Path, target: str = "cpu:x86-64-v3") -> bytes:
    """In a process of its own, so that no order of hashes or addresses is shared."""
    done = subprocess.run([sys.executable, "-c", BUILD, path, target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path.read_bytes()


@pytest.mark.slow
def test_a_changed_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    build(tmp_path / "model.gopt", "cpu")
    found: Counter[str] = Counter()
    for first in range(0, 1000, 250):
        command = [sys.executable, "-m", "tests.runtime.flip_bits", str(tmp_path / "model.gopt"), str(first), "250"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        assert not [bit for word, bit in lines if word == "changed"]
        found.update(word for word, _ in lines)
    assert sum(found.values()) == 1000 and found["refused"] > 500


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu:x86-64-v3,cpu:x86-64-v4,cpu:sapphirerapids", "cpu:cortex-a78ae"])
def test_two_builds_give_the_same_bytes(target: str, tmp_path: Path) -> None:
    assert build(tmp_path / "a.gopt", target) == build(tmp_path / "b.gopt", target)
