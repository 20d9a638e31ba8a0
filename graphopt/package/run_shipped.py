"""Runs the model in this folder: `python run.py X.npz Y.npz`, arrays by name; without files its recorded sample."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)


def main() -> int:
    from graphopt import InferenceSession

    session = InferenceSession(os.path.join(HERE, "model.gopt"))
    names = [item.name for item in session.get_outputs()]
    if len(sys.argv) == 3:
        with np.load(sys.argv[1]) as given:
            outputs: dict[str, Any] = dict(zip(names, session.run(names, dict(given))))  # noqa: B905
        np.savez(sys.argv[2], **outputs)
        return 0
    feed, expected = session.samples()
    for name, output in zip(names, session.run(names, feed)):  # noqa: B905
        print(name, output.dtype, list(output.shape), "largest difference", _distance(output, expected[name]))
    return 0


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(np.subtract(found, expected, dtype=np.float64)), initial=0.0))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        sys.exit("%s: %s" % (type(error).__name__, " ".join(str(error).split())))  # noqa: UP031
