"""The packages whose files a folder to ship takes along: as they are installed here, or from wheels."""

from __future__ import annotations

import importlib.metadata
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from graphopt.errors import MissingExtraError, UsageError
from graphopt.runtime.library import PINNED

FFI, TVM, TYPING = "apache-tvm-ffi", "apache-tvm", "typing-extensions"
FFI_LIBRARY, RUNTIME = "tvm_ffi/lib/libtvm_ffi.so", "tvm/lib/libtvm_runtime.so"
_MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine of ELF
Read = Callable[[], bytes]


@dataclass(frozen=True)
class Package:
    """`files`: path from the folder that packages are installed into -> what reads it."""

    name: str
    version: str
    files: Mapping[str, Read]

    def read(self, path: str) -> bytes:
        """Raises UsageError where the package lacks the file."""
        if path not in self.files:
            raise UsageError(f"{self.name} {self.version} has no {path}; install {self.name}=={PINNED[self.name]}")
        return self.files[path]()


@dataclass(frozen=True)
class Libraries:
    """TVM's runtime and its ffi, in the pair of versions that work together, for one kind of machine."""

    ffi: Package
    tvm: Package
    machine: str


def find_libraries(wheels: str | None = None) -> Libraries:
    """Those installed here, or those in a folder of wheels. Raises UsageError, MissingExtraError where one lacks."""
    ffi, tvm = (installed(name) if wheels is None else in_wheel(name, Path(wheels)) for name in (FFI, TVM))
    for package in (ffi, tvm):
        if package.version != PINNED[package.name]:
            raise UsageError(
                f"{package.name} is {package.version}, and graphopt works with {PINNED[package.name]} only; "
                f"pip install {package.name}=={PINNED[package.name]}"
            )
    machines = [elf_machine(ffi.read(FFI_LIBRARY)), elf_machine(tvm.read(RUNTIME))]
    if machines[0] != machines[1]:
        raise UsageError(f"the wheels of {FFI} and {TVM} are for {machines[0]} and {machines[1]}; get them for one")
    return Libraries(ffi, tvm, machines[0])


def installed(name: str) -> Package:
    """A package of this Python. Raises MissingExtraError."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as e:
        hint = f"{name}=={PINNED[name]}" if name in PINNED else name
        raise MissingExtraError(
            f"a folder to ship takes {name} along, which is not installed; pip install {hint}"
        ) from e
    files = {
        str(path): Path(str(path.locate())).read_bytes for path in distribution.files or () if ".." not in path.parts
    }
    return Package(name, distribution.version, files)


def in_wheel(name: str, folder: Path) -> Package:
    """A package from the one wheel of it in a folder. Raises UsageError."""
    stem = name.replace("-", "_")
    found = sorted(folder.glob(f"{stem}-*.whl"))
    if len(found) != 1:
        raise UsageError(f"{folder} has {len(found)} wheels of {name}; one is needed: {download_hint()}")
    try:
        archive = zipfile.ZipFile(found[0])
    except (OSError, zipfile.BadZipFile) as e:
        raise UsageError(f"{found[0]} cannot be read as a wheel ({e}); get it again: {download_hint()}") from e
    files = {path: partial(archive.read, path) for path in archive.namelist() if not path.endswith("/")}
    return Package(name, found[0].name.split("-")[1], files)


def download_hint(machine: str = "aarch64", python: str = "3.11") -> str:
    """The command that gets both wheels for another machine."""
    pair = " ".join(f"{name}=={version}" for name, version in PINNED.items())
    return (
        f"pip download --no-deps --only-binary=:all: --platform manylinux_2_28_{machine} --python-version {python} "
        f"-d wheels {pair}"
    )


def elf_machine(data: bytes | memoryview) -> str:
    """The kind of machine that a library is for, as uname spells it. Raises UsageError for what is no library."""
    head = bytes(data[:20])
    if len(head) < 20 or head[:4] != b"\x7fELF":
        raise UsageError("a library is no ELF file; get the artifact or the package again")
    number: int = struct.unpack_from("<H", head, 18)[0]
    return _MACHINES.get(number, f"ELF machine {number}")


def extension_python(ffi: Package) -> str:
    """The version of Python, "3.11", that the ffi's extension module is for. Raises UsageError."""
    names = [match for path in ffi.files if (match := re.fullmatch(r"tvm_ffi/core\.cpython-3(\d+)-.*\.so", path))]
    if len(names) != 1:
        raise UsageError(f"{ffi.name} {ffi.version} is not for one version of Python; take the wheel of one, cp311 say")
    return f"3.{names[0][1]}"
