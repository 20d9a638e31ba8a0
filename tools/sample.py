"""The sample inside an artifact: inputs and what they must give."""

from __future__ import annotations

from typing import Any

import numpy as np

from graphopt.errors import ArtifactError

Arrays = dict[str, np.ndarray[Any, Any]]


def read_sample(path: str, entry: str = "main") -> tuple[Arrays, Arrays]:
    """(inputs, expected outputs) by name, views of the mapped file; raises ArtifactError when there is none."""
    from graphopt.runtime.archive import open_archive
    from graphopt.runtime.manifest import CHECK
    from graphopt.runtime.weights import read_tensors

    stored = read_tensors(CHECK, open_archive(path).member(CHECK))
    inputs, outputs = (
        {name.removeprefix(prefix): tensor.array() for name, tensor in stored.items() if name.startswith(prefix)}
        for prefix in (f"{entry}.input.", f"{entry}.output.")
    )
    if not outputs:
        raise ArtifactError(f"{path} carries no sample for entry {entry!r}; give inputs with --input")
    return inputs, outputs
