from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graphopt.errors import CompileError
from graphopt.runtime.caches import USUAL, cache_sizes
from graphopt.runtime.manifest import KernelInfo
from graphopt.runtime.session import InferenceSession
from graphopt.tools import profile_artifact
from graphopt.tools.benchmarking.usage import Interference
from graphopt.tools.profiling import chart, shares
from graphopt.tools.profiling.measuring import doubtful
from graphopt.tools.profiling.roofs import Level, Roofs, measure_roofs, working_sets
from graphopt.tools.profiling.shares import Profile, Work, make_profile, memory_of, nearest_roof
from tests.tools.conftest import TINY, Cli

LEVELS = (
    Level("L1", 1 << 10, 400.0),
    Level("L2", 1 << 16, 200.0),
    Level("L3", 1 << 20, 100.0),
    Level("memory", None, 10.0),
)
ROOFS = Roofs(2, 1000.0, LEVELS, 1e-6)
NO_WEIGHTS = 0.0


class FakeMeter:
    def __init__(self, *measured: Roofs) -> None:
        self.measured = list(measured)

    def measure(self) -> Roofs:
        return self.measured.pop(0) if len(self.measured) > 1 else self.measured[0]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roofs without measuring any."""
    monkeypatch.setattr(profile_artifact, "find_meter", lambda threads: (FakeMeter(ROOFS), ""))


def a_profile(count: int = 4, roofs: Roofs | None = ROOFS) -> Profile:
    """Kernels of 1, 2, ... seconds; the last is generic."""
    times = {f"kernel{number}": (1.0, float(number)) for number in range(1, count + 1)}
    kernels = {name: KernelInfo("packed-gemm", flops=500, bytes=100) for name in times}
    kernels[f"kernel{count}"] = KernelInfo("generic", flops=500, bytes=100)
    return make_profile(times, kernels, "main", {}, 2.0 + sum(each for _, each in times.values()), roofs)


def test_products_of_narrow_numbers_have_roofs_of_their_own() -> None:
    """Each 500 operations in a second, of a peak that is known, or else of float32's."""
    told = {"plain": "", "pairs": "pairs of bfloat16", "tiles": "tiles of bfloat16", "codes": "tiles of uint8"}
    told["few or many"] = "bits taken apart; tiles of int8"
    kernels = {
        name: KernelInfo("gemm", {"products": products} if products else {}, flops=500, bytes=1)
        for name, products in told.items()
    }
    times = dict.fromkeys(told, (1.0, 1.0))
    measured = replace(ROOFS, pairs_per_second=2000.0, tiles_per_second=8000.0)
    for roofs, wanted in ((ROOFS, (0.5,) * 5), (measured, (0.5, 0.25, 0.0625, 0.03125, 0.03125))):
        rows = make_profile(times, kernels, "main", {}, 5.0, roofs).rows
        shares = {row.kernel: row.share_of_roof for row in rows}
        assert tuple(shares[name] for name in told) == pytest.approx(wanted)


def test_profile_of_an_artifact(cli: Cli, artifact: str, measured: None) -> None:
    report = cli("profile", artifact, "--rounds", 3, "--size", "rows=7", "--json").json
    (kernel,) = report["kernels"]
    assert kernel["rule"] == "packed-gemm" and kernel["configuration"]["rows"] > 1
    assert kernel["flops"] == 2 * 7 * 8 * 16 + 7 * 16 and kernel["bytes"] > kernel["weight_bytes"] > 4 * 8 * 16
    assert kernel["nodes"] == ["linear", "relu"] and report["sizes"] == {"rows": 7}
    assert kernel["flops_per_second"] == kernel["flops"] / kernel["seconds_per_call"]
    assert abs(sum(row["share"] for row in report["kernels"]) + report["outside_share"] - 1) < 1e-6
    assert report["kernel_seconds"] + report["outside_seconds"] == pytest.approx(report["seconds"])
    assert report["flops"] == kernel["flops"] and report["roofs"]["threads"] == 2


def test_table_names_rate_roof_rule_and_configuration(cli: Cli, artifact: str, measured: None) -> None:
    outcome = cli("profile", artifact, "--rounds", 2)
    assert outcome.code == 0
    words = ("us a call", "of roof", "packed-gemm", "columns=", "outside kernels", "of the FMA peak", "L3 0, memory")
    assert not [word for word in words if word not in outcome.out], outcome.out


def test_the_nearer_roof_is_named() -> None:
    assert nearest_roof(Work(900, 10, 0), 1.0, ROOFS, NO_WEIGHTS) == ("FMA", 0.9)
    assert nearest_roof(Work(100, 100, 0), 1.0, ROOFS, NO_WEIGHTS) == ("L2", 0.5)
    assert nearest_roof(Work(0, 50, 0), 1.0, ROOFS, NO_WEIGHTS) == ("L2", 0.25)
    assert nearest_roof(Work(None, None, None), 1.0, ROOFS, NO_WEIGHTS) is None


def test_a_tiny_kernel_is_held_against_a_launch_and_is_not_slow() -> None:
    times = {"tiny": (1.0, 2e-6), "waits": (1.0, 2e-5), "unknown": (1.0, 2e-6)}
    kernels = {"tiny": KernelInfo("pointwise", flops=0, bytes=4), "waits": KernelInfo("pointwise", flops=1, bytes=4)}
    roofs = replace(ROOFS, flops_per_second=1e12, levels=tuple(replace(e, bytes_per_second=1e11) for e in LEVELS))
    rows = {row.kernel: row for row in make_profile(times, kernels, "main", {}, 0.0, roofs).rows}
    assert (rows["tiny"].roof, rows["tiny"].share_of_roof, rows["tiny"].slow) == ("launch", 0.5, None)
    assert rows["waits"].slow == "5.0% of its own roof (launch), under 20%"
    assert rows["unknown"].roof is None and rows["unknown"].slow is None


def test_the_memory_is_the_one_that_holds_the_bytes() -> None:
    def name(total: int, weights: int, seconds: float, all_weights: float) -> str:
        return memory_of(Work(0, total, weights), seconds, LEVELS, all_weights).name

    assert [name(size, 0, 1e9, 0) for size in (10, 1 << 16, 1 << 20, 1 << 21)] == ["L2", "L2", "L3", "memory"]
    assert name(1000, 900, 1e9, 2 << 20) == "memory"  # its weights left the caches since the last run
    assert name(1000, 400, 1e9, 2 << 20) == "L2"  # most is not weights
    assert name(1000, 900, 1e9, 1 << 19) == "L2"  # all weights stay


def test_a_kernel_above_a_level_is_held_against_a_nearer_one() -> None:
    level = memory_of(Work(0, 1 << 21, 0), (1 << 21) / 150, LEVELS, 0)
    assert level.name == "L2"
    name, share = nearest_roof(Work(0, 1 << 21, 0), (1 << 21) / 500, ROOFS, 0) or ("", 0.0)
    assert name == "L1" and share == pytest.approx(1.25)


def test_slow_kernels_are_generic_or_far_below_their_roof() -> None:
    times = {"good": (1.0, 90.0), "far": (1.0, 8.0), "small": (1.0, 1.0), "loops": (1.0, 0.5), "unknown": (1.0, 9.0)}
    kernels = {
        "good": KernelInfo("packed-gemm", flops=30_000, bytes=10),
        "far": KernelInfo("packed-gemm", flops=1500, bytes=10),
        "small": KernelInfo("packed-gemm", flops=1, bytes=1),
        "loops": KernelInfo("generic", flops=500, bytes=1),
        "unknown": KernelInfo("pointwise"),
    }
    profile = make_profile(times, kernels, "main", {}, 100.0, ROOFS)
    reasons = {row.kernel: row.slow for row in profile.slow}
    assert set(reasons) == {"far", "loops"}
    assert reasons["far"] == "18.8% of its own roof (FMA), under 20%" and str(reasons["loops"]).startswith("generic")
    without = make_profile(times, kernels, "main", {}, 100.0, None)
    assert [row.kernel for row in without.slow] == ["loops"] and without.share_of_peak is None


def test_what_a_kernel_says_itself_has_lines_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    told: dict[str, bool | int | float | str] = {
        "bits": 8,
        "why": "8 bits: taken apart",
        "slow": "numbers are loaded one by one",
    }
    profile = make_profile({"low": (1.0, 1.0)}, {"low": KernelInfo("low-bit", told)}, "main", {}, 1.0, ROOFS)
    assert not doubtful(profile)
    profile_artifact.print_profile(profile, [])
    table, rest = capsys.readouterr().out.split("\n\n")
    assert "bits=8" in table and "taken apart" not in table and "one by one" not in table
    assert "why    low: 8 bits: taken apart" in rest and "low: numbers are loaded one by one" in rest


def test_work_is_computed_at_the_sizes_of_the_run() -> None:
    kernel = KernelInfo("pointwise", flops="3*rows", bytes="min(8*rows, 100)", weight_bytes=None)
    assert Work.of(kernel, {"rows": 50}) == Work(150, 100, None)
    assert Work.of(kernel, {}) == Work(None, None, None)


def test_times_inside_that_are_longer_than_the_run_are_the_run() -> None:
    profile = make_profile({"a": (2.0, 3.0)}, {}, "main", {}, 5.0, None)
    assert (profile.seconds, profile.outside_seconds) == (6.0, 0.0) and profile.rows[0].rule == "runtime"


def test_fail_on_slow(cli: Cli, artifact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "NOTABLE", 0.0)  # other processes make the time outside kernels any share of the whole
    for speed, code in ((1e30, 1), (1.0, 0)):  # of a machine beside which the kernel is slow, and of one it beats
        roofs = Roofs(1, speed, tuple(replace(level, bytes_per_second=speed) for level in LEVELS), 1 / speed)
        monkeypatch.setattr(profile_artifact, "find_meter", lambda threads, roofs=roofs: (FakeMeter(roofs), ""))
        outcome = cli("profile", artifact, "--rounds", 2, "--fail-on-slow", "--json")
        assert outcome.code == code and bool(outcome.json["slow"]) == bool(code)
        assert cli("profile", artifact, "--rounds", 2).code == 0
    assert any("over 100 %" in note for note in outcome.json["notes"])


def test_busy_machines_are_said() -> None:
    assert list(profile_artifact.doubts(a_profile(), Interference(0.0, 0.05))) == []
    (note,) = profile_artifact.doubts(a_profile(), Interference(0.2, 0.05))
    assert "others took 25% of the CPUs" in note


def test_without_a_compiler_there_are_times_and_rules(cli: Cli, artifact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "graphopt.backends.roofs", None)
    monkeypatch.delattr("graphopt.backends.roofs", raising=False)  # where another test imported it
    monkeypatch.setattr(importlib.import_module("graphopt.optional"), "EXTRAS", {"graphopt": "compile"})
    outcome = cli("profile", artifact, "--rounds", 2)
    assert outcome.code == 0 and "packed-gemm" in outcome.out
    assert (
        "note   no shares of the machine's roofs: " in outcome.out and 'pip install "graphopt[compile]"' in outcome.out
    )


def test_a_machine_that_cannot_link_is_said(cli: Cli, artifact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.backends import roofs

    def refuse(threads: int) -> bytes:
        raise CompileError("no linker found")

    monkeypatch.setattr(roofs, "build_roofs", refuse)
    report = cli("profile", artifact, "--rounds", 2, "--json").json
    assert report["roofs"] is None and report["notes"][0] == "no shares of the machine's roofs: no linker found"


def test_roofs_of_this_machine() -> None:
    roofs = measure_roofs(1)
    assert [level.name for level in roofs.levels][-1] == "memory" and roofs.flops_per_second > 1e8
    assert all(level.bytes_per_second > 1e6 for level in roofs.levels) and 0 < roofs.launch_seconds < 1


def test_cache_sizes_are_those_of_the_system_or_usual_ones(tmp_path: Path) -> None:
    assert cache_sizes(tmp_path) == USUAL
    for number, (kind, level, size) in enumerate([("Data", 1, "48K"), ("Instruction", 1, "32K"), ("Unified", 2, "2M")]):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    (tmp_path / "index9").mkdir()
    assert cache_sizes(tmp_path) == {1: 48 << 10, 2: 2 << 20}


def test_working_sets_fit_the_caches_of_all_threads() -> None:
    sets = working_sets({1: 32 << 10, 2: 1 << 20, 3: 32 << 20}, 4)
    assert [(name, capacity) for name, capacity, _ in sets] == [
        ("L1", 128 << 10),
        ("L2", 4 << 20),
        ("L3", 32 << 20),
        ("memory", None),
    ]
    assert all(size == capacity // 2 for _, capacity, size in sets if capacity) and sets[-1][2] == 128 << 20


def pixels(path: Path) -> Any:
    import numpy as np
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = imread(path)
    assert image.shape[0] > 250 and image.shape[1] > 1000
    return np.unique(image.reshape(-1, image.shape[-1]), axis=0)


def test_chart_of_an_artifact(cli: Cli, artifact: str, measured: None, tmp_path: Path) -> None:
    outcome = cli("profile", artifact, "--rounds", 2, "--chart", "c.png")
    assert outcome.code == 0 and len(pixels(tmp_path / "c.png")) > 50


@pytest.mark.parametrize("profile", [a_profile(1), a_profile(40), a_profile(4, None)], ids=["one", "many", "no roofs"])
def test_charts_of_any_length(profile: Profile, tmp_path: Path) -> None:
    chart.write_chart(str(tmp_path / "c.png"), profile, "model")
    assert len(pixels(tmp_path / "c.png")) > 50


def test_bars_are_the_most_expensive_kernels_and_all_slow_ones() -> None:
    drawn = chart.bars(a_profile(40))
    assert len(drawn) == chart.MOST_BARS + 2
    assert drawn[0].label == "kernel40" and drawn[0].slow and drawn[0].text.endswith(", SLOW")
    assert [bar.label for bar in drawn[-2:]] == ["20 other kernels", "outside kernels"]
    assert sum(bar.seconds for bar in drawn) == pytest.approx(a_profile(40).seconds)
    times = {"all": (1.0, 1.0), "tiny": (1.0, 1e-6), "tiny generic": (1.0, 1e-6)}
    kernels = {"tiny generic": KernelInfo("generic")}
    labels = [bar.label for bar in chart.bars(make_profile(times, kernels, "main", {}, 1.0, ROOFS))]
    assert labels == ["all", "tiny generic", "1 other kernel", "outside kernels"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--chart", "c.svg"), "end its name in .png"),
        (("--chart", "no/c.png"), "no does not exist"),
        (("--chart", "c.png", "--json", "c.png"), "--json and --chart both write c.png"),
        (("--rounds", 0), "--rounds 0 measures nothing"),
    ],
)
def test_unusable_arguments(cli: Cli, artifact: str, words: tuple[object, ...], message: str) -> None:
    cli("profile", artifact, *words).refused(message)


def test_a_chart_needs_an_extra(cli: Cli, artifact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    cli("profile", artifact, "--chart", "c.png").refused('pip install "graphopt[bench]"')


def test_rules_are_those_of_the_variant_that_was_opened(artifact: str) -> None:
    session = InferenceSession(artifact)
    assert session.variant in session.manifest.variants


def test_not_an_artifact(cli: Cli) -> None:
    cli("profile", TINY).refused("a model, not an artifact")
    cli("profile", "nothing").refused("is not an artifact")
