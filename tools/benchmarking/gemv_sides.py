"""The sides of `--suite gemv`: inputs and results bound before, so that a call is little but the product.

Their file is a JSON value: for ours the path of the artifact; for ONNX Runtime that of the model and the options of its
session; for reading, that of a library with the kernel that reads, and how many bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.tools.benchmarking.sides import Arrays, Feed, Opened

CALLS = 20  # in a row: as many as fit a turn are made again


def open_bound_graphopt(path: str, feed: Feed, threads: int) -> Opened:
    from graphopt.runtime.library import find_function
    from graphopt.runtime.loading import load
    from graphopt.runtime.session import SET_DENORMALS, as_list, bind_function, new_machine
    from graphopt.runtime.tensors import as_array, to_device
    from graphopt.runtime.threads import Runner

    model = load(json.loads(Path(path).read_text())["model"], "code")
    entry = model.manifest.entries["main"]
    inputs = [to_device(feed[item.name], item.dtype) for item in entry.inputs]
    runner = Runner(threads)
    function = runner.run(lambda: bind_function("main", model, new_machine(model)))
    flush = find_function(model.library, SET_DENORMALS)
    assert flush is not None, "an artifact of this version flushes denormals"
    runner.run(lambda: flush(1, threads))

    def call() -> Arrays:
        results = runner.run(lambda: as_list(function(*inputs)))
        return [np.array(as_array(result, "float32")) for result in results]

    kernels = {name: info.rule for name, info in model.variant.kernels.items()}
    about = {"threads": threads, "kernels": sorted(set(kernels.values()))}
    return Opened(call, about, lambda: runner.run(lambda: each_call(lambda: function(*inputs))))


def open_bound_onnxruntime(path: str, feed: Feed, threads: int) -> Opened:
    import onnxruntime

    task = json.loads(Path(path).read_text())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    for name, value in task["options"].items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(task["model"], options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for item in session.get_inputs():
        binding.bind_cpu_input(item.name, feed[item.name])
    for item in session.get_outputs():
        binding.bind_output(item.name)

    def call() -> Arrays:
        session.run_with_iobinding(binding)
        return list(binding.copy_outputs_to_cpu())

    about = {"onnxruntime": onnxruntime.__version__, "intra_op_num_threads": threads, **task["options"]}
    return Opened(call, about, lambda: each_call(lambda: session.run_with_iobinding(binding)))


def each_call(call: Callable[[], Any]) -> list[float]:
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
        if sum(times) > 0.5:  # a slow side does not hold up the others
            break
    return times
