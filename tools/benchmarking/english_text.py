"""English sentences that are on every machine: what the docstrings of Python's standard library say."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SHORTEST, LONGEST = 6, 60  # words
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "turtledemo", "ensurepip"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()/.!?-]*[.!?]")
_WORD = re.compile(r"[A-Za-z][a-z']*")


@cache
def sentences() -> tuple[str, ...]:
    """Each sentence once, file after file; the same on every machine with the same Python.

    The order of files is drawn from their names, so that the last fifth comes from other files of the same kinds.
    """
    found = (sentence for text in _docstrings() for sentence in _prose(text))
    return tuple(dict.fromkeys(found))


def _docstrings() -> Iterator[str]:
    """Sources are parsed, not imported: importing some of them opens windows and browsers."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(paths, key=lambda name: hashlib.sha256(name.encode()).digest()):
        path = paths[name]
        if _LEFT_OUT.intersection(name.split("/")):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
                yield text


def _prose(text: str) -> Iterator[str]:
    """Sentences of a text that are mostly lower-case words, neither code nor tables."""
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in _END.split(" ".join(paragraph.split())):
            words = sentence.split()
            plain = sum(_WORD.fullmatch(word.strip(".,;:'\"()!?")) is not None for word in words)
            if SHORTEST <= len(words) <= LONGEST and plain >= 0.8 * len(words) and _PROSE.fullmatch(sentence):
                yield sentence
