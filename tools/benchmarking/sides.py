"""The sides that can be measured: how each opens its model and what it says about itself.

A side is opened inside its child process, which imports nothing but that side's own library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Feed = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Opened:
    """`call` runs the model once on the feed it was opened with; `about` is versions and options, for the report."""

    call: Callable[[], list[np.ndarray[Any, Any]]]
    about: dict[str, Any]


def open_graphopt(path: str, feed: Feed, threads: int) -> Opened:
    from graphopt.runtime.session import InferenceSession
    from graphopt.tools.subject import choose_entry

    session = InferenceSession(path, threads=threads)
    about = {"tools": dict(session.manifest.tools), "target": session.variant.target, "threads": threads}
    entry = choose_entry(session, None)
    return Opened(lambda: session.run(None, feed, entry=entry), about)


def open_onnxruntime(path: str, feed: Feed, threads: int) -> Opened:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    about = {
        "onnxruntime": onnxruntime.__version__,
        "providers": session.get_providers(),
        "graph_optimization_level": options.graph_optimization_level.name,
        "execution_mode": options.execution_mode.name,
        "intra_op_num_threads": threads,
        "inter_op_num_threads": 1,
    }
    return Opened(lambda: list(session.run(None, feed)), about)


SIDES: dict[str, Callable[[str, Feed, int], Opened]] = {
    "graphopt": open_graphopt,
    "onnxruntime": open_onnxruntime,
}
"""Name -> opens a file with a feed and a number of threads; graphopt takes artifacts, the peers ONNX files."""
