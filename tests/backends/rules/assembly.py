"""What LLVM made of a kernel, as text: its functions, their loops, and the instructions in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_LABEL = re.compile(r"(\.LBB\w+):")
_JUMP = re.compile(r"\t(?:j\w+|b|b\.\w+|cbn?z|tbn?z)\t(?:.*, )?(\.LBB\w+)$")
_CALL = re.compile(r"\t(?:callq?|bl|blr)\t\*?(\S+)")
_FUNCTION = re.compile(r"^([\w.$]+):.*?^\t\.size\t\1,", re.M | re.S)
_LAMBDA = re.compile(r"__tvm_parallel_lambda(?:\.\d+)?")


@dataclass(frozen=True)
class Loop:
    """Instructions between a label and a backward jump to it; `depth` counts the loops around it."""

    body: tuple[str, ...]
    depth: int
    innermost: bool


def functions(text: str) -> dict[str, tuple[str, ...]]:
    """Labels and instructions of every function, by name."""
    return {match[1].removeprefix(".L"): tuple(_lines(match[0])) for match in _FUNCTION.finditer(text)}


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        line = re.split(r"\s+(?:#|//)", line)[0].rstrip()
        if re.match(r"\.LBB\w+:|\t[a-z{]", line):
            yield line


def kernel_functions(found: Mapping[str, tuple[str, ...]], kernel: str) -> dict[str, tuple[str, ...]]:
    """The body of one kernel and the tasks it starts, without the wrapper that checks its arguments."""
    names = [f"{kernel}_compute_"]
    for name in names:
        for line in found[name]:
            names += [task for task in _LAMBDA.findall(line) if task not in names]
    return {name: found[name] for name in names}


def loops(function: tuple[str, ...]) -> list[Loop]:
    """In the order of the text; where several jumps lead to one label the last ends the loop."""
    labels = {match[1]: number for number, line in enumerate(function) if (match := _LABEL.match(line))}
    ends: dict[int, int] = {}
    for number, line in enumerate(function):
        jump = _JUMP.match(line)
        if jump and (start := labels.get(jump[1], number)) < number:
            ends[start] = number
    spans = sorted(ends.items())
    return [
        Loop(
            tuple(line for line in function[start : end + 1] if not line.startswith(".")),
            sum(a < start and end < b for a, b in spans),
            not any(start < a and b <= end for a, b in spans),
        )
        for start, end in spans
    ]


def calls(function: tuple[str, ...]) -> list[str]:
    """What it calls: names, or registers and memory where the callee is looked up."""
    return [match[1].removesuffix("@PLT").removeprefix(".L") for line in function if (match := _CALL.match(line))]
