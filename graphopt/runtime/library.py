"""Opening native code: `tvm_ffi` without torch, `libtvm_runtime.so` without tvm, libraries from sealed memory.

What was hashed is what gets opened: the bytes are put into a memory file that can no longer change, so nobody can
exchange a file between the check and the opening, and no folder has to be writable.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from graphopt.errors import ArtifactError, MissingExtraError, UsageError

RUNTIME_VARIABLE = "GRAPHOPT_TVM_RUNTIME"
RUNTIME_LIBRARY = "libtvm_runtime.so"
GPU_LIBRARY = "libtvm_runtime_cuda.so"
PINNED = {"apache-tvm-ffi": "0.1.14.post1", "apache-tvm": "0.27.0.post1"}

_lock = threading.RLock()
_ffi: ModuleType | None = None
_libraries: dict[str, Any] = {}  # never closed: a worker thread may be inside one
_opened = 0


def ffi() -> Any:
    """`tvm_ffi` with TVM's runtime loaded; the first call imports and loads, later ones cost nothing.

    Raises MissingExtraError when one of the two is not installed, UsageError when the versions are no pair.
    """
    global _ffi
    if _ffi is None:
        with _lock:
            if _ffi is None:
                _ffi = _load()
    return _ffi


def open_library(name: str, data: bytes, sha256: str) -> Any:
    """The VM module inside a library of that hash; opened once a process, because opening it again would copy it."""
    module = open_kernels(name, data, sha256)
    if not module.implements_function("vm_load_executable"):
        raise ArtifactError(f"library {name} holds no compiled model; compile the artifact again")
    return module


def open_kernels(name: str, data: bytes, sha256: str) -> Any:
    """The same of a library that may hold functions alone."""
    with _lock:
        if sha256 not in _libraries:
            _libraries[sha256] = _open(name, data)
        return _libraries[sha256]


def find_function(library: Any, name: str) -> Any:
    """A function of the library's native part, or None."""
    try:
        return library.get_function(name, query_imports=True)
    except AttributeError:
        return None


def _open(name: str, data: bytes) -> Any:
    global _opened
    load = ffi().get_global_func("ffi.Module.load_from_file.so")
    descriptor = _sealed(name, data)
    _opened += 1
    try:
        # The dynamic linker takes two equal paths for one library, and descriptors are reused: each path is spelled
        # in its own way, the bits of a counter written as "/./" or "//".
        distinct = "".join("./" if bit == "1" else "/" for bit in f"{_opened:b}")
        module = load(f"/proc/self/fd/{distinct}{descriptor}", "")
    except Exception as e:
        reason = str(e).strip().splitlines()[-1]
        raise ArtifactError(f"library {name} cannot be opened on this machine: {reason}") from e
    finally:
        os.close(descriptor)
    return module


def _sealed(name: str, data: bytes) -> int:
    """A descriptor of a memory file that holds `data` and can change no more."""
    descriptor = os.memfd_create(f"graphopt:{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _load() -> ModuleType:
    try:
        with hidden("torch"):
            import tvm_ffi
    except ModuleNotFoundError as e:
        raise MissingExtraError(f"running an artifact needs {e.name}; pip install apache-tvm-ffi") from e
    except (ImportError, OSError) as e:
        reason = str(e).splitlines()[0]
        raise UsageError(f"tvm_ffi cannot be imported ({reason}); pip install {_pair()}") from e
    _check_version("apache-tvm-ffi", tvm_ffi.__version__)
    if tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is None:
        path = find_runtime()
        try:
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        except OSError as e:
            raise UsageError(f"{path} cannot be loaded ({e}); set {RUNTIME_VARIABLE} to a {RUNTIME_LIBRARY}") from e
        if tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is None:
            raise UsageError(
                f"{path} is another library than TVM's runtime; set {RUNTIME_VARIABLE} to {RUNTIME_LIBRARY}"
            )
    module: ModuleType = tvm_ffi
    return module


def load_gpu_runtime() -> None:
    """TVM's runtime for NVIDIA's GPUs, which lies beside its runtime. Raises ArtifactError where it cannot be had."""
    if ffi().get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True) is None:
        path = os.path.join(os.path.dirname(find_runtime()), GPU_LIBRARY)
        try:
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        except OSError as e:
            raise ArtifactError(
                f"{path}, which the artifact's code for a GPU needs, cannot be loaded ({e}); install apache-tvm and "
                "CUDA's runtime library"
            ) from e


def find_runtime() -> str:
    """The path of `libtvm_runtime.so`: what the environment says, else the one beside this file, in a folder that
    was made to ship, else the one in the installed tvm package."""
    given = os.environ.get(RUNTIME_VARIABLE)
    if given:
        if os.path.isdir(given):
            raise UsageError(f"{RUNTIME_VARIABLE} is the folder {given}; name the file {RUNTIME_LIBRARY} in it")
        if not os.path.isfile(given):
            raise UsageError(f"{RUNTIME_VARIABLE} is {given}, and there is no such file")
        return given
    shipped = os.path.join(os.path.dirname(os.path.abspath(__file__)), RUNTIME_LIBRARY)
    if os.path.isfile(shipped):
        return shipped
    for folder in _package_folders("tvm"):
        path = os.path.join(folder, "lib", RUNTIME_LIBRARY)
        if os.path.isfile(path):
            with suppress(importlib.metadata.PackageNotFoundError):
                _check_version("apache-tvm", importlib.metadata.version("apache-tvm"))
            return path
    raise MissingExtraError(
        f"running an artifact needs {RUNTIME_LIBRARY}; pip install apache-tvm=={PINNED['apache-tvm']}, "
        f"or set {RUNTIME_VARIABLE} to the file"
    )


def _package_folders(name: str) -> Sequence[str]:
    """Where a package lies, without importing it; asks the import path first, then finders such as those of pip -e."""
    spec = PathFinder.find_spec(name)
    if spec is None:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            return ()
    return list(spec.submodule_search_locations or ()) if spec else ()


def _check_version(distribution: str, found: str) -> None:
    """TVM and its ffi guard no ABI between versions: another pair crashes without a word."""
    if found != PINNED[distribution]:
        raise UsageError(
            f"{distribution} {found} is installed, graphopt works with one pair only; pip install {_pair()}"
        )


def _pair() -> str:
    return " ".join(f"{name}=={version}" for name, version in PINNED.items())


class _Hide:
    """A finder that says a module is not installed, to one thread only: others may be importing it right now."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name == self._name and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)
        return None


@contextmanager
def hidden(name: str) -> Iterator[None]:
    """`tvm_ffi` imports torch when it can, which costs seconds; a torch that is imported already stays visible."""
    finder = _Hide(name)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
