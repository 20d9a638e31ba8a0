"""Tuning without a compiler or a device: kernels are known by their text, and each has a time made up from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import tvm

from graphopt.backends.target import Target
from graphopt.backends.tuner import building, device, local
from graphopt.backends.tuner.measuring import Race, Times

SECONDS = 1e4  # plenty: times are made up, and small spaces end sooner


class FakeBuilder:
    def __init__(self, target: Target) -> None:
        pass

    def build(self, kernels: Sequence[Mapping[str, Any]]) -> list[bytes | str]:
        texts = [[tvm.ir.save_json(kernel) for kernel in each.values()] for each in kernels]
        return [hashlib.sha256("".join(text).encode()).digest() for text in texts]

    def close(self) -> None:
        pass


class FakeMeasurer:
    """The default takes 1 ms, others from half to one and a half times as long."""

    races = 0
    interrupted_after: int | None = None

    def race(self, race: Race, limit: float) -> list[Times]:
        FakeMeasurer.races += 1
        if FakeMeasurer.races == FakeMeasurer.interrupted_after:
            raise KeyboardInterrupt
        ratios = [1.0, *(0.5 + entrant.library[0] / 256 for entrant in race.entrants[1:])]
        cases = [len(entrant.cases) for entrant in race.entrants]
        each = zip(ratios, cases, strict=True)
        return [Times(((ratio * 1e-3,) * race.turns,) * count, 0.0) for ratio, count in each]

    def close(self) -> None:
        pass


def _equally(_: device.ThisMachine, artifact: Any, feeds: device.Feeds) -> Mapping[str, float]:
    return dict.fromkeys(artifact.manifest.variants[0].kernels, 1e-3)


def install(monkeypatch: pytest.MonkeyPatch, candidates: int = 6) -> type[FakeMeasurer]:
    """In place of the real ones, with small spaces."""
    monkeypatch.setattr("graphopt.backends.choice.MOST_CANDIDATES", candidates)
    monkeypatch.setattr(building, "Builder", FakeBuilder)
    monkeypatch.setattr(local, "LocalMeasurer", FakeMeasurer)
    monkeypatch.setattr(device.ThisMachine, "kernel_seconds", _equally)
    FakeMeasurer.races, FakeMeasurer.interrupted_after = 0, None
    return FakeMeasurer
