"""A folder that runs an artifact under a Python with numpy alone: the runtime, `tvm_ffi`, TVM's runtime library."""

from __future__ import annotations

import os
from pathlib import Path

from graphopt.artifact.archive import Sink, create_folder
from graphopt.package.libraries import RUNTIME, TYPING, Libraries, extension_python, find_libraries, installed
from graphopt.package.source import ABOUT, KIND, add, add_about, add_source, open_source
from graphopt.runtime.library import RUNTIME_LIBRARY

_HERE = Path(__file__).parent
_ROOT = _HERE.parent
_NOT_NEEDED = ("tvm_ffi/testing/", "tvm_ffi/stub/")  # of tvm_ffi's own modules
_NATIVE = ("tvm_ffi/core.", "tvm_ffi/lib/libtvm_ffi")  # and libtvm_ffi_testing.so, which the extension links to
_LEGAL = ("METADATA", "RECORD", "LICENSE", "NOTICE")


def write_python_folder(artifact: str | os.PathLike[str], folder: str, wheels: str | None = None) -> None:
    """Write what runs `artifact` as `folder`, whole or not at all, for the machine and Python of the libraries.

    They are those installed here, or those of the folder `wheels`. Raises ArtifactError where the artifact is damaged,
    UsageError where the libraries are not of its machine or not of the versions that work, WriteError.
    """
    libraries = find_libraries(wheels)
    source = open_source(artifact, libraries)
    with create_folder(folder, ABOUT, KIND) as sink:
        add_source(sink, source)
        _add_runtime(sink)
        _add_libraries(sink, libraries)
        add_about(sink, source, libraries, python=extension_python(libraries.ffi))


def _add_runtime(sink: Sink) -> None:
    add(sink, "run.py", (_HERE / "run_shipped.py").read_bytes())
    add(sink, "graphopt/__init__.py", (_HERE / "shipped.py").read_bytes())
    for path in (_ROOT / "errors.py", *sorted((_ROOT / "runtime").glob("*.py"))):
        add(sink, f"graphopt/{path.relative_to(_ROOT)}", path.read_bytes())


def _add_libraries(sink: Sink, libraries: Libraries) -> None:
    add(sink, f"graphopt/runtime/{RUNTIME_LIBRARY}", libraries.tvm.read(RUNTIME))
    for package in (libraries.ffi, libraries.tvm, installed(TYPING)):
        for path, read in sorted(package.files.items()):
            if _is_needed(path):
                add(sink, path, read())


def _is_needed(path: str) -> bool:
    if ".dist-info/" in path:
        return path.endswith(_LEGAL) and not (path.endswith("RECORD") and path.startswith("apache_tvm-"))
    if path.startswith("tvm_ffi/") and not path.startswith(_NOT_NEEDED):
        return path.endswith(".py") or path.startswith(_NATIVE)
    return path == "typing_extensions.py"
