"""Open and run copies of an artifact with one bit changed each: `python -m tests.runtime.flip_bits A.gopt FIRST COUNT`.

A line a copy: "refused", "same", or "changed" with the bit; nothing where the process ends.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.runtime.session import InferenceSession


def positions(size: int) -> list[int]:
    """The bits of a file of `size` bytes in a fixed order that looks random."""
    generator = random.Random(0)
    return [generator.randrange(8 * size) for _ in range(1000)]


def outcome(path: Path, expected: dict[str, np.ndarray], feed: dict[str, np.ndarray]) -> str:
    try:
        found = InferenceSession(path, threads=1).run(list(expected), feed)
    except GraphoptError:
        return "refused"
    same = all(np.array_equal(a, b) for a, b in zip(found, expected.values(), strict=True))
    return "same" if same else "changed"


def main(artifact: str, first: int, count: int) -> None:
    data = Path(artifact).read_bytes()
    session = InferenceSession(artifact, threads=1)
    feed, samples = session.samples()
    expected = dict(zip(samples, session.run(list(samples), feed), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        for number, bit in enumerate(positions(len(data))[first : first + count]):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            path = Path(folder) / f"{number}.gopt"
            path.write_bytes(changed)
            print(outcome(path, expected, feed), bit, flush=True)
            path.unlink()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
