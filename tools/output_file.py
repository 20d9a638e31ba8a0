"""Files appear whole or not at all, in place of nothing that was read."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from graphopt.errors import UsageError, WriteError
from graphopt.tools import interrupt

INPUTS = (
    "model",
    "artifact",
    "a",
    "b",
    "input",
    "source",
    "recipe",
    "report",
    "profile",
    "imported",
)  # what the verbs call the files that they read
OUTPUTS = {
    "output": "-o",
    "json": "--json",
    "chart": "--chart",
    "html": "--html",
    "markdown": "--markdown",
    "passing": "--passing",
    "export": "--export",
}


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Write beside `path` and rename at the end; an error leaves what was there before. Raises WriteError."""
    path = Path(path)
    check_folder(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=".graphopt-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o666 & ~current_umask())
            interrupt.check()
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as e:
        raise WriteError(f"cannot write {path}: {e.strerror or e}") from e


def check_outputs(arguments: argparse.Namespace) -> None:
    """Before the work: raises UsageError when an output of any verb cannot be written or is an input or the other."""
    outputs = {option: getattr(arguments, name, None) for name, option in OUTPUTS.items()}
    given = {option: path for option, path in outputs.items() if path is not None and path != "-"}
    read = [path for name in INPUTS if (path := getattr(arguments, name, None))]
    for option, path in given.items():
        check_folder(path)
        for source in read:
            if overwrites(path, source):
                raise UsageError(f"{option} {path} would overwrite the input {source}; write to another file")
    for (option, path), (other, second) in itertools.combinations(given.items(), 2):
        if same_file(path, second):
            raise UsageError(f"{option} and {other} both write {second}; name two files")


def overwrites(output: str, source: str) -> bool:
    """Whether `output` is `source`, the code of package.module:function, or inside an artifact that is a folder."""
    module, colon, _ = source.partition(":")
    if colon and not os.path.exists(source):
        source = module.replace(".", "/") + ".py"
    inside = os.path.realpath(output).startswith(os.path.realpath(source) + os.sep)
    return same_file(output, source) or (inside and os.path.isfile(os.path.join(source, "manifest.json")))


def same_file(a: str, b: str) -> bool:
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)


def check_folder(path: str | Path) -> None:
    """Before minutes of work: raises UsageError when `path` cannot be a file, WriteError when its folder is read-only.

    A string that ends in "/" asks for a folder and may be one.
    """
    asks_for_folder = str(path).endswith("/")
    path = Path(path)
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} does not exist; make that folder or write the output elsewhere")
    if path.is_dir() and not asks_for_folder:
        raise UsageError(f"{path} is a folder; name a file")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UsageError(f"{path} is a device or a pipe; give the name of a regular file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise WriteError(f"cannot write {path}: files cannot be made in its folder; write the output elsewhere")


def check_suffix(path: str, suffixes: tuple[str, ...]) -> None:
    """Raises UsageError unless the name ends in one of `suffixes`."""
    if not path.endswith(suffixes):
        raise UsageError(f"{path} does not say what to write; end its name in {' or '.join(suffixes)}")


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
