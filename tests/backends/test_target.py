from __future__ import annotations

import platform

import pytest

from graphopt.backends import target as targets
from graphopt.backends.target import LEVELS, MOST_THREADS, resolve_target, runnable
from graphopt.errors import UsageError
from graphopt.runtime import features


@pytest.mark.parametrize("threads", [0, -1, MOST_THREADS + 1, 10**9])
def test_threads_out_of_range(threads: int) -> None:
    with pytest.raises(UsageError, match=f"threads is {threads}; give a number of at"):
        resolve_target("cpu:x86-64-v3", threads)


def test_threads_of_a_large_machine() -> None:
    assert resolve_target("cpu:x86-64-v3", MOST_THREADS).threads == MOST_THREADS


def _pretend(monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str]) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for module in (targets, features):
        monkeypatch.setattr(module, "host_features", lambda: frozenset(flags))
    monkeypatch.setattr(targets, "amx_works", lambda: True)


@pytest.mark.parametrize("name", LEVELS)
def test_the_best_level_of_a_machine_is_its_own(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _, needed = LEVELS[name]
    _pretend(monkeypatch, needed[0], {*needed, "something-newer"})
    assert resolve_target("cpu").name == name


def test_tiles_that_a_process_does_not_get_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "x86_64", set(LEVELS["cpu:sapphirerapids"][1]))
    monkeypatch.setattr(targets, "amx_works", lambda: False)
    assert resolve_target("cpu").name == "cpu:x86-64-v4-bf16"
    here = runnable(resolve_target("cpu:sapphirerapids"))
    assert here.amx and here.extensions == ("avx512vnni", "avx512bf16")


def test_a_machine_below_the_oldest_level_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "x86_64", {"x86_64", "avx"})
    with pytest.raises(UsageError, match=r"lacks avx2, .* the oldest supported level is cpu:x86-64-v3"):
        resolve_target("cpu")
    _pretend(monkeypatch, "riscv64", set())
    with pytest.raises(UsageError, match="this machine is riscv64"):
        resolve_target("cpu")


def test_vector_registers() -> None:
    found = {name: (target.lanes, target.registers) for name in LEVELS for target in [resolve_target(name)]}
    assert found == {
        "cpu:x86-64-v3": (8, 16),
        "cpu:x86-64-v3-vnni": (8, 16),
        "cpu:x86-64-v4": (16, 32),
        "cpu:x86-64-v4-vnni": (16, 32),
        "cpu:x86-64-v4-bf16": (16, 32),
        "cpu:sapphirerapids": (16, 32),
        "cpu:aarch64": (4, 32),
        "cpu:cortex-a78ae": (4, 32),
        "cpu:armv8.6-a": (4, 32),
    }


def test_what_one_instruction_multiplies_by_int8() -> None:
    found = {name: resolve_target(name).quads for name in LEVELS}
    assert found == {
        "cpu:x86-64-v3": None,
        "cpu:x86-64-v3-vnni": "uint8",
        "cpu:x86-64-v4": None,
        "cpu:x86-64-v4-vnni": "uint8",
        "cpu:x86-64-v4-bf16": "uint8",
        "cpu:sapphirerapids": "uint8",
        "cpu:aarch64": None,
        "cpu:cortex-a78ae": "int8",
        "cpu:armv8.6-a": "uint8",
    }


def test_vnni_without_avx512_is_code_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine like Alder Lake, on another machine's kernels too."""
    _pretend(monkeypatch, "x86_64", {*LEVELS["cpu:x86-64-v3-vnni"][1], "gfni"})
    target = resolve_target("cpu")
    assert (target.name, target.architecture) == ("cpu:x86-64-v3-vnni", "x86-64-v3")
    assert target.extensions == ("avxvnni",) and runnable(target) is target
    here = runnable(resolve_target("cpu:x86-64-v4-vnni"))
    assert (here.architecture, here.extensions, here.lanes) == ("x86-64-v3", ("avxvnni",), 16)


def test_what_runs_here_keeps_the_kernels_of_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "x86_64", set(LEVELS["cpu:x86-64-v3"][1]))
    own, newer, arm = (resolve_target(name) for name in ("cpu", "cpu:x86-64-v4", "cpu:cortex-a78ae"))
    assert runnable(own) is own
    for target in (newer, arm):
        here = runnable(target)
        assert (here.machine, here.architecture) == ("x86_64", "x86-64-v3")
        assert (here.lanes, here.registers, here.threads) == (target.lanes, target.registers, target.threads)
