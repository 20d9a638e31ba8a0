"""Limits on what capture reads and builds, so that a hostile or damaged file ends in an error."""

from __future__ import annotations

from dataclasses import dataclass, fields

from graphopt.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """Most of what one captured model may hold or ask for; a model over a limit is a CaptureError that names it."""

    max_bytes: int = 16 << 30  # a model file, counted uncompressed; the tensors of an .onnx in other files together
    max_graph_bytes: int = 512 << 20  # the graph description inside a model file
    max_members: int = 100_000  # members of a model file
    max_nodes: int = 200_000  # nodes of all graphs together
    max_constant_bytes: int = 2 << 30  # memory for values that are described but not held: expanded, filled or drawn
    max_value_bytes: int = 16 << 30  # one value of the graph, at the sizes of its examples
    max_parse_bytes: int = 8 << 30  # memory of the process that parses a model file
    max_parse_seconds: int = 300  # processor and wall time of that process

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise UsageError(f"{field.name}={value!r} is no limit; give a whole number of at least 1")
