"""`compile`: programs lowered for a target, checked against PyTorch, ready to save as one artifact."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graphopt.arrays import array_of, tensor_of
from graphopt.artifact.write import write_artifact
from graphopt.checking.exactness import same
from graphopt.checking.operators_alone import alone, compare
from graphopt.checking.output_check import check_session
from graphopt.database import Database, hardware_of, open_store
from graphopt.errors import UsageError
from graphopt.in_place import written_state
from graphopt.optional import missing_extra
from graphopt.program import Program, State, TensorSpec
from graphopt.registry import find_backend
from graphopt.report import FORMAT, PassReport
from graphopt.runtime.manifest import Bounds, Entry, Manifest, TensorInfo, Variant
from graphopt.runtime.weights import state_name
from graphopt.stages import stage_entries
from graphopt.variants import check_distinct, merge, split_targets

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
    tune: float | None = None,
    database: Database = None,
    threads: int | None = None,
    check_operators: bool = False,
) -> Artifact:
    """Lower one program, or several by entry name, for `target`; `threads` is how many share a kernel's work.

    Several targets with commas between them make one artifact with a variant for each, of which a session takes the
    best that its machine can run; `tune` is shared among them.

    Kernels have the configurations that measured best, as far as `database` knows: the path of a store of tuning
    records, a `Store`, or None for the user's own. `tune` is how many seconds to measure for first; what is found is
    kept there.

    The result is run on the examples and on inputs drawn from each input's domain, at the example's sizes, at 1 and at
    primes. Where this machine cannot run the target's code, the same kernels are built for this machine and run in its
    place, and the report says so: `graphopt run --check` on the target is still to be done. `check_operators` compares
    every operator on 8-bit codes alone, too, fed what PyTorch feeds it on the examples: codes may differ by one, and
    only close to a half. It takes a second compilation, and memory for all operands at once. Raises VerificationError
    where the result is not what the program computes, CompileError where a node has no lowering or code generation
    fails, UsageError for arguments that cannot be used, WriteError where the store cannot be written.
    """
    compilations = {name: prepare(programs, name, threads) for name in split_targets(target)}
    check_distinct({name: each.target.features for name, each in compilations.items()})
    if tune is not None:
        from graphopt.tuning import check_tunable

        for each in compilations.values():
            check_tunable(each.target)
    with missing_compiler():
        store = open_store(database)
    several = len(compilations) > 1
    share = tune / len(compilations) if several and tune is not None else tune
    artifacts = [_compiled(each, store, share, check_operators) for each in compilations.values()]
    return merge(artifacts) if several else artifacts[0]


def _compiled(compilation: Compilation, store: Any, seconds: float | None, check_operators: bool) -> Artifact:
    """For one target, tuned and checked."""
    if seconds is not None:
        from graphopt.tuning import tune_compilation

        tune_compilation(compilation, store, seconds)
    module = compilation.lower(store)
    artifact = compilation.assemble(module)
    chosen, here = compilation.target, compilation.here
    checks = check_session(compilation.trial(artifact, module).session(), compilation.described)
    report = dict(artifact.report)
    report["checked_on"] = chosen.name if here is chosen else f"{here.machine} {here.architecture}, not on the target"
    report["errors"] = {name: check.error for name, check in checks.items()}
    if check_operators:
        report["operators"] = compilation.compare_operators(store)
    report["unchecked"] = {name: list(check.unchecked) for name, check in checks.items() if check.unchecked}
    return replace(artifact, report=report)


@dataclass(frozen=True)
class Compilation:
    """What is compiled, and for what. `functions` are the entries, in place of staged ones their stages."""

    entries: Mapping[str, Program]
    stages: Mapping[str, Mapping[str, Program]]
    functions: Mapping[str, Program]
    backend: Any
    target: Any

    @property
    def described(self) -> dict[str, Program]:
        """Everything that the manifest describes."""
        return {**self.entries, **self.functions}

    @property
    def here(self) -> Any:
        """The target, or where this machine cannot run its code, what it can run."""
        return self.backend.runnable(self.target)

    def trial(self, artifact: Artifact, module: Any) -> Artifact:
        """The artifact of this module if this machine can run it, else one with the same kernels built for it."""
        return artifact if self.here is self.target else _trial(artifact, self.backend.build(module.module, self.here))

    def compare_operators(self, store: Any) -> dict[str, Any]:
        """What came of the operators on codes of every entry that has some. Raises VerificationError."""
        found = {}
        for name, program in self.entries.items():
            if (parts := alone(program)) is None:
                continue
            given = parts.program
            compilation = replace(self, entries={name: given}, stages={}, functions={name: given})
            module = compilation.lower(store)
            session = compilation.trial(compilation.assemble(module), module).session()
            feed = {spec.name: array_of(value) for spec, value in zip(given.inputs, given.examples, strict=True)}
            arrays = session.run(None, feed, entry=name)
            results = [tensor_of(each, spec.dtype) for each, spec in zip(arrays, given.outputs, strict=True)]
            found[name] = {**asdict(compare(parts, results)), "left_out": list(parts.left_out)}
        return found

    def lower(self, store: Any, hardware: Any = None) -> Any:
        """The backend's module, its kernels as the store knows them to be best on this hardware, by default here."""
        hardware = hardware or hardware_of(self.target)

        def tuned(workload: Any) -> Mapping[str, Any] | None:
            record = store.lookup(workload, hardware)
            return None if record is None else record.configuration

        return self.backend.lower(self.functions, self.target, tuned)

    def assemble(self, module: Any) -> Artifact:
        """The module built, with all that belongs to it; nothing of it was run."""
        chosen = self.target
        library = f"lib/{re.sub(r'[^A-Za-z0-9_.-]', '-', chosen.name)}.so"
        written = written_state(self.functions.values())
        manifest = Manifest(
            name=next(iter(self.entries.values())).name,
            entries={
                name: describe_entry(program, tuple(self.stages.get(name, ())), written)
                for name, program in self.described.items()
            },
            variants=(Variant(chosen.name, chosen.features, library, module.arguments, module.kernels),),
            tools={tool: metadata.version(tool) for tool in _TOOLS},
            passes=tuple(
                {"entry": name, **PassReport.summary(item)}
                for name, program in self.entries.items()
                for item in program.history
            ),
        )
        report: dict[str, Any] = {
            "format": FORMAT,
            "target": chosen.name,
            "threads": chosen.threads,
            "kernels": {name: kernel.rule for name, kernel in module.kernels.items()},
            "slow": sorted(name for name, kernel in module.kernels.items() if kernel.slow),
            "tuned": sorted(name for name, kernel in module.kernels.items() if kernel.configuration.get("tuned")),
            "notes": list(module.choices.notes),
        }
        report["entries"] = {
            name: {"passes": list(program.history), "notes": list(program.notes)}
            for name, program in self.entries.items()
        }
        built = {library: self.backend.build(module.module, chosen)}
        weights = {**module.weights, **_initial_state(self.entries, written)}
        return Artifact(manifest, built, weights, _samples(self.described), report)


def prepare(programs: Program | Mapping[str, Program], target: str, threads: int | None) -> Compilation:
    """What `compile` does with its arguments first. Raises UsageError and its kinds."""
    entries = _entries(programs)
    with missing_compiler():
        backend = find_backend(target)
    chosen = backend.resolve_target(target, threads)
    stages = {name: dict(stage_entries(name, program)) for name, program in entries.items() if is_staged(program)}
    functions = {name: program for name, program in entries.items() if name not in stages}
    functions |= {name: stage for found in stages.values() for name, stage in found.items()}
    return Compilation(entries, stages, functions, backend, chosen)


@contextmanager
def missing_compiler() -> Iterator[None]:
    """Says which extra brings the compiler."""
    try:
        yield
    except ImportError as e:
        raise missing_extra("graphopt.compile", e) or e from e


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


def describe_entry(program: Program, stages: tuple[str, ...] = (), written: frozenset[str] = frozenset()) -> Entry:
    """What the manifest says of a program's interface, of the entries that it runs as, and of state it writes into."""
    exits = program.outputs[program.exits.answers].name if program.exits else None
    return Entry(
        inputs=tuple(_input_info(program, spec) for spec in program.inputs),
        outputs=tuple(_info(spec) for spec in program.outputs),
        state=tuple(_info(state.spec) for state in program.state),
        sizes={name: Bounds(bounds.low, bounds.high) for name, bounds in program.sizes.items()},
        exits=exits,
        stages=stages,
        rows=str(program.outputs[0].shape[0]) if stages else None,
        written=tuple(state.spec.name for state in program.state if state.spec.name in written),
    )


def _input_info(program: Program, spec: TensorSpec) -> TensorInfo:
    bound = program.bound.get(spec.name)
    return replace(_info(spec), bound=None if bound is None else tuple(bound.reshape(-1).tolist()))


def _info(spec: TensorSpec) -> TensorInfo:
    return TensorInfo(spec.name, str(spec.dtype).removeprefix("torch."), spec.shape)


def _initial_state(entries: Mapping[str, Program], written: frozenset[str]) -> dict[str, np.ndarray]:
    """By name in the file, but for zeros that are written into. Raises UsageError where two entries differ."""
    found: dict[str, State] = {}
    for name, program in entries.items():
        for state in program.state:
            other = found.setdefault(state.spec.name, state)
            if other.spec != state.spec or not same(other.initial, state.initial):
                raise UsageError(
                    f"entry {name!r} has state {state.spec.name!r} of another shape or value than an entry before it; "
                    "capture both from one module"
                )
    return {
        state_name(name): array_of(state.initial.detach().contiguous())
        for name, state in found.items()
        if name not in written or torch.count_nonzero(state.initial)
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
