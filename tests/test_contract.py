from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from graphopt.contract import Pass, PassContext
from graphopt.passes import PASSES
from graphopt.registry import find_pass


@pytest.mark.parametrize("name", sorted(PASSES))
def test_a_pass_is_named_for_its_file_and_is_a_value(name: str) -> None:
    kind = find_pass(name)
    assert kind.name == name
    place = "graphopt.passes." + name.replace("-", "_")  # a file, or a folder
    assert kind.__module__ == place or kind.__module__.startswith(f"{place}.")
    assert kind() == kind()
    assert kind.__doc__ and kind.__doc__.strip().endswith(".")
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().name = "other"  # type: ignore[misc]


def test_a_pass_must_say_how_it_runs() -> None:
    @dataclass(frozen=True)
    class Silent(Pass):
        name = "silent"

    with pytest.raises(TypeError, match="abstract"):
        Silent()  # type: ignore[abstract]


def test_a_context_allows_all_and_has_no_device() -> None:
    context = PassContext()
    assert context.allow("any@node")
    assert context.measure(None) is None  # type: ignore[arg-type]
    context.progress("stage", 0, 1)
