"""Records for tests: the configuration repeats the workload's parameters, so that a mixed-up record tells on itself."""

from __future__ import annotations

from typing import Any

from graphopt.backends.tuner.record import Hardware, Parameter, Record, Workload

HARDWARE = Hardware("cpu:x86-64-v4", ("avx512f", "fma", "x86_64"), 2, "0.27.0")
PROVENANCE = {"device": "a CPU", "date": "2026-01-31T12:00:00+00:00"}


def make_record(
    seconds: float = 1e-5, hardware: Hardware = HARDWARE, about: dict[str, str] | None = None, **parameters: Parameter
) -> Record:
    """A record of the workload "gemm" with these parameters, whose default takes 20 us."""
    workload = Workload.of("gemm", parameters)
    return Record(workload, hardware, dict(workload.parameters), seconds, 2e-5, PROVENANCE | (about or {}))


def lines_of(*records: Record) -> bytes:
    """What a store's file holds after these were appended."""
    return b"".join(record.to_line() for record in records)


def is_its_own(record: Record) -> bool:
    """Whether workload and configuration still belong together."""
    wanted: Any = record.configuration
    return record.workload == Workload.of("gemm", wanted)
