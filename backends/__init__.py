"""Lowering to native code. `TARGETS` maps a target family to its module; a new family is one file and one line here."""

from __future__ import annotations

if __name__ != "graphopt.backends":
    raise ImportError("import graphopt.backends instead of backends: one file must never be two modules")

TARGETS = {"cpu": "graphopt.backends.cpu", "cuda": "graphopt.backends.cuda.family"}
