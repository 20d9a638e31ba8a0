"""Each rewrite on each kind of target: what the table in the guide says of it is what compiling gives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import graphopt
from graphopt.arrays import array_of
from graphopt.errors import CompileError
from graphopt.program import Program
from tests import models
from tests.emulation import CPUS, Runner, arm_runner, wheels_for_arm
from tests.rewrites import REWRITES

TABLE = Path(__file__).parents[1] / "docs" / "targets.md"
X86 = ("cpu:x86-64-v3", "cpu:x86-64-v4", "cpu:sapphirerapids")
GPU = "cuda:sm_87"
SAME = 1e-5  # float32 sums in another order, of values around 1


def cells() -> Iterator[tuple[str, str, str]]:
    """Rewrite, target and what the table says."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    header, *rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    assert header[0] == "rewrite", header
    for name, *words in (row for row in rows if row[0] in REWRITES):
        for targets, word in zip(header[1:], words, strict=True):
            yield from ((name, target, word) for target in re.findall(r"[\w:.-]+", targets))


@cache
def rewritten(name: str) -> Program:
    return REWRITES[name]()


def kind(program: Program, target: str, path: Path) -> str:
    """What became of it; the artifact lies at `path` unless it was refused."""
    try:
        artifact = graphopt.compile(program, target, threads=None if target == GPU else 2)  # and checks it here
    except CompileError:
        return "refused"
    artifact.save(path)
    return "generic kernel" if artifact.report["slow"] else "native kernel"


def test_the_table_has_every_rewrite_and_target() -> None:
    found = {(name, target) for name, target, _ in cells()}
    assert found >= {(name, target) for name in REWRITES for target in (*X86, *CPUS, GPU)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target", "word"), [cell for cell in cells() if cell[1] in (*X86, GPU)])
def test_on_x86_and_for_a_gpu(name: str, target: str, word: str, tmp_path: Path) -> None:
    assert kind(rewritten(name), target, tmp_path / "model.gopt") == word


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runner:
    folder = tmp_path_factory.mktemp("arm")
    graphopt.compile(rewritten("block-folding"), "cpu:aarch64", threads=2).save(folder / "model.gopt")
    wheels = wheels_for_arm(Path(request.config.cache.mkdir("aarch64-wheels")))
    return arm_runner(folder / "model.gopt", wheels, folder / "shipped")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target", "word"), [cell for cell in cells() if cell[1] in CPUS])
def test_on_arm(arm: Runner, name: str, target: str, word: str, tmp_path: Path) -> None:
    """Run by the C++ program in an emulator of a CPU that has no more than the target needs."""
    program = rewritten(name)
    assert kind(program, target, tmp_path / "model.gopt") == word
    feed = {spec.name: array_of(value) for spec, value in zip(program.inputs, program.examples, strict=True)}
    found = arm(tmp_path / "model.gopt", feed, tmp_path, CPUS[target])
    for spec, expected in zip(program.outputs, program(*program.examples), strict=True):
        assert close(found[spec.name], array_of(expected.detach().contiguous()), name)


@pytest.mark.slow
def test_minilm_on_arm(arm: Runner, tmp_path: Path) -> None:
    """A whole model with its own weights, on few tokens of one sentence."""
    program = graphopt.optimize(models.program("minilm"), "O2", target="cpu:cortex-a78ae").program
    graphopt.compile(program, "cpu:cortex-a78ae", threads=2).save(tmp_path / "model.gopt")
    values = [value[:1, :5] for value in program.examples]
    feed = {spec.name: array_of(value.contiguous()) for spec, value in zip(program.inputs, values, strict=True)}
    (expected,) = program(*values)
    (found,) = arm(tmp_path / "model.gopt", feed, tmp_path, CPUS["cpu:cortex-a78ae"]).values()
    assert close(found, array_of(expected.detach().contiguous()), "minilm")


def close(found: np.ndarray, expected: np.ndarray, name: str) -> bool:
    """To the rounding of float32; codes may differ where a number lies close to a half."""
    assert found.shape == expected.shape
    allowed = 0.05 if name == "qdq-fusion" else SAME
    return bool(np.abs(found.astype(np.float64) - expected).max() <= allowed * max(1.0, float(np.abs(expected).max())))
