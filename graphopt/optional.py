"""What a missing package means: which extra of graphopt installs it."""

from __future__ import annotations

from graphopt.errors import MissingExtraError

EXTRAS = {
    "torch": "compile",
    "tvm": "compile",
    "networkx": "compile",
    "safetensors": "compile",
    "yaml": "compile",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "bench",
    "openvino": "bench",
    "matplotlib": "bench",
    "transformers": "bench",
}


def missing_extra(name: str, error: ImportError) -> MissingExtraError | None:
    """The error to raise from `error` where `name` cannot be had without an extra; None for any other failure."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    command = f'pip install "graphopt[{EXTRAS[package]}]"'
    return MissingExtraError(f"{name} needs {package}, which the base installation leaves out; run {command}")
