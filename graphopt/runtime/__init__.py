"""Running artifacts with numpy, `tvm_ffi` and `libtvm_runtime.so` alone; torch, onnx and tvm are never imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphopt.runtime.session import InferenceSession, RunInfo, ValueInfo

__all__ = ["InferenceSession", "RunInfo", "ValueInfo"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from graphopt.runtime import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
