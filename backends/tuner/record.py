"""What tuning found: the best configuration measured for one workload on one kind of hardware, as one line of text.

A line is a JSON object that ends in the CRC-32 of what stands before it. The workload's key is written beside the
workload and computed again by the reader: a line that is torn, altered, or speaks of another workload is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, cast

from graphopt.errors import UsageError

Parameter = int | str | bool
Setting = bool | int | float | str

_CHECKSUM = ', "crc32": "%08x"}'
_SUFFIX = len(_CHECKSUM % 0)


@dataclass(frozen=True)
class Workload:
    """Everything that decides which configuration of a rule's kernel is best; `Workload.of` sorts the parameters.

    A size is an integer, or "?" where it is known at run time only. Equal keys mean the same workload; compare these,
    as Python holds True and 1 for equal.
    """

    rule: str
    parameters: tuple[tuple[str, Parameter], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.parameters]
        if names != sorted(set(names)):
            raise UsageError(f"parameters of {self.rule} are {names}; give each once, sorted by name, or Workload.of")
        for name, value in self.parameters:
            _check_scalar(f"parameter {name!r} of {self.rule}", value, (bool, int, str))

    @classmethod
    def of(cls, rule: str, parameters: Mapping[str, Parameter]) -> Workload:
        """The workload of a rule with these parameters in any order."""
        return cls(rule, tuple(sorted(parameters.items())))

    @cached_property
    def key(self) -> str:
        """Readable, and unique by the hash at its end: "packed-gemm dtype=float32 n=384 rows=? #0f2a..."."""
        canonical = json.dumps([self.rule, self.parameters], separators=(",", ":"))
        return f"{self} #{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"

    def __str__(self) -> str:
        return " ".join([self.rule, *(f"{name}={_spelled(value)}" for name, value in self.parameters)])

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it, the key included."""
        return {"rule": self.rule, "parameters": dict(self.parameters), "key": self.key}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Workload:
        """Raises UsageError where this is no workload, or the key is another workload's."""
        try:
            workload = cls.of(_text(value["rule"]), value["parameters"])
            key = value["key"]
        except (KeyError, TypeError, AttributeError) as e:
            raise UsageError("a workload is a rule, parameters and a key; give what `to_json` returned") from e
        if workload.key != key:
            raise UsageError(f"the key {key!r} is that of another workload than {workload}; measure it again")
        return workload


@dataclass(frozen=True)
class Hardware:
    """What a record is valid for, all of which keys it: another target, CPU, number of threads or TVM may want another.

    `features` are the CPU's instruction sets, sorted (`machine.instruction_sets`). Without any, as when compiling for a
    machine that is not at hand, a lookup takes records of every CPU with the same target, threads and TVM.
    """

    target: str
    features: tuple[str, ...]
    threads: int
    tvm: str

    def __post_init__(self) -> None:
        if list(self.features) != sorted(set(self.features)) or any(name.split() != [name] for name in self.features):
            raise UsageError(f"CPU features are {list(self.features)}; give each once, sorted")
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 1:
            raise UsageError(f"threads is {self.threads!r}; give a number of at least 1")

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it, the features in one string."""
        return asdict(self) | {"features": " ".join(self.features)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Hardware:
        """Raises UsageError where this is no hardware."""
        try:
            features = tuple(_text(value["features"]).split())
            return cls(_text(value["target"]), features, value["threads"], _text(value["tvm"]))
        except (KeyError, TypeError) as e:
            raise UsageError("hardware is target, features, threads and tvm; give what `to_json` returned") from e


@dataclass(frozen=True)
class Record:
    """A configuration that was measured: median `seconds` beside those of the rule's default in the same run.

    `provenance` says where and when: "device" (the CPU's name) and "date" (ISO 8601 with a time zone) are required,
    clocks and versions follow where they can be read (`machine.provenance`).
    """

    workload: Workload
    hardware: Hardware
    configuration: Mapping[str, Setting]
    seconds: float
    default_seconds: float
    provenance: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.hardware.features:
            raise UsageError(f"a record of {self.workload} names no CPU features; give those of the device it is from")
        for name, value in self.configuration.items():
            _check_scalar(f"setting {name!r} of {self.workload}", value, (bool, int, float, str))
        for name, seconds in (("seconds", self.seconds), ("default_seconds", self.default_seconds)):
            if not isinstance(seconds, int | float) or not (math.isfinite(seconds) and seconds > 0):
                raise UsageError(f"{name} of {self.workload} is {seconds!r}; give a finite number above 0")
        for name, value in self.provenance.items():
            _check_scalar(f"provenance {name!r} of {self.workload}", value, (str,))
        if "device" not in self.provenance or "date" not in self.provenance:
            raise UsageError(f"provenance of {self.workload} lacks device or date; start from machine.provenance()")
        if _date(self.provenance["date"]).tzinfo is None:
            raise UsageError(f"the date {self.provenance['date']!r} has no time zone; write it as ISO 8601 in UTC")

    @property
    def ratio(self) -> float:
        """Of the default's time: under 1 is faster. Both sides ran in turns, so clocks and other load cancel out."""
        return self.seconds / self.default_seconds

    @property
    def date(self) -> datetime:
        """When it was measured."""
        return _date(self.provenance["date"])

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "workload": self.workload.to_json(),
            "hardware": self.hardware.to_json(),
            "configuration": dict(self.configuration),
            "seconds": self.seconds,
            "default_seconds": self.default_seconds,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        """Raises UsageError where this is no record, or its key is that of another workload."""
        try:
            return cls(
                Workload.from_json(value["workload"]),
                Hardware.from_json(value["hardware"]),
                dict(value["configuration"]),
                value["seconds"],
                value["default_seconds"],
                dict(value["provenance"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise UsageError("this is no record of tuning; give what `to_json` returned") from e

    def to_line(self) -> bytes:
        """One line of ASCII, the newline included."""
        body = json.dumps(self.to_json(), allow_nan=False)[:-1].encode()
        return body + (_CHECKSUM % zlib.crc32(body)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Record:
        """The record of a line without its newline. Raises UsageError where checksum or key does not fit."""
        body, checksum = line[:-_SUFFIX], line[-_SUFFIX:]
        if checksum != (_CHECKSUM % zlib.crc32(body)).encode():
            raise UsageError("the line is torn or altered: its checksum is another")
        try:
            value = json.loads(body + b"}")
        except (ValueError, RecursionError) as e:
            raise UsageError(f"the line is no JSON ({e})") from e
        return cls.from_json(cast(Mapping[str, Any], value))


def _spelled(value: Parameter) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _date(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError as e:
        raise UsageError(f"the date {text!r} cannot be read; write it as ISO 8601 in UTC") from e


def _check_scalar(what: str, value: object, kinds: tuple[type, ...]) -> None:
    if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise UsageError(f"{what} is {value!r}; give a finite {names}")
