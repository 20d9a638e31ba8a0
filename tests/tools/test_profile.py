from __future__ import annotations

from graphopt.runtime.session import InferenceSession
from graphopt.tools.profile_artifact import kernel_rows
from tests.tools.conftest import TINY, Cli


def test_profile(cli: Cli, artifact: str) -> None:
    report = cli("profile", artifact, "--rounds", 3, "--json").json
    assert report["kernels"] and abs(sum(row["share"] for row in report["kernels"]) - 1) < 1e-6


def test_slow_kernels_are_generic_and_take_over_2_percent() -> None:
    times = {"big": (1.0, 90.0), "loops": (2.0, 4.0), "small": (1.0, 1.0)}
    rows = kernel_rows(times, {"big": "gemm", "loops": "generic", "small": "generic"})
    assert [(row["kernel"], row["slow"]) for row in rows] == [("big", False), ("loops", True), ("small", False)]


def test_rules_are_those_of_the_variant_that_was_opened(artifact: str) -> None:
    session = InferenceSession(artifact)
    assert session.variant in session.manifest.variants


def test_not_an_artifact(cli: Cli) -> None:
    cli("profile", TINY).refused("a model, not an artifact")
    cli("profile", "nothing").refused("is not an artifact")
