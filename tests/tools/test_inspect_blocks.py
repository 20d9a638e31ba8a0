from __future__ import annotations

import pytest
from torch import Tensor, nn

from tests.analysis.residual_models import Gated, Residual, Stack, example, example_ids
from tests.tools.conftest import Cli
from tests.tools.tiny_models import dense

HERE = "tests.tools.test_inspect_blocks"


def gated() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Gated(*(Residual() for _ in range(3))).eval(), (example(), example_ids())


def nested() -> tuple[nn.Module, tuple[Tensor, ...]]:
    pairs = [nn.Sequential(Residual(), Residual(), nn.Linear(8, 8)) for _ in range(2)]
    return Stack(*pairs).eval(), (example(),)


def plain() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return dense()


def test_blocks_as_json(cli: Cli) -> None:
    report = cli("inspect", f"{HERE}:gated", "--dynamic", "x:1=seq", "mask:1=seq", "--blocks", "--json").json
    (repeat,) = report["repeats"]
    assert (repeat["count"], [block["module"] for block in repeat["blocks"]]) == (3, [f"blocks.{i}" for i in range(3)])
    for block, cut in zip(repeat["blocks"], report["cut_points"], strict=True):
        assert block["cut_points"] == block["live_outs"] == [block["output"]] == [cut["node"]]
        assert (len(block["nodes"]), len(block["weights"]), len(block["side_inputs"])) == (6, 6, 1)
        assert block["macs"] == 2 * 4 * 2 * 8 * 16
        assert block["weight_bytes"] == 4 * (2 * 8 * 16 + 16 + 8 + 2 * 8)
    assert (report["macs"], report["macs_at"]) == (3 * 2 * 4 * 2 * 8 * 16, {"seq": 4})


def test_blocks_as_text(cli: Cli) -> None:
    text = cli("inspect", f"{HERE}:nested", "--blocks").out
    for words in ("cut points", "repeated blocks", "1/2", "2/2", "1.1.1", "1.2.1", "blocks.1.0", "MACs"):
        assert words in text


def test_without_repetition(cli: Cli) -> None:
    report = cli("inspect", f"{HERE}:plain", "--blocks", "--json").json
    assert report["repeats"] == [] and [cut["node"] for cut in report["cut_points"]] == ["linear", "relu"]
    assert "repeated blocks\n  (none)" in cli("inspect", f"{HERE}:plain", "--blocks").out


def test_totals_without_blocks(cli: Cli) -> None:
    outcome = cli("inspect", f"{HERE}:plain")
    assert "MACs        384\n" in outcome.out and "cut points" not in outcome.out
    assert "repeats" not in cli("inspect", f"{HERE}:plain", "--json").json


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_an_artifact_has_no_blocks(cli: Cli, artifact: str, extra: list[str]) -> None:
    cli("inspect", artifact, "--blocks", *extra).refused("compiled already", "the model it was made from")
