"""Files with something wrong in them: each is a program or one sentence of our own, never anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.capture import capture
from graphopt.errors import GraphoptError
from tests.capture.onnx.mutations import mutated, sound

# Once ended in other errors: a null character in a path, 2^62 rows, an axis of 2^40, an If without a branch, bytes that
# are no text as an operator and as a name.
FOUND = (12, 81, 359, 888, 1386, 1694)


def test_the_sound_file_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "sound.onnx"
    path.write_bytes(sound().SerializeToString())
    program = capture(path)
    assert [spec.shape for spec in program.outputs] == [("n", 3, 2), ("n", 2), (1, 3, 4, 4)]


def check(seed: int, folder: Path) -> bool:
    """Whether the file of this seed is refused."""
    path = folder / "mutated.onnx"
    path.write_bytes(mutated(seed))
    try:
        capture(path)
    except GraphoptError as error:
        assert str(error).strip()
        return True
    return False


def test_mutated_files(tmp_path: Path) -> None:
    refused = [check(seed, tmp_path) for seed in (*FOUND, *range(60))]
    assert all(refused[: len(FOUND)]) and sum(refused) > 40


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(4))
def test_thousands_of_mutated_files(chunk: int, tmp_path: Path) -> None:
    for seed in range(1000 * chunk, 1000 * (chunk + 1)):
        try:
            check(seed, tmp_path)
        except Exception as error:
            raise AssertionError(f"seed {seed} ends in {type(error).__name__}: {error}") from error
