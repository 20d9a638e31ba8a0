"""Names of inputs and outputs from paths of keys, fields and indices."""

from __future__ import annotations

from collections.abc import Sequence


def join(path: Sequence[str]) -> str:
    """ "a", "a.b", "a.0": the name of a leaf below a named argument or field."""
    return ".".join(path)


def output_names(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Names of outputs: keys or fields joined with "."; otherwise `output`, or `output_0`, `output_1`, ..."""
    if paths == [()]:
        return ["output"]
    names = []
    for path in paths:
        indexed = bool(path) and path[0].isdigit()
        if indexed and len(paths) == 1:
            path = ("output", *path[1:])
        elif indexed:
            path = (f"output_{path[0]}", *path[1:])
        names.append(join(path))
    return names
