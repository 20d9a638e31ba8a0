"""The functions that ONNX asks of a backend: https://onnx.ai/onnx/api/backend.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.backend.base import Backend as OnnxBackend

from graphopt.backends.onnx.representation import BackendRep
from graphopt.errors import CaptureError, UsageError

OPTIONS = ("compiled", "database", "threads")


class Backend(OnnxBackend):
    """Runs ONNX models as programs in PyTorch, or `compiled` for this machine."""

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether every operator of the model is one that graphopt imports."""
        from graphopt.capture.onnx.importer import refuse_unknown
        from graphopt.capture.onnx.reading import opset_of

        try:
            refuse_unknown(model, opset_of(model))
        except CaptureError:
            return False
        return cls.supports_device(device)

    @classmethod
    def prepare(
        cls,
        model: onnx.ModelProto,
        device: str = "CPU",
        **kwargs: Any,
    ) -> BackendRep:
        """The model ready to run.

        Options: `compiled` (default False), and `threads` and `database` of `graphopt.compile`. Raises
        onnx.checker.ValidationError for a model that is not valid, CaptureError and CompileError for one that graphopt
        refuses, UsageError for an unknown device or option.
        """
        _refuse(device, kwargs)
        super().prepare(model, device)
        return BackendRep(model, **kwargs)

    @classmethod
    def run_node(
        cls,
        node: onnx.NodeProto,
        inputs: Any,
        device: str = "CPU",
        outputs_info: Sequence[tuple[np.dtype, tuple[int, ...]]] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Run one operator on arrays for those of its inputs that are there.

        `opset_version` is that of the operator's domain, by default the newest; other options are those of `prepare`.
        """
        version = kwargs.pop("opset_version", None) or _newest(node.domain)
        _refuse(device, kwargs)
        checked: Any = {"opset_version": version}
        super().run_node(node, inputs, device, outputs_info, **checked)
        names = list(dict.fromkeys(name for name in node.input if name))
        arrays = [np.asarray(value) for value in inputs]
        if len(arrays) != len(names):
            raise UsageError(f"the node reads {len(names)} inputs, got {len(arrays)}; give one array for each")
        values = [_value_info(name, array.dtype, array.shape) for name, array in zip(names, arrays, strict=True)]
        results = [name for name in node.output if name]
        if outputs_info is None:
            outputs = [onnx.ValueInfoProto(name=name) for name in results]
        else:
            outputs = [_value_info(name, *info) for name, info in zip(results, outputs_info, strict=True)]
        graph = onnx.helper.make_graph([node], node.op_type, values, outputs)
        imports = [onnx.helper.make_opsetid(node.domain, version)]
        model = onnx.shape_inference.infer_shapes(onnx.helper.make_model(graph, opset_imports=imports))
        return BackendRep(model, **kwargs).run(arrays)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return device.partition(":")[0] == "CPU"


def _refuse(device: str, options: Mapping[str, Any]) -> None:
    if not Backend.supports_device(device):
        raise UsageError(f"the ONNX backend runs on the CPU, not on {device!r}; write device='CPU'")
    if unknown := sorted(options.keys() - set(OPTIONS)):
        raise UsageError(f"unknown option {unknown[0]!r}; there are: {', '.join(OPTIONS)}")


def _newest(domain: str) -> int:
    return onnx.defs.onnx_opset_version() if domain in ("", "ai.onnx") else 1


def _value_info(name: str, dtype: Any, shape: Sequence[int]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
