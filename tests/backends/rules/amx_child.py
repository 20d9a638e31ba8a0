"""Runs an artifact for AMX on its samples, in a process with the emulator: argument 1 in, outputs to argument 2."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np

from graphopt.errors import GraphoptError
from graphopt.runtime import InferenceSession, features

_AMX = {"amx_tile", "amx_bf16", "amx_int8"}


def _with_amx(flags: frozenset[str]) -> frozenset[str]:
    return flags | _AMX


def main(path: str, results: str) -> int:
    features.host_features = partial(_with_amx, features.host_features())  # type: ignore[assignment]
    try:
        session = InferenceSession(path, threads=1)
    except GraphoptError as e:
        print(type(e).__name__, e)
        return 3
    inputs, _ = session.samples()
    names = [output.name for output in session.get_outputs()]
    arrays: Any = dict(zip(names, session.run(None, inputs), strict=True))
    np.savez(results, **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
