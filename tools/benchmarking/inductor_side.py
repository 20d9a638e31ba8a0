"""The captured program through torch.compile, frozen and autotuned: seconds to minutes before the first call."""

from __future__ import annotations

import os
import shutil
from typing import Any

import numpy as np

from graphopt.errors import UsageError
from graphopt.tools.benchmarking.sides import Arrays, Feed, Opened


def open_inductor(path: str, feed: Feed, threads: int) -> Opened:
    """`path` is the .pt2 of the captured, unoptimized program. Raises UsageError without a C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UsageError(f"there is no C++ compiler {compiler!r}; install g++ or name another one in CXX")
    import torch
    from torch._inductor import config, list_mode_options

    import graphopt

    torch.set_num_threads(threads)
    program = graphopt.capture(path)
    chosen = {"freezing": True, **list_mode_options("max-autotune")}
    options: dict[str, Any] = {name: value for name, value in chosen.items() if not name.startswith("triton.")}
    function = torch.compile(program.graph_module, fullgraph=True, dynamic=False, options=options)
    inputs = [torch.from_numpy(np.array(feed[spec.name])) for spec in program.inputs]
    inputs += [item.initial for item in program.state]
    count = len(program.outputs)

    def call() -> Arrays:
        with torch.no_grad():
            return [output.numpy() for output in function(*inputs)[:count]]

    call()  # compiles, so that it counts as loading
    backends = {"max_autotune_gemm_backends": config.max_autotune_gemm_backends}
    return Opened(call, {"torch": torch.__version__, **options, **backends, "threads": threads, "compiler": compiler})
