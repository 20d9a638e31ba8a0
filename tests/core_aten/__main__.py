"""One line for each core ATen overload: ok, excluded with the reason, or what is wrong.

python -m tests.core_aten [--dtype float32] [--dynamic] [NAME ...]
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from tests.core_aten.check import cases_of, dynamic_cases_of, problems_in_parts
from tests.core_aten.samples import DTYPE_EXCEPTIONS, EXCEPTIONS, EXCLUDED, core_overloads, name_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.core_aten", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="overloads such as add.Tensor; all without any")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dynamic", action="store_true", help="with an axis of unknown size where there is one")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    start = time.monotonic()
    overloads = [o for o in core_overloads() if not options.names or name_of(o) in options.names]
    cases = {}
    for overload in overloads:
        if name_of(overload) not in EXCLUDED and (options.names or name_of(overload) not in EXCEPTIONS):
            make = dynamic_cases_of(overload, dtype, 6, 11) if options.dynamic else cases_of(overload, dtype)
            cases[name_of(overload)] = make
    flat = [case for each in cases.values() for case in each]
    found = problems_in_parts(flat)
    wrong = 0
    for overload in overloads:
        name = name_of(overload)
        bad = {case.name: found[case.name] for case in cases.get(name, ()) if case.name in found}
        wrong += bool(bad)
        if name in EXCLUDED:
            print(f"{name}: excluded: {EXCLUDED[name]}")
        elif name not in cases:
            print(f"{name}: exception: {EXCEPTIONS[name]}")
        elif (name, dtype) in DTYPE_EXCEPTIONS:
            print(f"{name}: exception in {options.dtype}: {DTYPE_EXCEPTIONS[name, dtype]}")
        elif not cases.get(name):
            print(f"{name}: no sample for {options.dtype}")
        elif not bad:
            print(f"{name}: ok ({len(cases[name])} samples)")
        for sample, problem in bad.items():
            print(f"{sample}: {problem[:300]}")
    print(f"{len(overloads)} overloads, {wrong} wrong, {len(flat)} samples, {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
