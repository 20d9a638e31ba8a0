"""Several compilations of the same programs in one artifact: the runtime takes the best one that a machine can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from graphopt.errors import UsageError
from graphopt.runtime.manifest import Variant
from graphopt.runtime.weights import state_name

if TYPE_CHECKING:
    from graphopt.compile import Artifact


def split_targets(target: str) -> tuple[str, ...]:
    """The targets that are written with commas between them. Raises UsageError where one is named twice."""
    names = tuple(part.strip() for part in target.split(","))
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"target {twice!r} is named twice; name each variant once")
    return names


def check_distinct(features: Mapping[str, tuple[str, ...]]) -> None:
    """Raises UsageError where two of the targets, with what they need of a machine, need the same."""
    known: dict[tuple[str, ...], str] = {}
    for target, needed in features.items():
        if (other := known.setdefault(needed, target)) != target:
            raise UsageError(f"variants {other} and {target} are for the same machines; leave one out")


def merge(artifacts: Sequence[Artifact]) -> Artifact:
    """One artifact with the variants of all, those for a GPU and those that need most features first.

    Equal weights are stored once. The report is that of the first, and has the others' under "variants".
    """
    ordered = sorted(artifacts, key=_worst_last)
    weights: dict[str, np.ndarray] = {}
    variants: list[Variant] = []
    for artifact in ordered:
        (variant,) = artifact.manifest.variants
        names = _stored(artifact, variant.target, weights)
        renamed = {entry: tuple(names[name] for name in used) for entry, used in variant.weights.items()}
        variants.append(replace(variant, weights=renamed))
    first = ordered[0]
    report = {**first.report, "variants": {str(each.report["target"]): dict(each.report) for each in ordered}}
    libraries = {name: data for each in ordered for name, data in each.libraries.items()}
    return replace(
        first,
        manifest=replace(first.manifest, variants=tuple(variants)),
        libraries=libraries,
        weights=weights,
        report=report,
    )


def _worst_last(artifact: Artifact) -> tuple[bool, int]:
    (variant,) = artifact.manifest.variants
    return not variant.on_gpu, -len(variant.features)


def _stored(artifact: Artifact, target: str, weights: dict[str, np.ndarray]) -> Mapping[str, str]:
    """Put its weights among those of all; weight -> its name there, another one where that stands for other numbers."""
    names: dict[str, str] = {}
    for name, array in artifact.weights.items():
        other = weights.get(name)
        same = other is None or (other.dtype == array.dtype and other.tobytes() == array.tobytes())
        if not same and name.startswith(state_name("")):
            raise UsageError(f"{name} begins otherwise for {target}; compile the variants from one program")
        names[name] = name if same and (other is None or other.shape == array.shape) else f"{name}@{target}"
        weights.setdefault(names[name], array)
    return names
