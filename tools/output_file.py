"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from graphopt.errors import UsageError


@contextlib.contextmanager
def replace_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Write beside `path` and rename at the end; an error leaves what was there before."""
    path = Path(path)
    check_folder(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_folder(path: str | Path) -> None:
    """Before minutes of work: raises UsageError when the folder of `path` does not exist or `path` is a folder.

    A string that ends in "/" asks for a folder and may be one.
    """
    asks_for_folder = str(path).endswith("/")
    path = Path(path)
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} does not exist; make that folder or write the output elsewhere")
    if path.is_dir() and not asks_for_folder:
        raise UsageError(f"{path} is a folder; name a file")


def check_suffix(path: str, suffixes: tuple[str, ...]) -> None:
    """Raises UsageError unless the name ends in one of `suffixes`."""
    if not path.endswith(suffixes):
        raise UsageError(f"{path} does not say what to write; end its name in {' or '.join(suffixes)}")


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
