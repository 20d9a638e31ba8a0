"""What a pass is: options in, a program in, a new program and the account of every rewrite out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from graphopt.data.dataset import Dataset
    from graphopt.data.metric import Metric
    from graphopt.instance import Instance
    from graphopt.program import Program
    from graphopt.race import Race

Preserves = Literal["exact", "quantized", "approximate"]


@dataclass(frozen=True)
class Rewrite:
    """One place that changed: `id` is "rule@anchor", `before` and `after` are names of nodes."""

    id: str
    rule: str
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class Declined:
    """One place that a rule matched and left alone; `reason` is a clause with the value that decided it."""

    rule: str
    node: str
    reason: str


@dataclass(frozen=True)
class NearMiss:
    """One place where only a part of a rule's pattern was found: `matched` of its `total` calls.

    `reason` is a clause that names the first difference.
    """

    rule: str
    node: str
    reason: str
    matched: int
    total: int


@dataclass(frozen=True)
class TradeOff:
    """What one setting of a pass keeps and costs, both measured.

    `setting` is what a chart has along its axis, such as "blocks kept", `value` how much of it, and `variant` tells
    points of the same value apart. `metric` is of held-out data; `seconds` is the median of one run at example sizes,
    None where no device is at hand.
    """

    setting: str
    value: float
    variant: str
    metric: float
    seconds: float | None


@dataclass(frozen=True)
class Region:
    """A part of a program that a pass measured without its rewrites and with them, and whether they stay.

    `nodes` are the operators that the rewrites are about, none for the whole program; seconds are medians of a run.
    """

    nodes: tuple[str, ...]
    seconds_without: float
    seconds_with: float
    kept: bool


@dataclass(frozen=True)
class Timing:
    """Median seconds of one run on the target, over `rounds` runs."""

    seconds: float
    rounds: int


def _silent(stage: str, done: int, total: int) -> None:
    return None


def _allow_all(identity: str) -> bool:
    return True


def _no_device(program: Program) -> Timing | None:
    return None


@dataclass(frozen=True)
class PassContext:
    """What surrounds a run of a pass.

    `allow` is asked with the id of each rewrite before it is made; a pass is deterministic, so running it again with
    some ids refused takes exactly those rewrites back. A pass learns from `data.fit` only. `measure` returns None where
    no device is at hand. `race` is there with `keep_if_faster`, for a pass that measures its own parts.
    """

    target: str = "cpu"
    data: Dataset | None = None
    metric: Metric | None = None
    seed: int = 0
    progress: Callable[[str, int, int], None] = _silent
    allow: Callable[[str], bool] = _allow_all
    measure: Callable[[Program], Timing | None] = _no_device
    race: Race | None = None


@dataclass(frozen=True)
class PassResult:
    """The new program, where it differs from the old one, where it could have differed, and remarks.

    `trade_offs` are other settings that were tried and measured beside the one that was taken, for a chart; `regions`
    are the parts that the pass raced itself.
    `instances` are the rewrites as small programs, old and new, in the order in which they were made: what has one is
    checked on its own, anything else by leaving out rewrites until the whole program is right.
    """

    program: Program
    rewrites: tuple[Rewrite, ...] = ()
    declined: tuple[Declined, ...] = ()
    notes: tuple[str, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    instances: tuple[Instance, ...] = ()
    trade_offs: tuple[TradeOff, ...] = ()
    regions: tuple[Region, ...] = ()


@dataclass(frozen=True)
class Pass(ABC):
    """A rewriting of programs. A subclass is a frozen dataclass whose fields are its options.

    `name` is kebab-case and equals the file's stem with dashes. `preserves` is what the caller may rely on: `exact`
    (rounding only), `quantized` (the rounding the pass is there to introduce), `approximate` (needs data and metric).
    `measured` is whether `keep_if_faster` holds it to a measurement: not where it only takes work away, or races its
    parts itself. `unrecorded` is a clause for explanations: what it means that the account says nothing of a node.
    """

    name: ClassVar[str]
    preserves: ClassVar[Preserves] = "exact"
    measured: ClassVar[bool] = True
    unrecorded: ClassVar[str] = ""

    def starts_at(self) -> frozenset[Any]:
        """The operators at which its rules look for a match, for explanations; empty where that is no short list."""
        return frozenset()

    def requires(self, program: Program) -> str | None:
        """Why the pass cannot take `program`, or None."""
        return None

    def ensures(self, program: Program) -> str | None:
        """What is wrong with the pass's own result, or None."""
        return None

    @abstractmethod
    def run(self, program: Program, context: PassContext) -> PassResult:
        """Rewrite `program` into a new one; the argument and its tensors stay as they are."""
