"""A model with all that runs it but numpy: `graphopt.InferenceSession("model.gopt")`, as graphopt itself has it.

Made by `graphopt package`. Whether this Python and this machine are those that it was made for is checked first, in a
file that older versions of Python can read, too.
"""

from __future__ import annotations

import json
import os
import sys


def _check() -> None:
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with open(os.path.join(folder, "graphopt-package.json")) as file:
        made = json.load(file)
    python, machine = "{}.{}".format(*sys.version_info[:2]), os.uname()[4]
    if python != made["python"]:
        raise ImportError(
            f"this folder was made for Python {made['python']} and this is Python {python}; run it with "
            f"python{made['python']}, or make it again with `graphopt package` under Python {python}"
        )
    if machine != made["machine"]:
        raise ImportError(
            f"this folder was made for {made['machine']} machines and this one is {machine}; "
            f"make one for it with `graphopt package --wheels`"
        )


_check()

from graphopt.errors import (  # noqa: E402
    ArtifactError,
    BoundInputError,
    FeedError,
    GraphoptError,
    MissingExtraError,
    RunError,
    UnknownNameError,
    UsageError,
)
from graphopt.runtime.session import InferenceSession  # noqa: E402

__all__ = [
    "ArtifactError",
    "BoundInputError",
    "FeedError",
    "GraphoptError",
    "InferenceSession",
    "MissingExtraError",
    "RunError",
    "UnknownNameError",
    "UsageError",
    "load",
]

load = InferenceSession
