"""graphopt as a backend of ONNX: the functions of `onnx.backend.base.Backend`, eager or compiled.

`onnx.backend.test.BackendTest(graphopt.backends.onnx, __name__)` runs ONNX's own tests on it.
"""

from graphopt.backends.onnx.backend import Backend
from graphopt.backends.onnx.representation import BackendRep

__all__ = ["Backend", "BackendRep", "is_compatible", "prepare", "run_model", "run_node", "supports_device"]

is_compatible = Backend.is_compatible
prepare = Backend.prepare
run_model = Backend.run_model
run_node = Backend.run_node
supports_device = Backend.supports_device
