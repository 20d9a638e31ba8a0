"""What an operator function sees of the ONNX node it imports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.capture.onnx.attributes import Attributes
from graphopt.capture.onnx.emitter import Emitter
from graphopt.capture.onnx.tensors import FLOAT8
from graphopt.capture.onnx.values import Known, Present, Tensor, Value
from graphopt.errors import CaptureError


@dataclass(frozen=True)
class Operation:
    """One node: its ONNX operator name, attributes, opset and number of outputs in use."""

    name: str
    attributes: Attributes
    opset: int
    outputs: int
    emitter: Emitter

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Emit a call of an ATen overload that returns one tensor; values, sizes and literals are its arguments."""
        result = self.emitter.call(target, *args, **kwargs)
        assert isinstance(result, Tensor)
        return result

    def parts(self, target: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Like `call`, of an overload that returns several tensors."""
        result = self.emitter.call(target, *args, **kwargs)
        assert isinstance(result, tuple)
        return result

    def tensor(self, value: Present) -> Tensor:
        return self.emitter.tensor(value)

    def reshape(self, value: Present, sizes: list[Any]) -> Tensor:
        return self.emitter.reshape(self.tensor(value), sizes)

    def cast(self, value: Present, dtype: torch.dtype) -> Tensor:
        """The value in this type; itself where it has it."""
        tensor = self.tensor(value)
        if tensor.dtype == dtype:
            return tensor
        if tensor.dtype in FLOAT8.values() and self.emitter.held(tensor.node) is not None:
            return self.weight(tensor, lambda held: held.to(dtype))
        return self.call(torch.ops.aten._to_copy.default, tensor, dtype=dtype)

    def weight(self, value: Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensor:
        """What `change` makes of a tensor that the file holds, held in its place."""
        held = self.emitter.held(value.node)
        assert held is not None
        target = self.emitter.weights.add(f"{value.node.target}_wide", change(held.detach()), trainable=True)
        return self.emitter.attribute(target)

    def sizes(self, value: Value, what: str) -> list[Any]:
        """The elements of an array, which constants or examples decide; `what` names the input for the error."""
        if value is None:
            raise CaptureError(f"{what} is left out, which {self.name} needs")
        known = value if isinstance(value, Known) else self.emitter.binding.numbers(self.emitter, value, what)
        return known.items()

    def integers(self, value: Value, what: str) -> list[int]:
        """Like `sizes`, where nothing symbolic is possible."""
        items = self.sizes(value, what)
        if not all(isinstance(item, (int, bool)) for item in items):
            raise CaptureError(
                f"{what} depends on a dynamic size, which graphopt cannot express; give that axis a number"
            )
        return [int(item) for item in items]

    def axes(self, value: Value, rank: int) -> list[int] | None:
        """Axes from an input or, in older opsets, from the attribute of that name; None where neither is given."""
        found = self.attributes.integers("axes") if value is None else self.integers(value, "axes")
        return None if found is None else [self.axis(item, rank) for item in found]

    def axis(self, axis: int, rank: int) -> int:
        """Counted from 0."""
        if not -rank <= axis < rank:
            raise CaptureError(f"axis {axis} does not exist among {rank}")
        return axis % rank

    def scalar(self, value: Value) -> Any:
        """The number of a known array of one element, symbolic integers included; None for anything else."""
        if isinstance(value, Known) and value.array.size == 1:
            item = value.items()[0]
            return None if isinstance(item, (torch.SymFloat, torch.SymBool)) else item
        return None

    def number(self, value: Value, what: str, refusal: str) -> Any:
        """Like `scalar`, of what only works when it is known; `refusal` says so."""
        if isinstance(value, Tensor):
            value = self.emitter.binding.numbers(self.emitter, value, what, refusal)
        return self.scalar(value)

    def refuse(self, reason: str) -> CaptureError:
        return CaptureError(reason)
