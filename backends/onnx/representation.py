"""A prepared ONNX model: arrays in the order of the graph's inputs become arrays in the order of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx.backend.base import BackendRep as OnnxBackendRep
from onnx.backend.base import namedtupledict

import graphopt
from graphopt.arrays import array_of, tensor_of
from graphopt.database import Database
from graphopt.errors import BoundInputError, CaptureError, FeedError, RunError
from graphopt.program import Program

_NARROW = {"int2": "i1", "int4": "i1", "uint2": "u1", "uint4": "u1", "float4_e2m1fn": ml_dtypes.float8_e4m3fn}
"""What programs hold them in."""


class BackendRep(OnnxBackendRep):
    """Holds the program of a model, and where it is `compiled` a session.

    A model whose inputs decide shapes, axes or counts is captured at the first run, with these inputs bound, and again
    where they come with other values.
    """

    def __init__(
        self, model: onnx.ModelProto, *, compiled: bool = False, threads: int | None = None, database: Database = None
    ) -> None:
        self.model = model
        self.compiled, self.threads, self.database = compiled, threads, database
        self.program: Program | None = None
        self._session: Any = None
        held = {proto.name for proto in model.graph.initializer}
        self.inputs = [value.name for value in model.graph.input if value.name not in held]
        try:
            self._capture(None)
        except CaptureError:
            if not self.inputs:
                raise  # there is nothing to bind

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Arrays in the order of the graph's inputs, those that are initializers left out, or by their names.

        Raises CaptureError and CompileError where the model can only be refused now, FeedError for other inputs than
        it has.
        """
        if kwargs:
            raise FeedError(f"run has no option {next(iter(kwargs))!r}; give it inputs only")
        given = self._by_name(inputs)
        if self.program is None:
            self._capture(given)
        try:
            results = self._call(given)
        except BoundInputError:
            self._capture(given)
            results = self._call(given)
        names = [value.name for value in self.model.graph.output]
        arrays = map(_declared, results, self.model.graph.output)
        outputs: tuple[Any, ...] = namedtupledict("Outputs", names)(*arrays)
        return outputs

    def _by_name(self, inputs: Any) -> dict[str, np.ndarray]:
        if not isinstance(inputs, Mapping):
            values = [inputs] if isinstance(inputs, np.ndarray) else list(inputs)
            if len(values) != len(self.inputs):
                raise FeedError(f"the model takes {len(self.inputs)} inputs, got {len(values)}")
            inputs = dict(zip(self.inputs, values, strict=True))
        return {name: np.array(value) for name, value in inputs.items()}  # of its own, and never a scalar

    def _capture(self, given: Mapping[str, np.ndarray] | None) -> None:
        examples = None if given is None else self._tensors(given)
        program = graphopt.capture(self.model, examples, name=self.model.graph.name or None)
        if self.compiled:
            artifact = graphopt.compile(program, threads=self.threads, database=self.database)
            self._session = artifact.session(self.threads)
        self.program = program

    def _tensors(self, given: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        from graphopt.capture.onnx.sizes import read_inputs

        dtypes = {item.name: item.dtype for item in read_inputs(self.model.graph)}
        return {name: _tensor(value, dtypes[name]) for name, value in given.items() if name in dtypes}

    def _call(self, given: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        assert self.program is not None
        feed = [_tensor(given[spec.name], spec.dtype) for spec in self.program.inputs]
        if not self.compiled:
            return [array_of(result) for result in self.program(*feed)]
        arrays = {spec.name: array_of(value) for spec, value in zip(self.program.inputs, feed, strict=True)}
        results = zip(self._session.run(None, arrays), self.program.outputs, strict=True)
        return [array_of(tensor_of(result, spec.dtype)) for result, spec in results]


def _tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return tensor_of(array.astype(_NARROW.get(array.dtype.name, array.dtype)), dtype)


def _declared(array: np.ndarray, value: onnx.ValueInfoProto) -> np.ndarray:
    """Numbers of less than 8 bits in the type that the file says. Raises RunError where it has not all of them."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    if dtype.name not in _NARROW:
        return array
    numbers = array.astype(dtype)
    other = (numbers.astype(array.dtype) != array) & (array == array)  # NaN has no equal
    if other.any():
        raise RunError(f"output {value.name!r} is of type {dtype.name}, and the program gives {array[other][0]} for it")
    return numbers
