"""TVM's CUDA runtime on a machine without a GPU: it is needed to build a library, and asks for NVIDIA's libraries.

Without them TVM would put the source of the kernels into the library in place of their code, and say nothing. Stand-ins
with the same names answer every call with "no device".
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tvm
import tvm_ffi

from graphopt.backends.linker import HINT, find_linker
from graphopt.errors import CompileError

_RUNTIME = "libtvm_runtime_cuda.so"
_MAKER = "ffi.Module.create.cuda"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE and cudaErrorNoDevice
# fmt: off
_DRIVER = (
    "cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString",
    "cuLaunchKernelEx", "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
_API = (
    "cudaDeviceGetAttribute", "cudaEventCreate", "cudaEventDestroy", "cudaEventElapsedTime",
    "cudaEventRecord", "cudaEventSynchronize", "cudaFree", "cudaFreeHost", "cudaGetDevice",
    "cudaGetDeviceCount", "cudaGetDeviceProperties", "cudaGetErrorName", "cudaGetErrorString",
    "cudaGetLastError", "cudaGraphDestroy", "cudaGraphExecDestroy", "cudaGraphInstantiate",
    "cudaGraphLaunch", "cudaMalloc", "cudaMallocHost", "cudaMemGetInfo", "cudaMemcpyAsync",
    "cudaMemcpyPeerAsync", "cudaPeekAtLastError", "cudaSetDevice", "cudaStreamBeginCapture",
    "cudaStreamCreate", "cudaStreamCreateWithFlags", "cudaStreamDestroy",
    "cudaStreamEndCapture", "cudaStreamSynchronize", "cudaStreamWaitEvent",
)
# fmt: on
_LIBRARIES = (("libcuda.so.1", _DRIVER), ("libcudart.so.13", _API))


def load_cuda_runtime() -> None:
    """Make TVM able to hold code for CUDA devices. Raises CompileError where that cannot be done."""
    if tvm_ffi.get_global_func(_MAKER, allow_missing=True) is not None:
        return
    for name, functions in _LIBRARIES:
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        except OSError:
            _load_stand_in(name, functions)
    path = Path(tvm.__file__).parent / "lib" / _RUNTIME
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as e:
        raise CompileError(f"TVM's runtime for CUDA cannot be loaded ({e}); reinstall apache-tvm") from e
    if tvm_ffi.get_global_func(_MAKER, allow_missing=True) is None:
        raise CompileError(f"{path} is another library than TVM's runtime for CUDA; reinstall apache-tvm")


def _load_stand_in(name: str, functions: Sequence[str]) -> None:
    command = find_linker()
    if command is None:
        raise CompileError(f"no C compiler found to build for CUDA devices; {HINT}")
    with tempfile.TemporaryDirectory() as folder:
        source, versions, library = (Path(folder) / each for each in ("stand_in.c", "versions", name))
        source.write_text("".join(f"int {function}(void) {{ return {_NO_DEVICE}; }}\n" for function in functions))
        versions.write_text(f"{name} {{ global: *; }};\n")  # as NVIDIA's own names its version
        flags = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}"]
        done = subprocess.run(
            [*command, *flags, "-o", str(library), str(source)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            words = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise CompileError(f"{command[0]} could not link a stand-in for {name}: {words}; {HINT}")
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
