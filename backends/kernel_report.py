"""What the manifest says of each kernel: rule, configuration, work as size expressions, and the nodes it computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import sympy

from graphopt.backends.kernel import Code
from graphopt.backends.sizes import Size, product
from graphopt.backends.values import Storage
from graphopt.capture.expressions import expression_text
from graphopt.errors import ArtifactError, CaptureError
from graphopt.runtime.manifest import KernelInfo
from graphopt.runtime.sizes import parse_size


class Kernels:
    """The kernels of one entry by name; `symbols` maps ShapeEnv names to the entry's sizes."""

    def __init__(self, entry: str, symbols: Mapping[str, str]) -> None:
        self.found: dict[str, KernelInfo] = {}
        self.entry, self._symbols = entry, symbols

    def describe(self, code: Code, weights: Iterable[Storage]) -> KernelInfo:
        """What one call of the kernel does, without its nodes."""
        constants = set(weights)
        reads = [
            (storage, count * width(storage.dtype)) for storage, count in zip(code.inputs, code.reads, strict=True)
        ]
        counts = [product(shape) if code.written is None else code.written for shape, _ in code.outputs]
        writes = sum((count * width(dtype) for count, (_, dtype) in zip(counts, code.outputs, strict=True)), start=0)
        weight_bytes = sum((size for storage, size in reads if storage in constants), start=0)
        total = sum((size for _, size in reads), start=writes)
        tuned = {"tuned": True} if code.made is not None and code.made.tuned else {}
        return KernelInfo(
            code.rule,
            {**code.configuration, **tuned},
            self._text(code.flops),
            self._text(total),
            self._text(weight_bytes),
        )

    def add(self, name: str, info: KernelInfo, nodes: Iterable[str]) -> None:
        """One call; those of equal kernels are put together."""
        known = self.found.get(name, info)
        every = tuple(dict.fromkeys((*known.nodes.get(self.entry, ()), *nodes)))
        self.found[name] = replace(known, nodes={self.entry: every})

    def _text(self, size: Size) -> int | str | None:
        """As the manifest writes sizes; None where it cannot."""
        try:
            text = expression_text(sympy.sympify(size), self._symbols)
            if isinstance(text, str):
                parse_size(text)
        except (CaptureError, ArtifactError):
            return None
        return text


def width(dtype: str) -> int:
    """Bytes of one element."""
    return np.dtype(dtype).itemsize
