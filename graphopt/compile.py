"""`compile`: programs lowered for a target, checked against PyTorch, ready to save as one artifact."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graphopt.artifact.write import write_artifact
from graphopt.capture.inputs import check_sizes, draw_inputs
from graphopt.errors import UsageError, VerificationError
from graphopt.optional import missing_extra
from graphopt.program import Program, TensorSpec
from graphopt.reference import largest_error, magnitude, run_float64
from graphopt.runtime.dtypes import name_of
from graphopt.runtime.manifest import Bounds, Entry, Manifest, TensorInfo, Variant
from graphopt.runtime.weights import state_name

if TYPE_CHECKING:
    from graphopt.runtime.session import InferenceSession

# A compiled program may be this much farther from float64 than PyTorch is, plus a share of the largest value: its
# polynomials and the order of its sums are its own.
_FACTOR = 16.0
_SHARE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_STEPS = 2  # calls that a program with state is followed for
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
    primes. Raises VerificationError where it does not compute what the program computes, CompileError where a node has
    no lowering or code generation fails, UsageError for arguments that cannot be used.
    """
    for name, value in (("tune", tune), ("database", database)):
        if value is not None:
            raise UsageError(f"{name}={value!r} has no effect in this version of graphopt; leave it out")
    entries = _entries(programs)
    try:
        from graphopt.backends import cpu
        from graphopt.backends.target import resolve_target
    except ImportError as e:
        raise missing_extra("graphopt.compile", e) or e from e
    chosen = resolve_target(target, threads)
    module = cpu.lower(entries, chosen)
    library = f"lib/{re.sub(r'[^A-Za-z0-9_.-]', '-', chosen.name)}.so"
    weights = {**module.weights, **_initial_state(entries)}
    manifest = Manifest(
        name=next(iter(entries.values())).name,
        entries={name: describe_entry(program) for name, program in entries.items()},
        variants=(Variant(chosen.name, chosen.features, library, module.arguments, module.kernels),),
        tools={tool: metadata.version(tool) for tool in _TOOLS},
    )
    slow = sorted(name for name, rule in module.kernels.items() if rule == "generic")
    report = {"target": chosen.name, "threads": chosen.threads, "kernels": dict(module.kernels), "slow": slow}
    built = {library: cpu.build(module.module, chosen)}
    artifact = Artifact(manifest, built, weights, _samples(entries), report)
    errors = check_artifact(artifact, entries)
    return Artifact(manifest, built, weights, artifact.check, {**report, "errors": errors})


def _entries(programs: Program | Mapping[str, Program]) -> dict[str, Program]:
    entries = {"main": programs} if isinstance(programs, Program) else dict(programs)
    if not entries:
        raise UsageError("compile got no programs; give one, or a dict of entry names to programs")
    for name, program in entries.items():
        if not isinstance(program, Program):
            raise UsageError(f"entry {name!r} is a {type(program).__name__}; make a Program with graphopt.capture")
        if not name.isidentifier():
            raise UsageError(f"entry name {name!r} is no identifier; use letters, digits and underscores")
        if not program.examples:
            raise UsageError(f"entry {name!r} has no example inputs to check on; capture it with some")
    return entries


def describe_entry(program: Program) -> Entry:
    """What the manifest says of a program's interface."""
    return Entry(
        inputs=tuple(_info(spec) for spec in program.inputs),
        outputs=tuple(_info(spec) for spec in program.outputs),
        state=tuple(_info(state.spec) for state in program.state),
        sizes={name: Bounds(bounds.low, bounds.high) for name, bounds in program.sizes.items()},
    )


def _info(spec: TensorSpec) -> TensorInfo:
    return TensorInfo(spec.name, str(spec.dtype).removeprefix("torch."), spec.shape)


def _initial_state(entries: Mapping[str, Program]) -> dict[str, np.ndarray]:
    return {
        state_name(state.spec.name): state.initial.detach().contiguous().numpy()
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
                samples[f"{name}.{kind}.{spec.name}"] = value.detach().contiguous().numpy()
    return samples


def check_artifact(artifact: Artifact, entries: Mapping[str, Program]) -> dict[str, float]:
    """Entry -> largest error relative to the largest value. Raises VerificationError naming entry, output and sizes."""
    session = artifact.session()
    errors = {}
    for name, program in entries.items():
        worst = 0.0
        for sizes, inputs in _cases(program):
            session.reset()
            state = tuple(item.initial for item in program.state)
            for _ in range(_STEPS if state else 1):
                feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, inputs, strict=True)}
                results = [torch.from_numpy(array) for array in session.run(None, feed, entry=name)]
                outputs, following = program.step(inputs, state)
                exact = run_float64(_from_state(program, state), inputs)
                for spec, result, eager, reference in zip(program.outputs, results, outputs, exact, strict=False):
                    worst = max(worst, _compare(name, spec, sizes, result, eager, reference))
                state = following
        errors[name] = worst
    return errors


def _cases(program: Program) -> Iterator[tuple[dict[str, int], tuple[torch.Tensor, ...]]]:
    yield program.bind(program.examples), program.examples
    for seed, sizes in enumerate(check_sizes(program)):
        yield sizes, draw_inputs(program, sizes, seed)


def _from_state(program: Program, state: tuple[torch.Tensor, ...]) -> Program:
    from dataclasses import replace

    items = tuple(replace(item, initial=value) for item, value in zip(program.state, state, strict=True))
    return replace(program, state=items)


def _compare(
    entry: str,
    spec: TensorSpec,
    sizes: Mapping[str, int],
    result: torch.Tensor,
    eager: torch.Tensor,
    reference: torch.Tensor,
) -> float:
    where = f"output {spec.name!r} of entry {entry!r} at {', '.join(f'{k}={v}' for k, v in sizes.items()) or 'fixed sizes'}"
    if result.shape != eager.shape or result.dtype != eager.dtype:
        raise VerificationError(
            f"{where} has shape {list(result.shape)} of {name_of(result.numpy().dtype)}, PyTorch gives "
            f"{list(eager.shape)} of {name_of(eager.numpy().dtype)}; this is a fault of graphopt's lowering, please report it"
        )
    reference = reference if eager.is_floating_point() else eager
    error, scale = largest_error(result, reference), magnitude(reference)
    allowed = _FACTOR * largest_error(eager, reference) + _SHARE.get(eager.dtype, 0.0) * scale
    if not error <= allowed:
        raise VerificationError(
            f"{where} is off by {error:.3g} where {allowed:.3g} is allowed, so nothing is saved; this is a fault of "
            "graphopt's lowering, please report it"
        )
    return error / scale if scale else error
