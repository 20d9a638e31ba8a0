"""Choice points: where a rule lets something be chosen for a kernel, and what decides.

A rule offers a `Choice`: the workload, its default by the rule's cost model, what else is worth timing, and how the
kernel is written for any of them. What measured best before is taken where there is such a thing, else the default.
`Choices` remembers what was asked in lowering a program, so that a tuner can write the very same kernels in other ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from graphopt.backends.sizes import Size
from graphopt.backends.traffic import lazy_values
from graphopt.backends.tuner.record import Parameter, Setting, Workload
from graphopt.backends.values import placed_views

if TYPE_CHECKING:
    from graphopt.backends.kernel import Code
    from graphopt.backends.lowering import Lowering

C = TypeVar("C")
Settings = Mapping[str, Setting]
Tuned = Callable[[Workload], Settings | None]  # what measured best, None where nothing was measured

MOST_CANDIDATES = 64  # of one choice
UNUSUAL = 1.03  # by how much a setting that a rule's own reasoning is against makes a candidate look worse
_WORDS = 8  # operators of an epilogue that a workload names one by one


@dataclass(frozen=True, eq=False)
class Choice(Generic[C]):
    """What may be chosen for one kernel.

    `candidates` come with the best expected first; `write` makes the kernel of any of them. Results of two candidates
    differ by at most `tolerance` of the largest result: 0 where all add up in the same order.
    """

    workload: Workload
    default: C
    candidates: Callable[[], Iterable[C]]
    write: Callable[[C], Code]
    tolerance: float = 0.0

    def space(self) -> list[C]:
        """The default, then other candidates, each once."""
        return list(dict.fromkeys((self.default, *islice(self.candidates(), MOST_CANDIDATES))))

    def find(self, settings: Settings) -> C | None:
        """The candidate with these settings; None where this target or version has no such candidate."""
        wanted = dict(settings)
        return next((candidate for candidate in self.space() if settings_of(candidate) == wanted), None)


@dataclass(frozen=True, eq=False)
class Made(Generic[C]):
    """A choice and what was chosen; `tuned` where that is not the default."""

    choice: Choice[C]
    configuration: C

    @property
    def tuned(self) -> bool:
        return self.configuration != self.choice.default


@dataclass(frozen=True, eq=False)
class Site:
    """Where a kernel is that something was chosen for: the lowering that can write it, and its name in the module."""

    made: Made[Any]
    lowering: Lowering
    kernel: str


class Choices:
    """What decides in one compilation, and what came of it: all `sites`, and in `notes` what was ignored and why."""

    def __init__(self, lookup: Tuned = lambda workload: None) -> None:
        self._lookup = lookup
        self.sites: list[Site] = []
        self.notes: dict[str, None] = {}

    def make(self, choice: Choice[C]) -> Made[C]:
        """What measured best before, where it is one of the candidates, else the default."""
        settings = self._lookup(choice.workload)
        if settings is None:
            return Made(choice, choice.default)
        found = choice.find(settings)
        if found is None:
            said = " ".join(f"{name}={value}" for name, value in settings.items())
            self.notes[f"ignored a tuned configuration that this version does not have: {choice.workload}: {said}"] = (
                None
            )
        return Made(choice, choice.default if found is None else found)


def settings_of(configuration: Any) -> dict[str, Setting]:
    """The fields of a configuration and of what is in it, flat, as a record keeps them."""
    found: dict[str, Setting] = {}
    for item in fields(configuration):
        value = getattr(configuration, item.name)
        inner = settings_of(value) if is_dataclass(value) else {item.name: value}
        assert not found.keys() & inner.keys(), f"{type(configuration).__name__} has two settings of one name"
        found |= inner
    return found


def size_parameter(size: Size) -> Parameter:
    """A size as workloads have it."""
    return size if isinstance(size, int) else "?"


def epilogue_parameters(end: Any) -> dict[str, Parameter]:
    """The element-wise tree `end` over a kernel's result: its operators in order, and how many tensors of the result's
    size it reads."""
    names = [value.name for value in lazy_values([end]) if value.name]
    more = f" +{len(names) - _WORDS}" if len(names) > _WORDS else ""
    return {
        "epilogue": " ".join(names[:_WORDS]) + more,
        "epilogue_reads": len({id(view.storage) for view, _ in placed_views(end)}),
    }
