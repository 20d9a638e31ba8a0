"""Channel gating: how gated networks learn, and the files that they go into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.contract import PassContext
from graphopt.data.dataset import open_data
from graphopt.errors import UsageError
from graphopt.passes.channel_gating import ChannelGating
from graphopt.passes.channel_gating.fitting import _straight_through, _training_program, network_weights
from graphopt.passes.channel_gating.following import follow, solve_again
from graphopt.passes.channel_gating.gating import sites_of
from graphopt.passes.channel_gating.predictor import Kind
from graphopt.passes.channel_gating.targets import look
from graphopt.program import Program, get_attribute
from tests.passes.checking import captured, targets
from tests.passes.test_channel_gating import Chain, FeedForward, Pair, Separable, context, images, stepped


# Learning -------------------------------------------------------------------------------------------------------------
def weights(program: Program) -> list[Tensor]:
    return [value for name, value in program.graph_module.state_dict().items() if "channel_gating" not in name]


@pytest.mark.parametrize(
    ("options", "labels"),
    [({"mass": 0.6}, True), ({"keep": 0.5, "predictor": "topk", "joint": True}, True), ({"mass": 0.6}, False)],
)
def test_network_and_predictors_learn(options: dict[str, Any], labels: bool) -> None:
    x = images()
    program = captured(Pair(32, norm=True), x)
    result = ChannelGating(form="block", fit_steps=5, **options).run(program, context(program, x, labels=labels))
    (note,) = [note for note in result.notes if note.startswith("training took the loss")]
    before, after = (float(word) for word in note.split(" from ")[1].split(" on ")[0].split(" to "))
    assert after <= before
    if after < before:
        (head,) = [value for value in weights(program) if value.shape == (5,)]
        assert not any(torch.equal(head, new) for new in weights(result.program) if new.shape == (5,))


@pytest.mark.parametrize("joint", [False, True])
def test_gradients_pass_decisions_only_where_they_are_asked_to(joint: bool) -> None:
    program = captured(Pair(32), images())
    predictors = {"conv2d": stepped(2, 3), "conv2d_1": stepped(2, 32)}
    gated, trained = _training_program(program, predictors, joint)
    assert [item.site.name for item in trained] == (["conv2d", "conv2d_1"] if joint else [])
    assert sum("aten.mul" in name for name in targets(gated)) == 2
    scores, limit = torch.tensor([[0.5, -0.5, 0.0]], requires_grad=True), torch.zeros(1, 1)
    decided = _straight_through(scores, limit)
    assert decided.tolist() == [[1.0, 0.0, 1.0]]
    assert torch.autograd.grad(decided.sum(), scores)[0].tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("kind", ["linear", "topk"])
def test_predictors_are_settled_on_what_gates_leave_them(kind: Kind) -> None:
    program = captured(Chain(), images())
    colours = images(20)[:, :, :1, :1] * 4
    data = open_data([{"x": images(seed=seed) + colour} for seed, colour in enumerate(colours)], program)
    samples, gating = list(data.fit), ChannelGating(keep=0.5, predictor=kind)
    sites = sites_of(program, through_norms=False)
    seen = look(program, sites, samples)
    first = {site.name: gating.begin(site, seen[site.name]) for site in sites}
    wanted = {site.name: gating.targets(seen[site.name], first[site.name], site) for site in sites}
    settled = follow(program, first, wanted, samples)
    again = solve_again(program, settled, wanted, samples)
    assert len(sites) == 3
    for number, name in enumerate(settled):
        assert torch.equal(settled[name].weight, again[name].weight)
        assert torch.allclose(settled[name].weight, first[name].weight, atol=1e-3) is (number == 0)


def test_what_folding_made_anew_learns_too() -> None:
    program = captured(Pair(32, norm=True), images())
    folded = graphopt.optimize(program, "batch-norm-folding").program
    shapes = {get_attribute(folded.graph_module, name).shape for name in network_weights(folded)}
    assert shapes == {(32, 3, 3, 3), (32, 32, 3, 3), (32,), (5, 32), (5,)}


def test_without_data_there_is_nothing_to_learn_from() -> None:
    with pytest.raises(UsageError, match="there is no data"):
        ChannelGating(fit_steps=3).run(captured(Pair(), images()), PassContext())


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("keep=0.5,mass=0.9", "exclude each other"),
        ("keep=0", "over 0 and at most 1"),
        ("mass=0", "must be over 0"),
        ("mass=0.9,predictor=topk", "give keep instead"),
        ("mass=0.9,form=gather", "give keep instead"),
        ("fit-steps=-1", "0 or more"),
        ("joint=true", "no effect with fit-steps=0"),
        ("form=static,fit-steps=5", "has no effect"),
    ],
)
def test_options_that_mean_nothing_are_refused(spec: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        graphopt.optimize(captured(Pair(), images()), f"channel-gating{{{spec}}}")


# Files ----------------------------------------------------------------------------------------------------------------
class Everything(nn.Module):
    """A depthwise-separable block, then two convolutions, then a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.separable, self.feed_forward = Separable(), FeedForward()
        self.first, self.second = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.separable(x)).relu())
        found: Tensor = self.feed_forward(x.flatten(2).transpose(1, 2))
        return found


def test_files(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    x = images(channels=16)
    program = captured(Everything(), x, dynamic={"x": {0: "batch"}})
    gated = ChannelGating(mass=0.5, form="block").run(program, context(program, x)).program
    assert sum("gated" in name for name in targets(gated)) == 3 + 2 + 2
    wanted = gated(x)[0]
    assert not torch.allclose(wanted, program(x)[0], atol=1e-4)
    gated.save(str(tmp_path / "gated.pt2"))
    assert torch.equal(graphopt.capture(str(tmp_path / "gated.pt2"))(x)[0], wanted)
    gated.to_onnx(str(tmp_path / "gated.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "gated.onnx"), providers=["CPUExecutionProvider"])
    for some in (x, x[:1]):
        found = torch.from_numpy(session.run(None, {"x": some.numpy()})[0])
        torch.testing.assert_close(found, gated(some)[0], rtol=1e-4, atol=1e-5)
