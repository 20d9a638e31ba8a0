"""Prints which architectures run in which form: `python -m tests.architectures [NAME ...]`."""

from __future__ import annotations

import sys

from tests.architectures.forms import CANNOT, FORMS, TOLERANCE, outcome
from tests.architectures.zoo import ARCHITECTURES


def main(names: list[str]) -> int:
    """The number of forms that fail."""
    failed = 0
    for name in names or ARCHITECTURES:
        for form in FORMS:
            if (name, form) in CANNOT:
                print(f"{name:18} {form:12} {CANNOT[name, form]}", flush=True)
                continue
            try:
                found = outcome(name, form)
            except Exception as error:  # the table goes on
                failed += 1
                print(f"{name:18} {form:12} {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
                continue
            wrong = not found.error < TOLERANCE
            failed += wrong
            said = "WRONG" if wrong else "ok"
            listed = ", ".join(f"{count} {operator}" for operator, count in found.operators.items())
            print(f"{name:18} {form:12} {said} {found.error:.0e}  {found.kernels:3} kernels  {listed}", flush=True)
    print(f"{failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
