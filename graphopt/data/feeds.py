"""What a data set gives, turned into the tensors a program takes: a value is rounded at most, never changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from graphopt.errors import FeedError
from graphopt.program import Program, TensorSpec

_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch compares and converts them, and little else


def read_inputs(program: Program, feed: Mapping[str, Any], where: str) -> tuple[torch.Tensor, ...]:
    """The inputs of `program` in its order, copied from arrays, tensors or numbers by name.

    Floating-point values are rounded to the input's type; integers and booleans go into every type that holds them
    exactly. A bound input may be left out. Raises FeedError, which starts with `where`, for other names, types, ranks
    or sizes, for NaN, and for ids outside of the input's domain, BoundInputError for another value than the bound one.
    """
    check_names(program, feed, where)
    feed = {**program.bound, **feed}
    inputs = tuple(_read_input(spec, feed[spec.name], where) for spec in program.inputs)
    try:
        program.bind(inputs)
    except FeedError as e:
        raise type(e)(f"{where}: {e}") from e
    return inputs


def check_names(program: Program, names: Mapping[str, Any], where: str) -> None:
    """Raises FeedError unless `names` are those of the program's inputs, in any order; bound ones may lack."""
    wanted = [spec.name for spec in program.inputs]
    wrong = [f"lacks {name!r}" for name in wanted if name not in names and name not in program.bound]
    wrong += [f"has {name!r}" for name in names if name not in wanted]
    if wrong:
        raise FeedError(f"{where} {' and '.join(wrong)}; give an array for each of {', '.join(wanted)}, and no other")


def _read_input(spec: TensorSpec, value: Any, where: str) -> torch.Tensor:
    where = f"{where}: input {spec.name!r}"
    tensor = cast(read_tensor(value, where), spec.dtype, where)
    if tensor.dim() == len(spec.shape) - 1:
        raise FeedError(
            f"{where} has {tensor.dim()} axes, the program takes {list(spec.shape)}; a sample brings its batch axis, "
            "write array[None]"
        )
    check_values(tensor, spec, where)
    return tensor


def check_values(tensor: torch.Tensor, spec: TensorSpec, where: str) -> None:
    """Raises FeedError for NaN and for ids that the program has no row for."""
    if (tensor.is_floating_point() or tensor.is_complex()) and bool(tensor.isnan().any()):
        raise FeedError(f"{where} holds NaN; fill it or leave the sample out")
    if spec.domain.kind == "ids" and tensor.numel():
        values = tensor.to(torch.int64)
        for value in (int(values.min()), int(values.max())):
            if not spec.domain.low <= value <= spec.domain.high:
                raise FeedError(
                    f"{where} holds the id {value}, the program takes {spec.domain.low} to {spec.domain.high}; "
                    "leave the sample out or map the id"
                )


def read_label(value: Any, where: str) -> torch.Tensor:
    """A label as a tensor of finite numbers, in its own type and shape. Raises FeedError."""
    tensor = read_tensor(value, f"{where}: the label")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise FeedError(f"{where}: the label is not finite; leave the sample out")
    return tensor


def read_tensor(value: Any, where: str) -> torch.Tensor:
    """A copy on the CPU of an array, tensor, number or list of numbers. Raises FeedError for anything else."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized:
            raise FeedError(f"{where} is a tensor of layout {value.layout}; give a plain one, such as value.to_dense()")
        return value.detach().to("cpu", copy=True)
    try:
        array = np.asarray(value)
    except ValueError as e:
        raise FeedError(f"{where} is a list of unequal rows; give a numpy array") from e
    if array.dtype.kind not in "biufc" or array.dtype.itemsize > 8 * (1 + (array.dtype.kind == "c")):
        kind = type(value).__name__ if array.dtype.hasobject else str(array.dtype)
        raise FeedError(f"{where} is {kind}, which is no plain number; give numbers, such as numpy.float32 or int64")
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True))


def cast(tensor: torch.Tensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    """`tensor` as `dtype`: floating-point values may round, and nothing else may change. Raises FeedError."""
    if tensor.dtype == dtype:
        return tensor
    given = tensor.dtype
    if _rank(given) > _rank(dtype):
        raise FeedError(f"{where} is {_name(given)}, the program takes {_name(dtype)}; {_advice(dtype)}")
    if given in _WIDE_UNSIGNED:
        tensor = tensor.to(torch.int64)
    result = tensor.to(dtype)
    if tensor.is_floating_point() or tensor.is_complex():
        kept = torch.equal(result.isfinite(), tensor.isfinite())
    else:
        kept = torch.equal(result.to(tensor.dtype), tensor) and not (given == torch.uint64 and bool((tensor < 0).any()))
    if not kept:
        raise FeedError(f"{where} is {_name(given)} with values that {_name(dtype)} cannot hold; {_advice(dtype)}")
    return result


def _rank(dtype: torch.dtype) -> int:
    """Integers and booleans, real numbers, complex numbers: a value goes into its own kind or a later one."""
    return 2 if dtype.is_complex else 1 if dtype.is_floating_point else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _advice(dtype: torch.dtype) -> str:
    return f"check that this is the right array, then write array.astype({_name(dtype)!r})"
