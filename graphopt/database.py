"""Where measured configurations of kernels come from: what `database` means in `compile`, `tune` and `optimize`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeAlias

from graphopt.errors import UsageError
from graphopt.runtime.features import missing

if TYPE_CHECKING:
    from graphopt.backends.tuner.record import Hardware
    from graphopt.backends.tuner.store import Store

Database: TypeAlias = "str | os.PathLike[str] | Store | None"


def open_store(database: Database) -> Store:
    """The store that this argument of `compile` means. Raises UsageError."""
    from graphopt.backends.tuner.store import Store

    if database is None:
        return Store.user()
    if isinstance(database, Store):
        return database
    if isinstance(database, (str, os.PathLike)):
        return Store(database)
    raise UsageError(f"database={database!r} is no store; give the path of one, or None for your own")


def hardware_of(target: Any) -> Hardware:
    """What a measurement for this target is valid for: this machine, or any where it cannot be had here."""
    from graphopt.backends.tuner.machine import any_hardware, this_hardware

    return (any_hardware if missing(target.features) else this_hardware)(target.name, target.threads)
