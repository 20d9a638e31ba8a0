"""CUDA C++ to machine code: by NVRTC, which is fast, for one architecture; by nvcc for several, and for newer ones."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tvm_ffi

from graphopt.errors import CompileError

_CALLBACK = "tvm_callback_cuda_compile"
_PRELUDE = Path(__file__).with_name("prelude.cu")
_STANDARD = Path(__file__).with_name("nvrtc_standard.h")
_STANDARD_NAMES = (b"cuda/std/cstdint", b"cuda/std/type_traits")
_NVRTC = ("libnvrtc.so.13", "libnvrtc.so.12")
_CUDA_MACHINE = 190  # e_machine of ELF files with code for a GPU
_NEW_ABI = 8  # of ELF files from CUDA 13 on, which have the architecture in another byte of their flags
_LONGEST = 600  # seconds
HINT = "install the CUDA toolkit (nvcc), or run: pip install 'graphopt[cuda]'"

Compile = Callable[[str], bytes]


def find_compiler(archs: Sequence[str]) -> Compile:
    """What compiles a source for these architectures ("sm_87"). Raises CompileError where nothing can."""
    library, nvcc = find_nvrtc(), find_nvcc()
    if library is not None and len(archs) == 1 and archs[0] in _supported(library):
        return lambda source: _with_nvrtc(library, source, archs[0])
    if nvcc is not None:
        return lambda source: _with_nvcc(nvcc, source, archs)
    if library is None:
        raise CompileError(f"no compiler for CUDA devices found; {HINT}")
    raise CompileError(
        f"NVRTC makes code for one of {', '.join(_supported(library))}, not for {' and '.join(archs)}; choose one, or "
        "install the CUDA toolkit (nvcc)"
    )


def _supported(library: ctypes.CDLL) -> tuple[str, ...]:
    count = ctypes.c_int()
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    archs = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(archs)
    return tuple(f"sm_{arch}" for arch in archs)


def find_nvcc() -> str | None:
    """$CUDA_PATH's own, else the first one on the path."""
    given = os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(given) / "bin")) if given else shutil.which("nvcc")


def find_nvrtc() -> ctypes.CDLL | None:
    """NVIDIA's library from its pip package, else the system's."""
    for path in [*_packaged(), *_NVRTC]:
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    return None


def _packaged() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for name in _NVRTC:
            yield from sorted(Path(folder).glob(f"*/lib/{name}"))


@contextmanager
def compiling(compile_source: Compile) -> Iterator[None]:
    """TVM compiles sources by `compile_source` inside, with the functions that kernels call."""
    before = tvm_ffi.get_global_func(_CALLBACK, allow_missing=True)

    def compiled(source: str, *_: Any) -> bytes:
        return compile_source(f"{_PRELUDE.read_text(encoding='utf-8')}\n{source}")

    tvm_ffi.register_global_func(_CALLBACK, compiled, override=True)
    try:
        yield
    finally:
        if before is not None:
            tvm_ffi.register_global_func(_CALLBACK, before, override=True)


def _with_nvcc(nvcc: str, source: str, archs: Sequence[str]) -> bytes:
    """A fat binary. Its bytes depend on the names given, so files have the same names in a folder of their own."""
    codes = [flag for arch in archs for flag in ("-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}")]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernels.cu").write_text(source, encoding="utf-8")
        command = [nvcc, "--fatbin", "-O3", "-std=c++17", *codes, "-o", "kernels.fatbin", "kernels.cu"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=_LONGEST)
        except subprocess.TimeoutExpired as e:
            raise CompileError(f"nvcc took over {_LONGEST} seconds; compile fewer kernels together") from e
        if done.returncode:
            raise CompileError(f"nvcc could not compile the kernels: {_first_error(done.stderr)}")
        return (Path(folder) / "kernels.fatbin").read_bytes()


def _first_error(log: str) -> str:
    lines = log.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[0])


def _with_nvrtc(library: ctypes.CDLL, source: str, arch: str) -> bytes:
    """One cubin."""
    program = ctypes.c_void_p()
    text = source.encode()

    def call(name: str, *arguments: Any) -> None:
        if (status := getattr(library, name)(*arguments)) != 0:
            raise CompileError(f"NVRTC could not compile the kernels: {_first_error(_log(library, program)) or status}")

    header = _STANDARD.read_bytes()
    bodies = (ctypes.c_char_p * len(_STANDARD_NAMES))(*[header] * len(_STANDARD_NAMES))
    names = (ctypes.c_char_p * len(_STANDARD_NAMES))(*_STANDARD_NAMES)
    call("nvrtcCreateProgram", ctypes.byref(program), text, b"kernels.cu", len(_STANDARD_NAMES), bodies, names)
    try:
        options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17"]
        options += [f"--include-path={folder}".encode() for folder in _headers()]
        call("nvrtcCompileProgram", program, len(options), (ctypes.c_char_p * len(options))(*options))
        size = ctypes.c_size_t()
        call("nvrtcGetCUBINSize", program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        call("nvrtcGetCUBIN", program, code)
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _headers() -> Iterator[Path]:
    """Folders with `cuda_fp16.h`, which NVRTC does not bring itself."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        yield from sorted(path.parent for path in Path(folder).glob("*/include/cuda_fp16.h"))


def _log(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(max(1, size.value))
    library.nvrtcGetProgramLog(program, log)
    return log.value.decode(errors="replace")


def cubins(data: bytes) -> tuple[str, ...]:
    """The architectures ("sm_87") that the file has machine code for, one for each ELF file with code for a GPU."""
    found, start = [], data.find(b"\x7fELF")
    while start >= 0:
        if data[start + 18 : start + 20] == struct.pack("<H", _CUDA_MACHINE):
            (flags,) = struct.unpack_from("<I", data, start + 48)
            found.append(f"sm_{flags >> 8 & 255 if data[start + 8] >= _NEW_ABI else flags & 255}")
        start = data.find(b"\x7fELF", start + 4)
    return tuple(found)


def check_machine_code(library: bytes, archs: Sequence[str]) -> None:
    """Raise CompileError unless the library has machine code for each of the architectures, and no source."""
    found = cubins(library)
    if lacking := [arch for arch in archs if arch not in found]:
        raise CompileError(f"the library has no machine code for {', '.join(lacking)}; report this")
    if b"__global__" in library:
        raise CompileError("the library holds the source of its kernels; report this")
