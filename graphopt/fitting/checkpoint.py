"""A fit on disk: all that a later process needs to go on to the very same bits."""

from __future__ import annotations

import hashlib
import os
import pickle
import secrets
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from graphopt.errors import UsageError, WriteError
from graphopt.fitting.options import FitOptions
from graphopt.fitting.trainable import Weight

FORMAT = 1
Identity = dict[str, Any]


def identity(weights: Sequence[Weight], options: FitOptions, loss: str, samples: Mapping[str, int]) -> Identity:
    """What must be equal for a fit to go on: the same weights, data, loss and options. It may go on for longer."""
    names = {weight.name: _digest(weight) for weight in weights}
    fixed = [name for name in vars(options) if name not in ("steps", "epochs", "patience")]
    lasting = {name: getattr(options, name) for name in ("steps", "epochs") if options.schedule != "constant"}
    chosen = {name: getattr(options, name) for name in fixed} | lasting
    return {"format": FORMAT, "weights": names, "loss": loss, "samples": dict(samples), **chosen}


def _digest(weight: Weight) -> str:
    data = weight.initial.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    head = f"{weight.initial.dtype}{list(weight.initial.shape)}".encode()
    return hashlib.sha256(head + data.numpy().tobytes()).hexdigest()


def save(path: Path, state: dict[str, Any]) -> None:
    """Write beside `path`, then rename: there is always a whole checkpoint. Raises WriteError."""
    temporary = path.parent / f".{path.name}-{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            _write(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise WriteError(f"cannot write the checkpoint {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def _write(state: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # torch closes its archive whatever happens, and that fails over what happened
        cause = error.__context__
        if isinstance(cause, (KeyboardInterrupt, OSError)):
            raise cause from None
        raise


def load(path: Path, expected: Identity) -> dict[str, Any]:
    """The state saved under this identity. Raises UsageError where the file is another fit's or cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        state = torch.load(path, weights_only=True)
        found = state["identity"]
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as error:
        raise UsageError(f"the checkpoint {path} cannot be read; delete it to begin anew") from error
    for key in expected:
        if found.get(key) != expected[key]:
            raise UsageError(
                f"the checkpoint {path} is of another fit: {_difference(key, found.get(key), expected[key])}"
            )
    return dict(state)


def _difference(key: str, found: Any, expected: Any) -> str:
    if key != "weights":
        return f"{key} was {found!r} and is {expected!r}"
    if set(found or ()) != set(expected):
        return f"it trains {', '.join(found or ())} instead of {', '.join(expected)}"
    return "it began from other values of the weights"
