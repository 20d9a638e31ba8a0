"""Makes a trained network smaller and faster on one device, says what it cost, and ships it as one file.

Names are looked up when they are first used: importing graphopt imports neither torch nor a compiler.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from graphopt.capture import Limits, capture
    from graphopt.compile import Artifact, compile
    from graphopt.contract import Declined, Pass, PassContext, PassResult, Rewrite, Timing
    from graphopt.errors import (
        ArtifactError,
        BoundInputError,
        CaptureError,
        CaptureWarning,
        CompileError,
        FeedError,
        FitError,
        GraphoptError,
        MissingExtraError,
        PassError,
        PostconditionError,
        PreconditionError,
        PropagationError,
        RunError,
        UnknownNameError,
        UsageError,
        VerificationError,
        WriteError,
    )
    from graphopt.fit import Distillation, FitOptions, FitResult, fit
    from graphopt.optimize import OptimizeResult, optimize
    from graphopt.program import Domain, Program, SizeRange, State, TensorSpec
    from graphopt.registry import list_passes, list_targets
    from graphopt.rewrite import RewritePass, Rule
    from graphopt.runtime.session import InferenceSession

    __version__: str

__all__ = [
    "Artifact",
    "ArtifactError",
    "BoundInputError",
    "CaptureError",
    "CaptureWarning",
    "CompileError",
    "Declined",
    "Distillation",
    "Domain",
    "FeedError",
    "FitError",
    "FitOptions",
    "FitResult",
    "GraphoptError",
    "InferenceSession",
    "Limits",
    "MissingExtraError",
    "OptimizeResult",
    "Pass",
    "PassContext",
    "PassError",
    "PassResult",
    "PostconditionError",
    "PreconditionError",
    "Program",
    "PropagationError",
    "Rewrite",
    "RewritePass",
    "Rule",
    "RunError",
    "SizeRange",
    "State",
    "TensorSpec",
    "Timing",
    "UnknownNameError",
    "UsageError",
    "VerificationError",
    "WriteError",
    "__version__",
    "capture",
    "compile",
    "fit",
    "list_passes",
    "list_targets",
    "load",
    "optimize",
]

_MODULES = {
    "graphopt.capture": ("Limits", "capture"),
    "graphopt.compile": ("Artifact", "compile"),
    "graphopt.contract": ("Declined", "Pass", "PassContext", "PassResult", "Rewrite", "Timing"),
    "graphopt.fit": ("Distillation", "FitOptions", "FitResult", "fit"),
    "graphopt.optimize": ("OptimizeResult", "optimize"),
    "graphopt.program": ("Domain", "Program", "SizeRange", "State", "TensorSpec"),
    "graphopt.registry": ("list_passes", "list_targets"),
    "graphopt.rewrite": ("RewritePass", "Rule"),
    "graphopt.runtime.session": ("InferenceSession",),
}
_LOCATIONS = {name: module for module, names in _MODULES.items() for name in names}
_LOCATIONS |= {name: "graphopt.errors" for name in __all__ if name.endswith(("Error", "Warning"))}


def load(
    path: str | os.PathLike[str], threads: int | None = None, verify: Literal["full", "code"] = "full"
) -> InferenceSession:
    """Open an artifact: the same as `InferenceSession(path, threads, verify)`."""
    from graphopt.runtime.session import InferenceSession

    return InferenceSession(path, threads=threads, verify=verify)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _LOCATIONS:
        value = getattr(_import(name), name)
    else:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _import(name: str) -> ModuleType:
    try:
        return import_module(_LOCATIONS[name])
    except ImportError as error:
        from graphopt.optional import missing_extra

        missing = missing_extra(f"graphopt.{name}", error)
        if missing is None:
            raise
        raise missing from error


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("graphopt")
    except PackageNotFoundError:
        return "0+unknown"


class _Package(ModuleType):
    """Keeps `graphopt.capture`, `.fit` and the like functions when the modules of their names are imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _LOCATIONS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
