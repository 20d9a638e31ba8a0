"""numpy arrays in and out of tvm_ffi tensors, without a copy wherever the memory allows it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphopt.runtime.dtypes import CARRIED, DTYPES
from graphopt.runtime.library import ffi
from graphopt.runtime.weights import ALIGNMENT

SMALL = 16 << 10  # bytes; the library's allocator hands out whole pages, which a copy lets it use again
CPU, GPU = 1, 2  # kinds of devices, as DLPack numbers them
_DLPACK_WITH_FLAGS = (1, 0)  # the first version that can say "read-only"


def to_device(array: np.ndarray, dtype: str) -> Any:
    """A tensor of that dtype over the array's memory, or over a copy when it is strided, swapped or unaligned.

    `array` has the manifest's dtype, or the unsigned integers that carry its bits. Kernels never write into inputs,
    so read-only memory is taken as it is.
    """
    carrier = DTYPES[dtype].carrier
    if array.dtype != carrier:
        array = array.view(carrier) if array.dtype.itemsize == carrier.itemsize and array.dtype.kind == "V" else array
    if array.dtype != carrier or not array.flags.c_contiguous:
        array = aligned_copy(array, carrier)
    if not array.size:  # numpy's strides of an empty array are not those that kernels expect
        return _viewed(_wrap(array.reshape(-1)), array.shape, dtype)
    tensor = _wrap(array)
    if tensor.data_ptr() % ALIGNMENT:
        tensor = _wrap(aligned_copy(array, carrier))
    return _viewed(tensor, array.shape, dtype) if dtype in CARRIED else tensor


def _wrap(array: np.ndarray) -> Any:
    if array.flags.writeable:
        return ffi().from_dlpack(array)
    return ffi().from_dlpack(array.__dlpack__(max_version=_DLPACK_WITH_FLAGS))


def _viewed(tensor: Any, shape: tuple[int, ...], dtype: str) -> Any:
    view = ffi().get_global_func("runtime.TVMTensorCreateView")
    return view(tensor, ffi().Shape(shape), ffi().dtype(dtype), 0)


def copy_to_gpu(tensor: Any) -> Any:
    """The tensor's copy in the memory of the first GPU."""
    return ffi().get_global_func("vm.builtin.to_device")(tensor, GPU, 0)


def from_device(tensor: Any, dtype: str) -> np.ndarray:
    """The tensor as an array of the caller's: over the same memory if large, copied out of a whole page if small.

    bfloat16, which numpy lacks, is widened to float32; that is exact.
    """
    array = as_array(tensor, dtype)
    if dtype in CARRIED:
        return widen(array, dtype)
    return array.copy() if array.nbytes <= SMALL else array


def as_array(tensor: Any, dtype: str) -> np.ndarray:
    """The tensor's own memory as an array, in the unsigned integers that carry the bits of what numpy lacks."""
    return np.from_dlpack(_viewed(tensor, tensor.shape, DTYPES[dtype].carrier.name) if dtype in CARRIED else tensor)


def widen(array: np.ndarray, dtype: str) -> np.ndarray:
    """The bits of a bfloat16 array as float32; other dtypes as they are."""
    return np.asarray(array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array


def aligned_copy(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """A C-contiguous copy that starts at a multiple of 64 bytes."""
    copy = aligned_empty(array.shape, dtype)
    copy[...] = array
    return copy


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Memory that starts at a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def zeros(shape: tuple[int, ...], dtype: str) -> Any:
    """A tensor of zeros, of memory that the system gives when it is first written to."""
    carrier = DTYPES[dtype].carrier
    raw = np.zeros(math.prod(shape) * carrier.itemsize + ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % ALIGNMENT
    return to_device(raw[start : start + raw.size - ALIGNMENT].view(carrier).reshape(shape), dtype)


def copy_tensor(tensor: Any, dtype: str) -> Any:
    """A tensor with memory of its own."""
    source = as_array(tensor, dtype)
    copy = _wrap(aligned_copy(source, source.dtype))
    return _viewed(copy, source.shape, dtype) if dtype in CARRIED else copy
