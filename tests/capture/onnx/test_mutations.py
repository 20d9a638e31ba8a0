"""Files with something wrong in them: each is a program or one sentence of our own, never anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.capture import capture
from tests.capture.onnx.mutations import outcome, sound

pytestmark = pytest.mark.filterwarnings("ignore::graphopt.errors.CaptureWarning")  # of sizes that mutations fix

# Once ended in other errors: a null character in a path, 2^62 rows, an axis of 2^40, an If without a branch, bytes that
# are no text as an operator and as a name, a Reshape that fixes a size over 2^63.
FOUND = (12, 81, 359, 888, 1386, 1694, 2692)


def test_the_sound_file_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "sound.onnx"
    path.write_bytes(sound().SerializeToString())
    program = capture(path)
    assert [spec.shape for spec in program.outputs] == [("n", 3, 2), ("n", 2), (1, 3, 4, 4)]


def test_mutated_files(tmp_path: Path) -> None:
    said = [outcome(seed, tmp_path / "m.onnx", quick=seed not in FOUND and seed > 9) for seed in (*FOUND, *range(40))]
    assert "imported" not in said[: len(FOUND)] and said.count("imported") < 20


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(3))
def test_many_mutated_files(chunk: int, tmp_path: Path) -> None:
    """With all kinds of mutations; `python -m tests.capture.onnx.mutations 10000` reads the rest."""
    for seed in range(2000 + 500 * chunk, 2500 + 500 * chunk):
        try:
            outcome(seed, tmp_path / "m.onnx", quick=True)
        except Exception as error:
            raise AssertionError(f"seed {seed} ends in {type(error).__name__}: {error}") from error
