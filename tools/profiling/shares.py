"""What each kernel makes of the machine: its rate, the nearer of its roofs, and whether it is slow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from graphopt.runtime.manifest import KernelInfo
from graphopt.runtime.sizes import parse_size

if TYPE_CHECKING:
    from graphopt.tools.profiling.roofs import Level, Roofs

LEAST_SHARE = 0.20  # of its own roof, below which a kernel is slow
NOTABLE = 0.02  # share of the model's time up to which that does not matter
UNKNOWN = KernelInfo("runtime")  # of functions that no rule wrote


@dataclass(frozen=True)
class Row:
    """One kernel. `flops`, `bytes` and `weight_bytes` are those of one call, None where the manifest does not say.

    `share` is that of the model's time, `share_of_roof` that of `roof` ("FMA", the memory that was read, or "launch"),
    None without work or without roofs. `slow` is the reason.
    """

    kernel: str
    rule: str
    configuration: Mapping[str, Any]
    nodes: tuple[str, ...]
    calls: float
    seconds_per_call: float
    seconds: float
    share: float
    flops: int | None
    bytes: int | None
    weight_bytes: int | None
    roof: str | None
    share_of_roof: float | None
    slow: str | None


@dataclass(frozen=True)
class Profile:
    """One model: seconds of a run, and of it what is spent outside kernels; rows, the most expensive first."""

    seconds: float
    outside_seconds: float
    rows: tuple[Row, ...]
    roofs: Roofs | None

    @property
    def flops(self) -> int:
        """Operations of one run, as far as they are known."""
        return round(sum(row.calls * row.flops for row in self.rows if row.flops))

    @property
    def share_of_peak(self) -> float | None:
        """Of the multiply-add peak in float32, over the whole time of a run."""
        return self.flops / self.seconds / self.roofs.flops_per_second if self.roofs else None

    @property
    def slow(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.slow)

    def to_json(self) -> dict[str, Any]:
        rows = [
            {**asdict(row), "flops_per_second": rate(row.flops, row), "bytes_per_second": rate(row.bytes, row)}
            for row in self.rows
        ]
        return {
            "seconds": self.seconds,
            "kernel_seconds": sum(row.seconds for row in self.rows),
            "outside_seconds": self.outside_seconds,
            "outside_share": self.outside_seconds / self.seconds,
            "flops": self.flops,
            "share_of_peak": self.share_of_peak,
            "roofs": asdict(self.roofs) if self.roofs else None,
            "kernels": rows,
            "slow": [{"kernel": row.kernel, "reason": row.slow} for row in self.slow],
        }


def rate(work: int | None, row: Row) -> float | None:
    """Work a second."""
    return None if work is None else work / row.seconds_per_call


def make_profile(
    times: Mapping[str, tuple[float, float]],
    kernels: Mapping[str, KernelInfo],
    entry: str,
    sizes: Mapping[str, int],
    seconds: float,
    roofs: Roofs | None,
) -> Profile:
    """`times`: kernel -> (calls a run, seconds a call), `seconds`: of a whole run without taking times inside it.

    Where the kernels together took longer than that, because their clocks were read too, theirs is the model's time.
    """
    inside = sum(calls * each for calls, each in times.values())
    whole = max(seconds, inside)
    works = {name: Work.of(kernels.get(name, UNKNOWN), sizes) for name in times}
    weights = sum(calls * (works[name].weight_bytes or 0) for name, (calls, _) in times.items())
    rows = [
        _row(name, kernels.get(name, UNKNOWN), entry, works[name], calls, each, whole, roofs, weights)
        for name, (calls, each) in times.items()
    ]
    return Profile(whole, whole - inside, tuple(sorted(rows, key=lambda row: (-row.seconds, row.kernel))), roofs)


@dataclass(frozen=True)
class Work:
    """Of one call at known sizes."""

    flops: int | None
    bytes: int | None
    weight_bytes: int | None

    @classmethod
    def of(cls, kernel: KernelInfo, sizes: Mapping[str, int]) -> Work:
        return cls(*(_value(size, sizes) for size in (kernel.flops, kernel.bytes, kernel.weight_bytes)))


def _value(size: int | str | None, sizes: Mapping[str, int]) -> int | None:
    if not isinstance(size, str):
        return size
    expression = parse_size(size)
    return expression.value(sizes) if expression.names <= set(sizes) else None


def _row(
    name: str,
    kernel: KernelInfo,
    entry: str,
    work: Work,
    calls: float,
    each: float,
    whole: float,
    roofs: Roofs | None,
    weights: float,
) -> Row:
    if roofs is not None and (peak := _peak_of_products(kernel, roofs)) is not None:
        roofs = replace(roofs, flops_per_second=peak)
    nearest = nearest_roof(work, each, roofs, weights) if roofs else None
    roof, share_of_roof = nearest or (None, None)
    share = calls * each / whole
    slow = kernel.slow
    if not slow and share_of_roof is not None and share_of_roof < LEAST_SHARE and share > NOTABLE:
        slow = f"{share_of_roof:.1%} of its own roof ({roof}), under {LEAST_SHARE:.0%}"
    return Row(
        name,
        kernel.rule,
        kernel.configuration,
        kernel.nodes.get(entry, ()),
        calls,
        each,
        calls * each,
        share,
        work.flops,
        work.bytes,
        work.weight_bytes,
        roof,
        share_of_roof,
        slow,
    )


def _peak_of_products(kernel: KernelInfo, roofs: Roofs) -> float | None:
    """Of a kernel that multiplies bfloat16, in tiles or in vectors, or codes; None: that of multiply-adds.

    VPDPBUSD multiplies four times as many numbers as a multiply-add, and as many of either start in a cycle; so it is
    with tiles of codes, which hold twice as many as those of bfloat16.
    """
    products = str(kernel.configuration.get("products", ""))
    if products.startswith("4 codes"):
        return 4 * roofs.flops_per_second
    if "tiles" in products:
        return roofs.tiles_per_second and roofs.tiles_per_second * (2 if "int8" in products else 1)
    return roofs.pairs_per_second if "bfloat16" in products else None


def nearest_roof(work: Work, seconds: float, roofs: Roofs, weights: float) -> tuple[str, float] | None:
    """The roof that leaves the least room above the kernel, and the share of it that is reached; None without work.

    No kernel takes less time than one that does nothing, so a small one is held against that: its roof is "launch".
    `weights` is how many bytes of weights one run reads in all.
    """
    if not work.flops and not work.bytes:
        return None
    found = [("launch", roofs.launch_seconds / seconds)]
    if work.flops:
        found.append(("FMA", work.flops / seconds / roofs.flops_per_second))
    if work.bytes:
        level = memory_of(work, seconds, roofs.levels, weights)
        found.append((level.name, work.bytes / seconds / level.bytes_per_second))
    return max(found, key=lambda item: item[1])


def memory_of(work: Work, seconds: float, levels: Sequence[Level], weights: float) -> Level:
    """Where the kernel's bytes come from: the nearest level that holds them, other than the L1 cache.

    Weights that do not all stay in the last cache come from memory in every run. A kernel that was faster than its
    level allows had its bytes nearer, so that level is its roof.
    """
    assert work.bytes is not None
    last = levels[-2].capacity
    streamed = last is not None and weights > last and 2 * (work.weight_bytes or 0) > work.bytes
    holding = [n for n, level in enumerate(levels) if level.capacity is None or work.bytes <= level.capacity]
    number = len(levels) - 1 if streamed else max(holding[0], 1)
    while number and work.bytes / seconds > levels[number].bytes_per_second:
        number -= 1
    return levels[number]
