from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest

from graphopt import registry
from graphopt.errors import UnknownNameError, UsageError


def install(monkeypatch: pytest.MonkeyPatch, **entries: str) -> None:
    """Pretend that a package with these entry points of group graphopt.passes is installed."""

    def entry_points(group: str) -> EntryPoints:
        found = [EntryPoint(name.replace("_", "-"), value, group) for name, value in entries.items()]
        return EntryPoints(found if group == "graphopt.passes" else [])

    monkeypatch.setattr(registry, "entry_points", entry_points)


def test_an_unknown_pass_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown pass 'dead-cod'; did you mean 'dead-code'"):
        registry.find_pass("dead-cod")


def test_a_pass_of_another_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, one_relu="tests.test_rewrite:OneRelu")
    assert registry.find_pass("one-relu").name == "one-relu"
    assert "one-relu" in [item.name for item in registry.list_passes()]


def test_a_name_used_twice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, dead_code="tests.test_rewrite:OneRelu")
    with pytest.raises(UsageError, match="'dead-code' is provided by both graphopt and"):
        registry.pass_locations()


@pytest.mark.parametrize(
    ("value", "words"),
    [("json:loads", "no subclass of graphopt.Pass"), ("tests.test_rewrite:OneRelu", "whose name is 'one-relu'")],
)
def test_an_entry_that_is_no_such_pass_is_an_error(monkeypatch: pytest.MonkeyPatch, value: str, words: str) -> None:
    install(monkeypatch, foreign=value)
    with pytest.raises(UsageError, match=words):
        registry.find_pass("foreign")


def test_passes_describe_themselves() -> None:
    described = {item.name: item for item in registry.list_passes()}
    folding = described["constant-folding"]
    assert folding.summary.startswith("Compute once, now")
    assert folding.preserves == "exact"
    assert [(option.name, option.type, option.required) for option in folding.options] == [("max-bytes", "int", False)]


def test_targets_are_checked_by_name() -> None:
    assert "cpu" in registry.list_targets()
    registry.check_target("cpu")
    assert registry.check_target("cuda:sm_80+sm_90") == "cuda:sm_80+sm_90"
    assert registry.check_target("raspberry-pi-5") == "cpu:cortex-a78ae"
    for name in ("gpu", "cuda", "cuda:sm_80+sm_91"):
        with pytest.raises(UnknownNameError, match="unknown target"):
            registry.check_target(name)


def test_listing_names_imports_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise AssertionError(name)

    monkeypatch.setattr(registry, "import_module", refuse)
    assert "merge-linears" in registry.pass_locations()


class FakeEntry:
    name, value, dist = "toy", "toy_package.backend", None

    @staticmethod
    def load() -> object:
        return "the module"


def test_targets_of_other_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [FakeEntry] if group == "graphopt.targets" else [])
    assert "toy" in registry.list_targets()
    assert registry.find_backend("toy") == "the module"  # type: ignore[comparison-overlap]
    assert registry.find_backend("cpu:x86-64-v3").__name__ == "graphopt.backends.cpu"
    with pytest.raises(UnknownNameError, match="did you mean 'toy'"):
        registry.find_backend("tov")
