"""Prints which architectures run in which form: `python -m tests.architectures [--passes | --sizes] [NAME ...]`.

`--passes` prints instead what passes do to each form, and in how many calls the programs after O2 differ from torch's.
`--sizes` prints instead the error at sizes other than those exported, of the architectures with such.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from graphopt.optimize import optimize
from tests.architectures.forms import (
    ANY_BATCH,
    ANY_LENGTH,
    CANNOT,
    FORMS,
    TOLERANCE,
    calls,
    error_at_other_sizes,
    fired,
    outcome,
    taken_in,
)
from tests.architectures.zoo import ARCHITECTURES


def answers(name: str, form: str) -> tuple[bool, str]:
    found = outcome(name, form)
    listed = ", ".join(f"{count} {operator}" for operator, count in found.operators.items())
    return found.error < TOLERANCE, f"{found.error:.0e}  {found.kernels:3} kernels  {listed}"


def passes(name: str, form: str) -> tuple[bool, str]:
    program, torchs = (taken_in(name, one)[0] for one in (form, "torch"))
    found = fired(program)
    ours, theirs = (calls(optimize(item, "O2", verify="off").program) for item in (program, torchs))
    differ = ", ".join(
        f"{ours[key] - theirs[key]:+} {key}" for key in sorted(ours | theirs) if ours[key] != theirs[key]
    )
    listed = ", ".join(f"{count} {step}" for step, count in found.items())
    return found == fired(torchs), f"{listed}; of {ours.total()} calls after O2: {differ or 'as from torch'}"


def sizes(name: str, form: str) -> tuple[bool, str]:
    error = error_at_other_sizes(name, form)
    return error < TOLERANCE, f"{error:.0e}"


def main(words: list[str]) -> int:
    """The number of forms that fail."""
    tables: dict[str, Callable[[str, str], tuple[bool, str]]] = {"--passes": passes, "--sizes": sizes}
    asked = [word for word in words if word in tables]
    table = tables[asked[0]] if asked else answers
    every = (*ANY_LENGTH, *ANY_BATCH) if table is sizes else tuple(ARCHITECTURES)
    failed = 0
    for name in [word for word in words if word not in tables] or every:
        for form in FORMS:
            if (name, form) in CANNOT:
                print(f"{name:18} {form:12} {CANNOT[name, form]}", flush=True)
                continue
            try:
                right, said = table(name, form)
            except Exception as error:  # the table goes on
                right, said = False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            failed += not right
            print(f"{name:18} {form:12} {'ok' if right else 'WRONG'} {said}", flush=True)
    print(f"{failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
