"""The sides of one kernel: ours as `graphopt profile` times it, torch's own beside it, and the multiply-add peak.

Ours and torch's run the same program, and tell the seconds of the operators that count, each by itself. Their file is a
JSON value: the paths of the artifact and the .pt2, and the names of the nodes that count.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.tools.benchmarking.sides import Arrays, Feed, Opened

ROUNDS = 3  # runs that our kernels' median is taken of: as many as fit a turn are taken again


def open_kernel(path: str, feed: Feed, threads: int) -> Opened:
    from graphopt.runtime.session import InferenceSession

    task = json.loads(Path(path).read_text())
    nodes = set(task["nodes"])
    session = InferenceSession(task["artifact"], threads=threads)
    names = kernels_of(session.variant.kernels, nodes)

    def profile(rounds: int) -> dict[str, tuple[float, float]]:
        times = session.profile(feed, rounds=rounds)
        return {name: times[name] for name in names if name in times}

    def measure() -> list[float]:
        return [sum(calls * each for calls, each in profile(ROUNDS).values()) / len(nodes)]

    calls = {name: calls / len(nodes) for name, (calls, _) in profile(1).items()}
    return Opened(lambda: session.run(None, feed), {"calls": calls, "threads": threads}, measure)


def kernels_of(kernels: Mapping[str, Any], nodes: set[str]) -> list[str]:
    """Those that compute one of the nodes."""
    return [name for name, info in kernels.items() if nodes & set(info.nodes.get("main", ()))]


def open_torch(path: str, feed: Feed, threads: int) -> Opened:
    import torch
    from torch.fx import Interpreter

    import graphopt

    torch.set_num_threads(threads)
    task = json.loads(Path(path).read_text())
    program = graphopt.capture(task["program"])
    inputs = [torch.from_numpy(np.array(feed[spec.name])) for spec in program.inputs]
    seconds: list[float] = []

    class Timed(Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            if n.name not in nodes:
                return super().run_node(n)
            arguments, options = self.fetch_args_kwargs_from_env(n)
            assert callable(n.target)
            begin = time.perf_counter()
            result = n.target(*arguments, **options)
            seconds.append(time.perf_counter() - begin)
            return result

    nodes = set(task["nodes"])
    interpreter = Timed(program.graph_module)

    def call() -> Arrays:
        with torch.no_grad():
            return [output.numpy() for output in interpreter.run(*inputs)]

    def measure() -> list[float]:
        seconds.clear()
        call()
        return [statistics.median(seconds)]

    return Opened(call, {"torch": torch.__version__, "threads": threads}, measure)


def open_multiply_adds(path: str, feed: Feed, threads: int) -> Opened:
    """The file names a library with the kernel of `backends.roofs`, its function, and the rounds of one call."""
    import hashlib

    from graphopt.runtime.library import ffi, open_library
    from graphopt.runtime.tensors import aligned_copy
    from graphopt.runtime.threads import Runner

    task = json.loads(Path(path).read_text())
    code = Path(task["library"]).read_bytes()
    function = open_library("roofs", code, hashlib.sha256(code).hexdigest()).get_function(
        task["function"], query_imports=True
    )
    array = aligned_copy(np.zeros((threads, task["lanes"]), np.float32), np.dtype(np.float32))
    result, runner = ffi().from_dlpack(array), Runner(threads)

    def call() -> Arrays:
        runner.run(lambda: function(task["rounds"], result))
        return []

    return Opened(call, {"threads": threads})
