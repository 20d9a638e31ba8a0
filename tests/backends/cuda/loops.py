"""Kernels for a GPU run as loops on this machine."""

from __future__ import annotations

from dataclasses import replace

from graphopt.backends.cuda.target import runnable
from graphopt.backends.tuner.store import Store
from graphopt.compile import Artifact, prepare
from graphopt.program import Program


def as_loops(program: Program, store: Store, target: str = "cuda:sm_80") -> Artifact:
    """An artifact for this CPU with the kernels of `target`, blocks and threads one after the other."""
    compilation = prepare(program, target, None)
    compilation = replace(compilation, target=runnable(compilation.target))
    return compilation.assemble(compilation.lower(store))
