"""The sides of `--suite decode`: tokens from our sessions and from ONNX Runtime, and memory that is only read.

Each decoder follows a prompt, and then tells the seconds of single tokens, each with all that it takes to have the next
one: the run, and the choice of the likeliest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from graphopt.tools.benchmarking.sides import Arrays, Feed, Opened
from graphopt.tools.benchmarking.usage import peak_memory, present_memory

PROMPT = "prompt"
TOKENS = 64  # after which memory is looked at
TIMED = 8  # tokens of one measurement


def seconds_of(tokens: Iterator[int]) -> list[float]:
    """Of each token after the first, which the prompt takes part in."""
    next(tokens)
    times = []
    for _ in range(TIMED):
        begin = time.perf_counter()
        next(tokens)
        times.append(time.perf_counter() - begin)
    return times


def open_decoder(path: str, feed: Feed, threads: int) -> Opened:
    from graphopt.runtime.generation import IDS, LOGITS, MASK, POSITIONS
    from graphopt.runtime.manifest import WEIGHTS
    from graphopt.runtime.session import InferenceSession
    from graphopt.tools.benchmarking.report import output_error
    from graphopt.tools.profiling.shares import Work

    before = present_memory()
    session = InferenceSession(path, threads=threads)
    prompt = feed[PROMPT]
    tokens = list(session.generate(prompt, TOKENS))
    growth = peak_memory() - before
    count = len(prompt)
    step = {IDS: prompt[None, -1:], POSITIONS: np.array([count - 1]), MASK: np.ones((1, count), np.bool_)}
    calls = {name: calls for name, (calls, _) in session.profile(step, entry="step", rounds=1).items()}
    works = {name: Work.of(session.variant.kernels[name], {"length": count}) for name in calls}

    def call() -> Arrays:
        session.reset()
        whole = {IDS: prompt[None], POSITIONS: np.arange(count), MASK: np.ones((1, count), np.bool_)}
        return [session.run([LOGITS], whole, entry="prefill")[0][0, -1]]

    session.reset()
    samples, expected = session.samples("prefill")
    (found,) = session.run([LOGITS], samples, entry="prefill")
    about = {
        "target": session.variant.target,
        "threads": threads,
        "error": output_error(expected[LOGITS], found),
        "tokens": tokens,
        "growth_bytes": growth,
        "packed_bytes": session.manifest.files[WEIGHTS]["bytes"],
        "touched_bytes": round(sum(calls[name] * (work.bytes or 0) for name, work in works.items())),
    }
    return Opened(call, about, lambda: seconds_of(session.generate(prompt, TIMED + 1)))


def open_onnx_decoder(path: str, feed: Feed, threads: int) -> Opened:
    """The cache is bound to inputs and outputs at once, so that ONNX Runtime writes into it, too."""
    import onnxruntime

    before = present_memory()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    caches = {
        item.name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(item.shape, np.float32))
        for item in session.get_inputs()
        if item.name.startswith("past")
    }
    binding = session.io_binding()
    for name, value in caches.items():
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(name.replace("past", "present"), value)

    def follow(ids: np.ndarray, total: int) -> np.ndarray:
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("seqlens_k", np.array([total - 1], np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(total, np.int32))
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        logits: np.ndarray = binding.get_outputs()[-1].numpy()[0, -1]
        return logits

    prompt = feed[PROMPT]

    def generate(most: int) -> Iterator[int]:
        logits = follow(prompt[None], len(prompt))
        for total in range(len(prompt) + 1, len(prompt) + most + 1):
            token = int(logits.argmax())
            yield token
            logits = follow(np.array([[token]]), total)

    tokens = list(generate(TOKENS))
    about = {
        "onnxruntime": onnxruntime.__version__,
        "threads": threads,
        "tokens": tokens,
        "growth_bytes": peak_memory() - before,
    }
    return Opened(lambda: [follow(prompt[None], len(prompt))], about, lambda: seconds_of(generate(TIMED + 1)))
