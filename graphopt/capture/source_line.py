"""The line of the user's model that an exception or a shape guard comes from."""

from __future__ import annotations

import linecache
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch._guards import SLoc
from torch.fx.experimental.symbolic_shapes import ShapeEnv

DIRECT = "the model's own code"
_LOCK = threading.Lock()
_TORCH = Path(torch.__file__).parent
_OPERATORS = tuple(str(_TORCH / name) for name in ("_prims", "_refs", "_subclasses", "_meta", "_decomp", "_ops"))
_OURS = tuple(f"{folder}/" for folder in (Path(torch.__file__).parent, Path(__file__).parent.parent))


def is_user_file(filename: str) -> bool:
    """Whether code in this file belongs to the model (or a model library), not to torch, graphopt or generated code."""
    return not filename.startswith((*_OURS, "<"))


def location(filename: str, line: int) -> str:
    """ "model.py:12: `if x.shape[0] == 4:`" for messages."""
    text = linecache.getline(filename, line).strip()
    return f"{filename}:{line}: `{text}`" if text else f"{filename}:{line}"


def of_exception(error: BaseException, boundary: str) -> str | None:
    """Where the model raised: the innermost line of user code called from inside the function named `boundary`."""
    current: BaseException | None = error
    while current is not None:
        frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(current.__traceback__)]
        found = _innermost(frames, boundary)
        if found is not None:
            return found
        current = current.__cause__ or current.__context__
    return None


@contextmanager
def guards_located(boundary: str) -> Iterator[None]:
    """While this is entered, torch notes for each shape guard the line of user code that asked, not its own.

    `boundary` is the file that calls torch.export. A guard asked for by user code itself, not by an operator that it
    calls, has `DIRECT` as its framework location.
    """

    def locate(self: ShapeEnv, framework_loc: str | None = None) -> SLoc:
        return _user_location(boundary) or original(self, framework_loc)

    with _LOCK:
        original = ShapeEnv._get_sloc
        ShapeEnv._get_sloc = locate  # type: ignore[method-assign]
        try:
            yield
        finally:
            ShapeEnv._get_sloc = original  # type: ignore[method-assign]


def _user_location(boundary: str) -> SLoc | None:
    """The innermost line of user code that is running now, above the call in file `boundary`."""
    frame: FrameType | None = sys._getframe(2)
    direct = True
    while frame is not None and frame.f_code.co_filename != boundary:
        filename = frame.f_code.co_filename
        if is_user_file(filename):
            return SLoc(DIRECT if direct else "operator", location(filename, frame.f_lineno))
        direct = direct and not filename.startswith(_OPERATORS)
        frame = frame.f_back
    return None


def _innermost(frames: Iterable[tuple[str, int]], boundary: str) -> str | None:
    inside = False
    found: str | None = None
    for filename, line in frames:
        if filename == boundary:
            inside, found = True, None
        elif inside and is_user_file(filename):
            found = location(filename, line)
    return found
