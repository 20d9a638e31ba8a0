"""The sides that can be measured: how each opens its model and what it says about itself.

A side is opened inside its child process, which imports nothing but that side's own library.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Arrays = list[np.ndarray[Any, Any]]
Feed = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Opened:
    """`call` runs the model once on the feed it was opened with; `about` is versions and options, for the report.

    `measure` runs it once or more and returns seconds that the side took itself, instead of the time of `call`.
    """

    call: Callable[[], Arrays]
    about: dict[str, Any]
    measure: Callable[[], list[float]] | None = None


def open_graphopt(path: str, feed: Feed, threads: int) -> Opened:
    from graphopt.runtime.session import InferenceSession
    from graphopt.tools.subject import choose_entry

    session = InferenceSession(path, threads=threads)
    tuned = sum(bool(kernel.configuration.get("tuned")) for kernel in session.variant.kernels.values())
    about = {"tools": dict(session.manifest.tools), "target": session.variant.target, "threads": threads}
    about["tuned kernels"] = tuned
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


def open_openvino(path: str, feed: Feed, threads: int, dtype: str = "f32") -> Opened:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": dtype, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    model = openvino.Core().compile_model(path, "CPU", options)
    request = model.create_infer_request()

    def call() -> Arrays:
        results = request.infer(feed, share_inputs=True, share_outputs=True)
        return [results[output] for output in model.outputs]

    settled = ("INFERENCE_PRECISION_HINT", "PERFORMANCE_HINT", "NUM_STREAMS", "INFERENCE_NUM_THREADS")
    shared = {"share_inputs": True, "share_outputs": True}
    about = {"openvino": openvino.__version__, **shared, **{name: str(model.get_property(name)) for name in settled}}
    return Opened(call, about)


def open_openvino_bf16(path: str, feed: Feed, threads: int) -> Opened:
    """Its default on CPUs with bfloat16 instructions."""
    return open_openvino(path, feed, threads, "bf16")


SIDES = {
    "graphopt": "sides:open_graphopt",
    "onnxruntime": "sides:open_onnxruntime",
    "openvino": "sides:open_openvino",
    "openvino-bf16": "sides:open_openvino_bf16",
    "inductor": "inductor_side:open_inductor",
    "tvm": "tvm_side:open_tvm",
    "kernel": "kernel_sides:open_kernel",
    "torch": "kernel_sides:open_torch",
    "multiply-adds": "kernel_sides:open_multiply_adds",
    "bound-graphopt": "gemv_sides:open_bound_graphopt",
    "bound-onnxruntime": "gemv_sides:open_bound_onnxruntime",
    "reads": "memory_reads:open_reads",
    "decoder": "decode_sides:open_decoder",
    "onnxruntime-decoder": "decode_sides:open_onnx_decoder",
}
"""Name -> module beside this one and function in it: opens a file with a feed and a number of threads."""


def find_side(name: str) -> Callable[[str, Feed, int], Opened]:
    module, _, function = SIDES[name].partition(":")
    found: Callable[[str, Feed, int], Opened]
    found = getattr(importlib.import_module(f"graphopt.tools.benchmarking.{module}"), function)
    return found
