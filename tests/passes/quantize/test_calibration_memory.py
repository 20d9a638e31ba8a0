"""Calibrating on ten thousand samples takes no more memory than on a hundred, wherever they come from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WIDTH = 4096  # a sample is 16 KiB, ten thousand of them are 160 MiB
FEW, MANY = 100, 10_000
MOST = 12 << 20  # bytes more for MANY; a digest, or the place of its rows, is kept for each feed

CHILD = """
import sys
from collections.abc import Iterator

import torch

import graphopt
from graphopt.tools.benchmarking.usage import peak_memory


class Made:
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(int(sys.argv[2])):
            yield {"input": torch.randn(1, %d, generator=generator)}


example = (torch.zeros(2, %d),)
layers = torch.nn.Sequential(torch.nn.Linear(%d, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8)).eval()
program = graphopt.capture(layers, example, dynamic_shapes={"input": {0: "batch"}})
data = Made() if sys.argv[1] == "iterable" else sys.argv[1]
result = graphopt.optimize(program, f"quantize{{calibration={sys.argv[3]}}}", data=data, verify="off")
assert result.report.passes[0].rewrites
print(peak_memory())
""".replace("%d", str(WIDTH))


def peak(source: str, count: int, calibration: str) -> int:
    """Bytes that a process of its own had resident at most."""
    words = [sys.executable, "-c", CHILD, source, str(count), calibration]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def write(folder: Path, count: int, files: int) -> str:
    """So many samples in so many files, compressed: they are the same row again and again."""
    row = np.random.default_rng(0).standard_normal((1, WIDTH), np.float32)
    folder.mkdir()
    for number in range(files):
        np.savez_compressed(folder / f"{number:02}.npz", input=np.repeat(row, count // files, 0))
    return str(folder if files > 1 else folder / "00.npz")


@pytest.mark.slow
@pytest.mark.parametrize(("source", "calibration"), [("iterable", "mse"), ("file", "minmax"), ("folder", "mse")])
def test_memory_does_not_grow_with_the_samples(source: str, calibration: str, tmp_path: Path) -> None:
    found = []
    for count in (FEW, MANY):
        where = source
        if source != "iterable":
            where = write(tmp_path / str(count), count, 10 if source == "folder" else 1)
        found.append(peak(where, count, calibration))
    assert found[1] - found[0] < MOST, found
