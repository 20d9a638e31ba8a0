"""`compile`: programs lowered for a target, checked against PyTorch, ready to save as one artifact."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.arrays import array_of
from graphopt.artifact.write import write_artifact
from graphopt.checking.output_check import check_session
from graphopt.errors import UsageError
from graphopt.optional import missing_extra
from graphopt.program import Program, TensorSpec
from graphopt.registry import find_backend
from graphopt.report import FORMAT, PassReport
from graphopt.runtime.manifest import Bounds, Entry, Manifest, TensorInfo, Variant
from graphopt.runtime.weights import state_name
from graphopt.stages import stage_entries

if TYPE_CHECKING:
    from graphopt.runtime.session import InferenceSession

_TOOLS = ("torch", "apache-tvm", "apache-tvm-ffi", "numpy")


@dataclass(frozen=True)
class Artifact:
    """A compiled model in memory: what `save` writes. `report` lists kernels by rule, and the slow ones."""

    manifest: Manifest
    libraries: Mapping[str, bytes]
    weights: Mapping[str, np.ndarray]
    check: Mapping[str, np.ndarray]
    report: Mapping[str, Any]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, atomically; a path ending in "/" becomes a folder. Raises WriteError."""
        write_artifact(path, self.manifest, self.libraries, self.weights, self.check, self.report)

    def session(self, threads: int | None = None) -> InferenceSession:
        """A session over a private copy that lives as long as the session."""
        from graphopt.runtime.session import InferenceSession

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gopt"
            self.save(path)
            return InferenceSession(path, threads=threads)


def compile(
    programs: Program | Mapping[str, Program],
    target: str = "cpu",
    *,
    tune: Any = None,
    database: Any = None,
    threads: int | None = None,
) -> Artifact:
    """Lower one program, or several by entry name, for `target`; `threads` is how many share a kernel's work.

    The result is run on the examples and on inputs drawn from each input's domain, at the example's sizes, at 1 and at
    primes. Where this machine cannot run the target's code, the same kernels are built for this machine and run in its
    place, and the report says so: `graphopt run --check` on the target is still to be done. Raises VerificationError
    where the result is not what the program computes, CompileError where a node has no lowering or code generation
    fails, UsageError for arguments that cannot be used.
    """
    for name, value in (("tune", tune), ("database", database)):
        if value is not None:
            raise UsageError(f"{name}={value!r} has no effect in this version of graphopt; leave it out")
    entries = _entries(programs)
    try:
        backend = find_backend(target)
    except ImportError as e:
        raise missing_extra("graphopt.compile", e) or e from e
    chosen = backend.resolve_target(target, threads)
    stages = {name: dict(stage_entries(name, program)) for name, program in entries.items() if is_staged(program)}
    functions = {name: program for name, program in entries.items() if name not in stages}
    functions |= {name: stage for found in stages.values() for name, stage in found.items()}
    module = backend.lower(functions, chosen)
    library = f"lib/{re.sub(r'[^A-Za-z0-9_.-]', '-', chosen.name)}.so"
    weights = {**module.weights, **_initial_state(entries)}
    described = entries | functions
    manifest = Manifest(
        name=next(iter(entries.values())).name,
        entries={name: describe_entry(program, tuple(stages.get(name, ()))) for name, program in described.items()},
        variants=(Variant(chosen.name, chosen.features, library, module.arguments, module.kernels),),
        tools={tool: metadata.version(tool) for tool in _TOOLS},
        passes=tuple(
            {"entry": name, **PassReport.summary(item)} for name, program in entries.items() for item in program.history
        ),
    )
    slow = sorted(name for name, kernel in module.kernels.items() if kernel.slow)
    report: dict[str, Any] = {
        "format": FORMAT,
        "target": chosen.name,
        "threads": chosen.threads,
        "kernels": {name: kernel.rule for name, kernel in module.kernels.items()},
        "slow": slow,
    }
    report["entries"] = {
        name: {"passes": list(program.history), "notes": list(program.notes)} for name, program in entries.items()
    }
    built = {library: backend.build(module.module, chosen)}
    artifact = Artifact(manifest, built, weights, _samples(described), report)
    here = backend.runnable(chosen)
    trial = artifact if here is chosen else _trial(artifact, backend.build(module.module, here))
    checks = check_session(trial.session(), described)
    report["checked_on"] = chosen.name if here is chosen else f"{here.machine} {here.architecture}, not on the target"
    report["errors"] = {name: check.error for name, check in checks.items()}
    report["unchecked"] = {name: list(check.unchecked) for name, check in checks.items() if check.unchecked}
    return Artifact(manifest, built, weights, artifact.check, report)


def _trial(artifact: Artifact, library: bytes) -> Artifact:
    """The artifact with code for this machine, whatever the target needs."""
    (variant,) = artifact.manifest.variants
    manifest = replace(artifact.manifest, variants=(replace(variant, features=()),))
    return replace(artifact, manifest=manifest, libraries={variant.library: library})


def _entries(programs: Program | Mapping[str, Program]) -> dict[str, Program]:
    entries = {"main": programs} if isinstance(programs, Program) else dict(programs)
    if not entries:
        raise UsageError("compile got no programs; give one, or a dict of entry names to programs")
    for name, program in entries.items():
        if not isinstance(program, Program):
            raise UsageError(f"entry {name!r} is a {type(program).__name__}; make a Program with graphopt.capture")
        if not name.isidentifier():
            raise UsageError(f"entry name {name!r} is no identifier; use letters, digits and underscores")
        if len(program.examples) != len(program.inputs):
            raise UsageError(f"entry {name!r} has no example inputs to check on; capture it with some")
    return entries


def is_staged(program: Program) -> bool:
    """Whether it runs as one function a stage."""
    return program.exits is not None and program.exits.form == "staged"


def describe_entry(program: Program, stages: tuple[str, ...] = ()) -> Entry:
    """What the manifest says of a program's interface, and of the entries that it runs as."""
    exits = program.outputs[program.exits.answers].name if program.exits else None
    return Entry(
        inputs=tuple(_input_info(program, spec) for spec in program.inputs),
        outputs=tuple(_info(spec) for spec in program.outputs),
        state=tuple(_info(state.spec) for state in program.state),
        sizes={name: Bounds(bounds.low, bounds.high) for name, bounds in program.sizes.items()},
        exits=exits,
        stages=stages,
        rows=str(program.outputs[0].shape[0]) if stages else None,
    )


def _input_info(program: Program, spec: TensorSpec) -> TensorInfo:
    bound = program.bound.get(spec.name)
    return replace(_info(spec), bound=None if bound is None else tuple(bound.reshape(-1).tolist()))


def _info(spec: TensorSpec) -> TensorInfo:
    return TensorInfo(spec.name, str(spec.dtype).removeprefix("torch."), spec.shape)


def _initial_state(entries: Mapping[str, Program]) -> dict[str, np.ndarray]:
    return {
        state_name(state.spec.name): array_of(state.initial.detach().contiguous())
        for program in entries.values()
        for state in program.state
    }


def _samples(entries: Mapping[str, Program]) -> dict[str, np.ndarray]:
    """The examples and what PyTorch makes of them, for `graphopt run --check`."""
    samples = {}
    for name, program in entries.items():
        pairs = [("input", program.inputs, program.examples), ("output", program.outputs, program(*program.examples))]
        for kind, specs, values in pairs:
            for spec, value in zip(specs, values, strict=True):
                samples[f"{name}.{kind}.{spec.name}"] = array_of(value.detach().contiguous())
    return samples
