"""What TVM makes of the captured program by itself: its torch importer and its default pipeline for CPUs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from graphopt.tools.benchmarking.sides import Arrays, Feed, Opened


def open_tvm(path: str, feed: Feed, threads: int) -> Opened:
    """`path` is the .pt2 of the captured, unoptimized program; most loops run on one thread, unvectorised."""
    import tvm
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    from graphopt.backends.cpu import native_target
    from graphopt.backends.target import resolve_target
    from graphopt.capture.pt2 import read_pt2
    from graphopt.untrusted.limits import Limits

    exported, known = read_pt2(Path(path), Limits())
    module = from_exported_program(exported, unwrap_unit_return_tuple=False)
    target = native_target(resolve_target("cpu", threads))
    device = tvm.cpu()
    main = relax.VirtualMachine(tvm.compile(module, target=target), device)["main"]
    inputs = [tvm.runtime.tensor(np.ascontiguousarray(feed[name]), device) for name in known.inputs or ()]

    def call() -> Arrays:
        return [output.numpy() for output in main(*inputs)]

    about = {"tvm": tvm.__version__, "pipeline": "default", "mcpu": str(target.attrs["mcpu"]), "threads": threads}
    return Opened(call, about)
