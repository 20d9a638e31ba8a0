"""Blocks that go or share: exact where gates are 0 or 1, ranked as defined, healed from the whole network."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.analysis.storage import stored_weights
from graphopt.contract import PassContext, Timing
from graphopt.data.dataset import open_data
from graphopt.data.metric import measure, open_metric
from graphopt.errors import PassError, UsageError
from graphopt.passes.block_folding import BlockFolding, folding
from graphopt.passes.block_folding.blocks import Blocks, find_blocks
from graphopt.passes.block_folding.gating import gated_program, learned_gates
from graphopt.passes.block_folding.ranking import angular_distances, block_influence
from graphopt.program import Program
from tests.passes.checking import captured

WIDTH = 16


class Block(nn.Module):
    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        with torch.no_grad():
            self.down.weight.mul_(strength)
            self.down.bias.mul_(strength)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return found


class Network(nn.Module):
    def __init__(self, *strengths: float, skipped: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block(strength) for strength in strengths)
        self.skipped = skipped

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            x = x if number in self.skipped else block(x)
        found: Tensor = self.head(x)
        return found


STRENGTHS = (1.0, 0.5, 0.05, 1.5, 0.3)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(1)
    return Network(*STRENGTHS).eval()


def feeds(count: int = 8) -> list[dict[str, np.ndarray[Any, Any]]]:
    generator = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(2, 6, 8, generator=generator).numpy()} for _ in range(count)]


def run(program: Program, pass_: BlockFolding, **context: Any) -> Any:
    data, metric = open_data(feeds(), program), open_metric("cosine")
    return pass_.run(program, PassContext(data=data, metric=metric, **context))


def without(network: Network, *positions: int) -> Tensor:
    network.skipped = positions
    try:
        found: Tensor = network(torch.from_numpy(feeds()[0]["x"])).detach()
        return found
    finally:
        network.skipped = ()


def outputs(program: Program) -> Tensor:
    return program(torch.from_numpy(feeds()[0]["x"]))[0]


def test_the_least_influential_blocks_go(network: Network) -> None:
    program = captured(network, torch.randn(2, 6, 8))
    result = run(program, BlockFolding(remove=2))
    assert result.notes[1] == "removed 2 of 5 blocks: 2, 4"
    assert torch.equal(outputs(result.program), without(network, 2, 4))
    assert len(result.rewrites) == 2 and not result.declined
    left = {name for name, _ in result.program.graph_module.named_parameters()}
    assert not any(name.startswith(("blocks.2", "blocks.4")) for name in left) and len(left) == 4 + 3 * 6


def test_consecutive_blocks_go_together(network: Network) -> None:
    program = captured(network, torch.randn(2, 6, 8))
    result = run(program, BlockFolding(remove=2, ranking="angular"))
    values = boundaries(network)
    angles = [angle(values[first], values[first + 2]) for first in range(1, 4)]
    first = 1 + angles.index(min(angles))
    assert result.notes[1] == f"removed 2 of 5 blocks: {first}, {first + 1}"
    assert torch.equal(outputs(result.program), without(network, first, first + 1))


def test_blocks_that_are_missed_least_go_one_after_another(network: Network) -> None:
    program = captured(network, torch.randn(2, 6, 8))
    result = run(program, BlockFolding(remove=2, ranking="loss-drop"))
    assert result.notes[1] == "removed 2 of 5 blocks: 2, 4"
    scores = dict(part.split(": ") for part in result.notes[0].removeprefix("loss-drop of blocks ").split(", "))
    assert max(scores, key=lambda key: float(scores[key])) == "2" and set(scores) == {"1", "2", "3", "4"}


def test_learned_gates_silence_what_is_needed_least(network: Network) -> None:
    program = captured(network, torch.randn(2, 6, 8))
    result = run(program, BlockFolding(remove=2, ranking="gate"))
    assert result.notes[1] == "removed 2 of 5 blocks: 2, 4"
    gates = learned_gates(program, "auto", (1, 2, 3, 4), 0.5, open_data(feeds(), program), PassContext())
    assert gates[2] < 0.5 < 0.9 < gates[3]


def test_gates_of_one_and_zero_are_the_network_and_the_one_without_to_the_bit(network: Network) -> None:
    program = captured(network, torch.randn(2, 6, 8))
    tiny = 1e-30
    whole = gated_program(program, "auto", (1, 2, 3), torch.ones(3), tiny)
    assert torch.equal(outputs(whole), outputs(program))
    some = gated_program(program, "auto", (1, 2, 3), torch.tensor([1.0, 0.0, 1.0]), tiny)
    assert torch.equal(outputs(some), without(network, 2))
    assert some(torch.from_numpy(feeds()[0]["x"]))[1].tolist() == [1.0, 0.0, 1.0]


def test_nothing_is_left_of_a_block_with_fused_attention() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    program = captured(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval(), torch.zeros(2, 5, 16))
    data = open_data([{"src": torch.randn(2, 5, 16)} for _ in range(5)], program)
    folded = BlockFolding().run(program, PassContext(data=data, metric=open_metric("cosine"))).program
    counts = [program.count_operators(), folded.count_operators()]
    weights = [sum(item.bytes for item in stored_weights(one)) for one in (program, folded)]
    assert counts[1] * 3 == counts[0] * 2
    assert weights[1] * 3 == weights[0] * 2


@pytest.mark.parametrize(("remove", "gone"), [(0.2, "2"), (0.4, "2, 4"), (99, "1, 2, 3, 4")])
def test_a_share_of_the_blocks(network: Network, remove: float, gone: str) -> None:
    program = captured(network, torch.randn(2, 6, 8))
    notes = run(program, BlockFolding(remove=remove)).notes
    assert notes[1] == f"removed {len(gone.split(','))} of 5 blocks: {gone}"


def test_a_latency_to_reach(network: Network) -> None:
    program = captured(network, torch.randn(2, 6, 8))

    def measure(candidate: Program) -> Timing:
        return Timing(1e-3 * candidate.count_operators(), 1)

    operators = program.count_operators()
    each = (operators - 2) // 5
    result = run(program, BlockFolding(remove=f"{operators - 2 * each}ms"), measure=measure)
    assert result.notes[-1] == "removed 2 of 5 blocks: 2, 4"
    unreached = run(program, BlockFolding(remove="1ms"), measure=measure)
    assert "1ms cannot be reached by removing blocks" in unreached.notes
    with pytest.raises(PassError, match="needs cpu at hand"):
        run(program, BlockFolding(remove="1ms"))


def test_influence_does_not_depend_on_scale_and_an_identity_has_none(network: Network) -> None:
    values = boundaries(network)
    found, scaled = block_influence([values]), block_influence([[value * 8 for value in values]])
    assert found == pytest.approx(scaled)
    expected = 1 - torch.nn.functional.cosine_similarity(values[3].double(), values[4].double(), dim=-1).mean()
    assert found[3] == pytest.approx(float(expected))
    assert abs(block_influence([[values[0], values[0]]])[0]) < 1e-12


def test_runs_are_counted_from_the_input_of_their_first_block() -> None:
    turns = [torch.tensor([[[math.cos(a), math.sin(a)]]]) for a in (0.0, 0.5, 0.6, 0.8, 2.0)]
    found = angular_distances([turns], 2)
    assert found == pytest.approx({0: 0.6 / math.pi, 1: 0.3 / math.pi, 2: 1.4 / math.pi}, abs=1e-6)


def test_blocks_of_a_group_read_the_weights_of_their_first(network: Network) -> None:
    program = captured(network, torch.randn(2, 6, 8))
    result = run(program, BlockFolding(mode="share"))
    for child, parent in ((2, 1), (4, 3)):
        network.blocks[child].up, network.blocks[child].down = network.blocks[parent].up, network.blocks[parent].down
    assert torch.equal(outputs(result.program), without(network))
    shared = 4 * (2 * WIDTH * WIDTH * 2 + 3 * WIDTH)
    assert result.notes == (f"blocks share {2 * shared} bytes of weights in groups of 2",)
    sizes = [sum(item.bytes for item in stored_weights(item)) for item in (program, result.program)]
    assert sizes[0] - sizes[1] == 2 * shared


def test_shared_weights_exist_once_in_every_file(network: Network, tmp_path: Any) -> None:
    torch.manual_seed(2)
    wide = Network(*(1.0,) * 5).eval()
    program = captured(wide, torch.randn(2, 6, 8))
    result = run(program, BlockFolding(mode="share", group=4))
    saved = 3 * 4 * (2 * WIDTH * WIDTH * 2 + 3 * WIDTH)
    for suffix in ("onnx", "pt2", "gopt"):
        sizes = []
        for name, item in (("before", program), ("after", result.program)):
            path = tmp_path / f"{name}.{suffix}"
            if suffix == "gopt":
                artifact = graphopt.compile(item, threads=1)
                sizes.append(sum(weight.nbytes for weight in artifact.weights.values()))
                continue
            item.to_onnx(str(path)) if suffix == "onnx" else item.save(str(path))
            sizes.append(path.stat().st_size)
        assert sizes[0] - sizes[1] > 0.8 * saved, suffix


def test_both(network: Network) -> None:
    program = captured(network, torch.randn(2, 6, 8))
    result = run(program, BlockFolding(mode="both", remove=2))
    assert [note.split(" of ")[0] for note in result.notes[1:2]] == ["removed 2"]
    network.blocks[3].up, network.blocks[3].down = network.blocks[1].up, network.blocks[1].down
    assert torch.equal(outputs(result.program), without(network, 2, 4))


def test_healing_comes_nearer_to_the_whole_network(network: Network) -> None:
    program = captured(network, torch.randn(2, 6, 8))
    folded = run(program, BlockFolding(remove=2))
    healed = run(program, BlockFolding(remove=2, heal_steps=60))
    whole = outputs(program)
    assert (outputs(healed.program) - whole).norm() < 0.9 * (outputs(folded.program) - whole).norm()
    before, after = map(float, re.findall(r"from ([\d.e-]+) to ([\d.e-]+)", healed.notes[-1])[0])
    assert after < before
    fixed = {"first.weight", "first.bias", "head.weight", "head.bias"}
    weights = dict(healed.program.graph_module.named_parameters())
    for name, value in program.graph_module.named_parameters():
        if name in fixed:
            assert torch.equal(value, weights[name])


def test_each_block_is_taught_what_its_successor_read(network: Network) -> None:
    program = captured(network, torch.zeros(2, 6, 8))
    found = find_blocks(program, "auto")
    assert isinstance(found, Blocks)
    names = [block.output.name for block in found.blocks]
    folded = folding.without(program, "auto", (2, 3))
    assert folding.taught_layers(folded, found, (2, 3)) == {names[1]: names[3], names[4]: names[4]}
    last = folding.without(program, "auto", (3, 4))
    assert folding.taught_layers(last, found, (3, 4)) == {names[2]: names[4]}
    assert folding.taught_layers(program, found, ()) == {name: name for name in names}


def test_a_chart_has_every_step_measured_on_its_own(network: Network) -> None:
    program = captured(network, torch.zeros(2, 6, 8))
    sizes: list[int] = []

    def timing(folded: Program) -> Timing:
        sizes.append(sum(node.target is torch.ops.aten.relu.default for node in folded.nodes()))
        return Timing(1e-3 * sizes[-1], 3)

    pass_ = BlockFolding(remove=2, heal_steps=4, chart=True)
    points = run(program, pass_, measure=timing).trade_offs
    assert sizes == [5, 4, 3]
    kept = [(5, "as folded"), (4, "as folded"), (4, "healed"), (3, "as folded"), (3, "healed")]
    assert [(point.value, point.variant) for point in points] == kept
    assert [point.seconds for point in points] == [5e-3, 4e-3, 4e-3, 3e-3, 3e-3]
    alone = run(program, BlockFolding(remove=1)).program
    data = open_data(feeds(), program)
    assert points[1].metric == measure(alone, data.held_out, open_metric("cosine"), reference=program)
    assert points[0].metric == 1.0 > points[1].metric > points[3].metric
    assert points[4].metric > points[3].metric


def test_the_chart_is_in_the_report_and_its_clock_stays_out_of_artifacts(network: Network, tmp_path: Any) -> None:
    program = captured(network, torch.zeros(2, 6, 8))
    result = graphopt.optimize(program, "block-folding{remove=1,chart=true}", data=feeds(), metric="cosine")
    (step,) = result.report.to_json()["passes"]
    assert [point["value"] for point in step["trade_offs"]] == [5, 4]
    assert all(point["seconds"] > 0 for point in step["trade_offs"])
    (kept,) = result.program.history
    assert [point["seconds"] for point in kept["trade_offs"]] == [None, None]


def test_chosen_blocks(network: Network) -> None:
    program = captured(network, torch.randn(2, 6, 8))
    assert run(program, BlockFolding(blocks=(0, 3))).notes[1].startswith("removed 1 of 5 blocks: ")
    assert run(program, BlockFolding(blocks="*blocks.3*")).notes[1] == "removed 1 of 5 blocks: 3"
    assert run(program, BlockFolding(blocks=(7,))).notes == ("there is no block 7: the program has 5, counted from 0",)
    assert run(program, BlockFolding(blocks="*decoder*")).notes == ("no repeated block has a module like *decoder*",)


def test_a_block_that_is_read_from_inside_stays() -> None:
    class Reading(Network):
        def forward(self, x: Tensor) -> Any:
            x = self.first(x)
            inner = []
            for block in self.blocks:
                assert isinstance(block, Block)
                hidden = torch.relu(block.up(block.norm(x)))
                inner.append(hidden)
                x = x + block.down(hidden)
            return self.head(x), inner[2]

    program = captured(Reading(*STRENGTHS).eval(), torch.randn(2, 6, 8))
    result = run(program, BlockFolding(remove=4))
    assert [item.reason for item in result.declined] == ["relu_2 inside it is also read outside"]
    assert result.notes[1] == "removed 3 of 5 blocks: 1, 3, 4"


def test_nothing_repeats() -> None:
    program = captured(nn.Sequential(nn.Linear(8, 4), nn.Tanh()), torch.randn(2, 8))
    result = BlockFolding().run(program, PassContext())
    assert result.program is program and result.notes[0].startswith("there are no repeated blocks")


def test_the_pipeline_measures_what_was_lost(network: Network) -> None:
    program = captured(network, torch.randn(2, 6, 8))
    result = graphopt.optimize(program, "block-folding{remove=2}", data=feeds(), metric="cosine")
    assert result.report.metric is not None and 0.9 < result.report.metric.after < result.report.metric.before == 1.0
    with pytest.raises(UsageError, match="needs both data and metric"):
        graphopt.optimize(program, "block-folding")


@pytest.mark.parametrize(
    "options",
    [
        {"remove": 0},
        {"remove": 1.5},
        {"remove": "fast"},
        {"group": 1},
        {"heal_steps": -1},
        {"heal_rate": 0.001},
        {"heal_rate": 3.0, "heal_steps": 1},
    ],
)
def test_refused_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        BlockFolding(**options)


def boundaries(network: Network) -> list[Tensor]:
    """Over the samples that are for fitting, put together along the batch."""
    found: list[list[Tensor]] = []
    for feed in feeds()[:7]:
        x = network.first(torch.from_numpy(feed["x"]))
        values = [x]
        for block in network.blocks:
            values.append(block(values[-1]))
        found.append(values)
    return [torch.cat(items).detach() for items in zip(*found, strict=True)]


def angle(left: Tensor, right: Tensor) -> float:
    cosine = torch.nn.functional.cosine_similarity(left[:, -1].double(), right[:, -1].double(), dim=-1)
    return float(cosine.clamp(-1, 1).acos().mean())
