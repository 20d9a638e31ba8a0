"""Run seeds: python -m tests.fuzz own 0 100, or one seed with its source: python -m tests.fuzz own 17 --show."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from tests.fuzz.check import check
from tests.fuzz.generator import Case, generate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("generator", choices=("own", "nnsmith"))
    parser.add_argument("first", type=int)
    parser.add_argument("end", type=int, nargs="?", help="one past the last seed; by default FIRST alone")
    parser.add_argument("--show", action="store_true", help="print the models too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cached: Any = functools.cache(importlib.metadata.entry_points)  # every call of optimize looks for passes of others
    importlib.metadata.entry_points = cached
    make = maker(options.generator)
    for seed in range(options.first, options.first + 1 if options.end is None else options.end):
        print(json.dumps({"name": options.generator, "seed": seed}), flush=True)
        if options.show:
            print(make(seed).text, file=sys.stderr, flush=True)
        print(json.dumps(asdict(check(options.generator, seed, make))), flush=True)
    return 0


def maker(name: str) -> Callable[[int], Case]:
    """The generator of this name."""
    if name == "own":
        return generate
    from tests.fuzz.nnsmith_models import generate as generate_nnsmith

    return generate_nnsmith


if __name__ == "__main__":
    sys.exit(main())
