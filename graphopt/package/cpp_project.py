"""A project that runs an artifact in a C++ program: headers, an example, TVM's runtime libraries, how to build it."""

from __future__ import annotations

import os
from pathlib import Path

from graphopt.artifact.archive import Sink, create_folder
from graphopt.package.libraries import FFI_LIBRARY, RUNTIME, Libraries, find_libraries
from graphopt.package.source import ABOUT, KIND, add, add_about, add_source, open_source

_TEMPLATE = Path(__file__).parent / "cpp"
_HEADERS = {"tvm_ffi/include/tvm/ffi/c_api.h": "tvm/ffi/c_api.h", "tvm_ffi/include/dlpack/dlpack.h": "dlpack/dlpack.h"}
_MADE_FOR = """#pragma once

#ifndef __{machine}__
#error "this folder was made for {machine}; take a compiler for it, or package the artifact for this machine"
#endif

#define GRAPHOPT_MACHINE "{machine}"
"""


def write_cpp_project(artifact: str | os.PathLike[str], folder: str, wheels: str | None = None) -> None:
    """Write the project as `folder`, whole or not at all, for the machine of the libraries.

    They are those installed here, or those of the folder `wheels`. Raises ArtifactError where the artifact is damaged,
    UsageError where the libraries are not of its machine or not of the versions that work, WriteError.
    """
    libraries = find_libraries(wheels)
    source = open_source(artifact, libraries)
    with create_folder(folder, ABOUT, KIND) as sink:
        add_source(sink, source)
        for path in sorted(path for path in _TEMPLATE.rglob("*") if path.is_file()):
            add(sink, str(path.relative_to(_TEMPLATE)), path.read_bytes())
        _add_libraries(sink, libraries)
        add_about(sink, source, libraries)


def _add_libraries(sink: Sink, libraries: Libraries) -> None:
    for path, header in _HEADERS.items():
        add(sink, f"include/{header}", libraries.ffi.read(path))
    add(sink, "lib/libtvm_ffi.so", libraries.ffi.read(FFI_LIBRARY))
    add(sink, "lib/libtvm_runtime.so", libraries.tvm.read(RUNTIME))
    for package in (libraries.ffi, libraries.tvm):
        for path, read in sorted(package.files.items()):
            if ".dist-info/" in path and path.endswith(("LICENSE", "NOTICE")):
                add(sink, f"licenses/{package.name}/{path.rpartition('/')[2]}", read())
    add(sink, "include/graphopt/made_for.hpp", _MADE_FOR.format(machine=libraries.machine).encode())
    add(sink, "made_for.cmake", f"set(GRAPHOPT_MACHINE {libraries.machine})\n".encode())
