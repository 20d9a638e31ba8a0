"""Races and their times as a JSON value and blobs, to send them to where they are run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from graphopt.backends.tuner.child import Blob
from graphopt.backends.tuner.measuring import Argument, Entrant, Race, Times
from graphopt.backends.tuner.racing import run_race


def pack_race(race: Race) -> tuple[Any, list[Blob]]:
    """Each library and array is sent once."""
    blobs: dict[int, tuple[int, Any]] = {}

    def place(blob: Any) -> int:
        return blobs.setdefault(id(blob), (len(blobs), blob))[0]

    def argument(item: Argument) -> dict[str, Any]:
        values = None if item.values is None else [place(item.values), item.values.dtype.str]
        return {"role": item.role, "dtype": item.dtype, "shape": item.shape, "values": values, "number": item.number}

    value = {
        "entrants": [
            {
                "library": place(entrant.library),
                "function": entrant.function,
                "cases": [[argument(item) for item in case] for case in entrant.cases],
            }
            for entrant in race.entrants
        ],
        "support": place(race.support),
        "threads": race.threads,
        "turns": race.turns,
        "seconds": race.seconds,
        "cold_bytes": race.cold_bytes,
        "seed": race.seed,
    }
    return value, [_bytes(blob) for _, blob in blobs.values()]


def _bytes(blob: Any) -> Blob:
    return np.ascontiguousarray(blob).reshape(-1).view(np.uint8).data if isinstance(blob, np.ndarray) else bytes(blob)


def unpack_race(value: Any, blobs: Sequence[Blob]) -> Race:
    """What `pack_race` was given."""

    def argument(item: Any) -> Argument:
        shape, values = tuple(item["shape"]), None
        if item["values"] is not None:
            number, dtype = item["values"]
            values = np.frombuffer(blobs[number], np.dtype(dtype)).reshape(shape)
        return Argument(item["role"], item["dtype"], shape, values, item["number"])

    entrants = [
        Entrant(
            bytes(blobs[item["library"]]),
            item["function"],
            tuple(tuple(argument(each) for each in case) for case in item["cases"]),
        )
        for item in value["entrants"]
    ]
    rest = {name: value[name] for name in ("threads", "turns", "seconds", "cold_bytes", "seed")}
    return Race(entrants, bytes(blobs[value["support"]]), **rest)


def pack_times(times: Sequence[Times]) -> Any:
    """As JSON."""
    return [asdict(item) for item in times]


def unpack_times(value: Any) -> list[Times]:
    """What `pack_times` was given."""
    return [Times(tuple(map(tuple, item["seconds"])), item["difference"]) for item in value]


def serve(value: Any, blobs: list[Blob]) -> tuple[Any, list[Blob]]:
    """What a child does with a race."""
    return pack_times(run_race(unpack_race(value, blobs))), []
