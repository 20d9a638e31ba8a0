"""The side that only reads memory, from one end to the other: what bounds anything that reads so many bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from graphopt.tools.benchmarking.sides import Arrays, Feed, Opened

READS = "reads"  # its name


def write_reads(folder: Path, count: int, threads: int) -> str:
    """The file of a side that reads `count` bytes, or a little less, in whole blocks of each thread."""
    from graphopt.backends import roofs

    library, task = folder / "roofs.so", folder / f"{READS}.json"
    library.write_bytes(roofs.build_roofs(threads))
    lanes = roofs.target_here(threads).lanes
    unit = 4 * 64 * lanes * threads
    task.write_text(json.dumps({"library": str(library), "bytes": count // unit * unit, "lanes": lanes}))
    return str(task)


def open_reads(path: str, feed: Feed, threads: int) -> Opened:
    from graphopt.backends import roofs
    from graphopt.runtime.library import ffi, open_library
    from graphopt.runtime.tensors import aligned_empty
    from graphopt.runtime.threads import Runner

    task = json.loads(Path(path).read_text())
    code = Path(task["library"]).read_bytes()
    read = open_library("roofs", code, hashlib.sha256(code).hexdigest()).get_function(roofs.READ, query_imports=True)
    data, result = (
        aligned_empty(shape, np.dtype(np.float32)) for shape in ((task["bytes"] // 4,), (threads, task["lanes"]))
    )
    data[:] = 1.0
    given = [ffi().from_dlpack(array) for array in (data, result)]
    runner = Runner(threads)

    def call() -> Arrays:
        runner.run(lambda: read(1, *given))
        return []

    return Opened(call, {"bytes": task["bytes"], "threads": threads})
