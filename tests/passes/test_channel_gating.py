"""Channel gating: where it fires and where not, and that all of its forms compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphopt
from graphopt.analysis.cost import node_costs, total_cost
from graphopt.contract import PassContext, PassResult, Timing
from graphopt.data.dataset import Sample, open_data
from graphopt.data.metric import open_metric
from graphopt.errors import UsageError
from graphopt.passes.channel_gating import ChannelGating, estimate
from graphopt.passes.channel_gating.account import active_on, shares
from graphopt.passes.channel_gating.gating import Form, Written, sites_of
from graphopt.passes.channel_gating.predictor import Predictor
from graphopt.passes.channel_gating.targets import group_channels, share_targets
from graphopt.program import Program
from tests.passes.checking import captured, fingerprint, targets

SIZE = 6
FORMS: tuple[Form, ...] = ("mask", "block", "bucket")


class Pair(nn.Module):
    """conv - batch norm - relu - conv - relu - pool - linear: two sites."""

    def __init__(self, channels: int = 64, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 32, 3, padding=1)
        self.norm: nn.Module = nn.Identity()
        self.head = nn.Linear(32, 5)
        if norm:
            self.norm = nn.BatchNorm2d(channels)
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x)).relu()).relu()
        found: Tensor = self.head(functional.max_pool2d(x, 2).mean((2, 3)))
        return found


class Chain(nn.Module):
    """Three convolutions one after the other, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.second, self.third = (nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.first(x).relu(), 2)
        found: Tensor = self.head(self.third(self.second(x).relu()).relu().mean((2, 3)))
        return found


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv2d(4, 64, 3, padding=1), nn.Conv2d(64, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.hardswish(self.second(self.first(x).relu()))


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.expand, self.depthwise = nn.Conv2d(16, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.project = nn.Conv2d(64, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(functional.relu6(self.depthwise(functional.relu6(self.expand(x)))))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(24, 64), nn.Linear(64, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(x)))


def images(samples: int = 2, channels: int = 3, seed: int = 5) -> Tensor:
    return torch.randn(samples, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def context(program: Program, *inputs: Tensor, labels: bool = False, **options: Any) -> PassContext:
    """Ten feeds of noise like the inputs, the last two held out."""
    generator = torch.Generator().manual_seed(7)
    names = [spec.name for spec in program.inputs]
    feeds = [
        {name: torch.randn(value.shape, generator=generator) for name, value in zip(names, inputs, strict=True)}
        for _ in range(10)
    ]
    data: list[Any] = [(feed, torch.randint(0, 5, (len(inputs[0]),))) for feed in feeds] if labels else feeds
    return PassContext(data=open_data(data, program), metric=open_metric("cosine"), **options)


def stepped(blocks: int, inputs: int, count: int | None = None) -> Predictor:
    """As many of the first blocks as the mean of the features says, from 0 to 1."""
    order = torch.arange(16 * blocks)
    bias = -(torch.arange(blocks) / blocks)
    return Predictor("linear", torch.full((blocks, inputs), 1 / inputs), bias, count, order)


def written(program: Program, form: Form, predictors: dict[str, Predictor]) -> Written:
    return ChannelGating(keep=0.5, form=form).write(program, PassContext(), predictors)


def samples(*inputs: Tensor) -> list[Sample]:
    return [Sample(tuple(inputs))]


def compiled(program: Program, *inputs: Tensor) -> Tensor:
    session = graphopt.compile(program, threads=1).session(1)
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def check(program: Program, pass_: ChannelGating, rewrites: int, reason: str | None = None) -> PassResult:
    """Run the pass and check what every pass owes its caller."""
    printed, tensors = fingerprint(program)
    result = pass_.run(program, PassContext())
    assert len(result.rewrites) == rewrites, [*result.rewrites, *result.declined]
    assert fingerprint(program)[0] == printed
    assert all(torch.equal(old, new) for old, new in zip(fingerprint(program)[1], tensors, strict=True))
    assert str(pass_.run(program, PassContext()).program.graph_module.graph) == str(result.program.graph_module.graph)
    assert not pass_.run(result.program, PassContext()).rewrites
    refused = pass_.run(program, PassContext(allow=lambda identity: False))
    assert refused.program is program and not refused.rewrites
    if reason is not None:
        assert any(reason in item.reason for item in result.declined), result.declined
    return result


# Where ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("module", "inputs", "sites"),
    [
        (Pair(), images(), ["conv2d", "conv2d_1"]),
        (One(), images(channels=4), ["conv2d"]),
        (Separable(), images(channels=16), ["conv2d"]),
        (FeedForward(), torch.randn(2, 5, 24), ["linear"]),
    ],
)
def test_sites(module: nn.Module, inputs: Tensor, sites: list[str]) -> None:
    program = captured(module, inputs)
    assert [site.name for site in sites_of(program, through_norms=False)] == sites
    result = check(program, ChannelGating(form="block"), rewrites=len(sites))
    assert sum("gated" in name for name in targets(result.program)) >= 2


class Joined(nn.Module):
    """What the channels of the first of two convolutions meet, by `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(32, 32, 3, padding=1)
        self.second = nn.Conv2d(64 if kind == "cat" else 32, 32, 1, groups=2 if kind == "groups" else 1)

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        if self.kind == "residual":
            return self.second((x + y).relu())
        if self.kind == "cat":
            return self.second(torch.cat((x, y), 1))
        if self.kind == "gated":
            return self.second(y * x)
        if self.kind == "sigmoid":
            return self.second(y.sigmoid())
        if self.kind == "softmax":
            return self.second(y.softmax(1))
        if self.kind == "output":
            return y.relu()
        if self.kind == "several":
            return self.second(y), y.sum((2, 3))
        if self.kind == "shared":
            return self.first(y)
        return self.second(y.relu())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("residual", "conv2d joins a residual stream at add: what it is added to would need the same channels"),
        ("cat", "is joined to other channels at cat"),
        ("gated", "is multiplied by another value at mul"),
        ("sigmoid", "makes 0.5 of 0: what is left out would not be 0"),
        ("output", "relu is an output of the graph"),
        ("several", "conv2d is read by conv2d_1, sum_1, not by products alone"),
        ("shared", "the weight of conv2d is read 2 times"),
        ("groups", "conv2d_1 has 2 groups of channels"),
    ],
)
def test_what_meets_other_channels_is_declined(kind: str, reason: str) -> None:
    check(captured(Joined(kind), images(channels=32)), ChannelGating(), 0, reason)


def test_what_is_no_part_of_the_pattern_is_a_near_miss() -> None:
    result = check(captured(Joined("softmax"), images(channels=32)), ChannelGating(), 0)
    (found,) = result.near_misses
    assert found.node == "conv2d" and "softmax" in found.reason and "takes no part of its channels" in found.reason


def test_several_readers_that_are_products_all_take_their_part() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.left, self.right = nn.Linear(8, 32), nn.Linear(32, 3), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.up(x).relu()
            return self.left(x), self.right(x)

    x = torch.randn(2, 8)
    program = captured(Fork(), x)
    results = [written(program, form, {"linear": stepped(2, 8, 1)}).result for form in ("mask", "block")]
    for one, other in zip(results[0].program(x), results[1].program(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_channels_of_a_branch_are_declined() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = FeedForward()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = torch.cond(x.sum() > 0, self.pair, lambda x: x.clone(), (x,))
            return found

    check(captured(Branching(), torch.randn(2, 3, 24)), ChannelGating(), 0, "is in a branch")


# Exact ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{"mass": 2.0}, {"keep": 1.0}])
@pytest.mark.parametrize("form", ["mask", "block"])
def test_with_all_blocks_it_is_the_network_to_the_bit(form: Form, options: dict[str, Any]) -> None:
    x = images()
    program = captured(Pair(), x)
    result = ChannelGating(form=form, **options).run(program, context(program, x))
    assert len(result.rewrites) == 2
    assert torch.equal(result.program(x)[0], program(x)[0])


def in_every_bucket(channels: int) -> list[Tensor]:
    """Inputs [1, channels, SIZE, SIZE] for which 1, 2, 3 and 4 of four blocks are kept, and some beyond."""
    noise = images(1, channels)
    return [noise - noise.mean() + mean for mean in (-1.0, 0.1, 0.3, 0.6, 0.9, 3.0)]


def test_all_forms_agree_in_every_bucket() -> None:
    """And each width of the buckets has its two convolutions with all that is behind them in one kernel."""
    inputs = in_every_bucket(4)
    program = captured(One(), inputs[0])
    results = {form: written(program, form, {"conv2d": stepped(4, 4)}) for form in FORMS}
    artifacts = {form: graphopt.compile(results[form].result.program, threads=1) for form in FORMS[1:]}
    sessions = {form: artifact.session(1) for form, artifact in artifacts.items()}
    mask, kept = results["mask"], set()
    for x in inputs:
        wanted = mask.result.program(x)[0]
        kept.add(int(active_on(mask.result.program, mask.active, samples(x))["conv2d"].sum()))
        for form, session in sessions.items():
            torch.testing.assert_close(results[form].result.program(x)[0], wanted, rtol=1e-5, atol=1e-5)
            found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert kept == {1, 2, 3, 4}
    kernels = list(artifacts["bucket"].report["kernels"])
    assert sum(name.startswith("conv2d") and "relu" in name for name in kernels) == 4
    assert sum(name.startswith("gemm") and "hardswish" in name for name in kernels) == 4
    assert not [name for name in kernels if name.startswith(("relu", "hardswish"))]


@pytest.mark.parametrize("count", [None, 2])
def test_predictors_find_channels_that_were_moved(count: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    x = images(1)
    program = captured(Chain(), x)

    def random(inputs: int) -> Predictor:
        weight, bias = torch.randn(4, inputs, generator=generator), torch.randn(4, generator=generator) / 2
        return Predictor("linear", 3 * weight, bias, count, torch.randperm(64, generator=generator))

    predictors = {name: random(inputs) for name, inputs in (("conv2d", 3), ("conv2d_1", 64), ("conv2d_2", 64))}
    mask, *others = (written(program, form, predictors) for form in (*FORMS[:2], "gather") if count or form != "gather")
    seen = set()
    for seed in range(6):
        x = images(1, seed=seed)
        wanted = mask.result.program(x)[0]
        seen.add(str(active_on(mask.result.program, mask.active, samples(x))["conv2d_2"].tolist()))
        for item in others:
            assert len(item.result.rewrites) == 3
            torch.testing.assert_close(item.result.program(x)[0], wanted, rtol=1e-5, atol=1e-5)
    assert len(seen) > 1


@pytest.mark.parametrize("predictor", ["linear", "topk"])
def test_a_fixed_number_of_blocks_agrees_in_all_forms(predictor: Any) -> None:
    x = images(1)
    program = captured(Pair(), x)
    given = context(program, x)
    results = {
        form: ChannelGating(keep=0.5, form=form, predictor=predictor).run(program, given)
        for form in ("mask", "block", "gather")
    }
    for seed in range(4):
        x = images(1, seed=seed)
        wanted = results["mask"].program(x)[0]
        assert not torch.allclose(wanted, program(x)[0], atol=1e-4)
        for result in results.values():
            torch.testing.assert_close(result.program(x)[0], wanted, rtol=1e-5, atol=1e-5)
    if predictor == "topk":  # which compiles all that linear does
        torch.testing.assert_close(compiled(results["gather"].program, x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("module", "shape"), [(Separable(), (3, 16, SIZE, SIZE)), (FeedForward(), (3, 5, 24))])
def test_depthwise_and_rows_agree(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) + torch.tensor([-1.0, 0.3, 0.8]).reshape(3, *[1] * (len(shape) - 1))
    program = captured(module, x, dynamic={"x": {0: "batch"}})
    (site,) = sites_of(program, through_norms=False)
    predictors = {site.name: stepped(4, shape[1] if len(shape) == 4 else shape[2])}
    mask, block = (written(program, form, predictors) for form in ("mask", "block"))
    counts = active_on(mask.result.program, mask.active, samples(x))[site.name].sum(1)
    assert len(set(counts.tolist())) == 3
    wanted = mask.result.program(x)[0]
    torch.testing.assert_close(block.result.program(x)[0], wanted, rtol=1e-5, atol=1e-5)


def test_norms_are_folded_or_passed() -> None:
    x = images()
    program = captured(Pair(norm=True), x)
    given = context(program, x)
    mask, block = (ChannelGating(keep=0.5, form=form).run(program, given) for form in ("mask", "block"))
    assert "aten._native_batch_norm_legit_no_training" in targets(mask.program)
    assert [item.rule for item in block.rewrites] == ["batch-norm-folding", "channel-gating", "channel-gating"]
    torch.testing.assert_close(mask.program(x)[0], block.program(x)[0], rtol=1e-5, atol=1e-5)


def test_leaving_out_channels_is_zeroing_what_they_lead_to() -> None:
    x = images(1, 4)
    module = One()
    program = captured(module, x)
    predictor = stepped(4, 4)
    kept = Predictor("linear", torch.zeros(4, 4), torch.tensor([1.0, -1.0, 1.0, -1.0]), None, predictor.order)
    found = written(program, "block", {"conv2d": kept}).result.program(x)[0]
    with torch.no_grad():
        module.second.weight[:, 16:32] = 0
        module.second.weight[:, 48:] = 0
    torch.testing.assert_close(found, module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["mask", "block", "bucket"])
def test_the_best_block_is_kept_where_no_score_is_positive(form: Form) -> None:
    x = images(2, 4)
    program = captured(One(), x)
    scores = torch.tensor([-4.0, -3.0, -5.0, -3.5])
    item = written(program, form, {"conv2d": Predictor("linear", torch.zeros(4, 4), scores, None, torch.arange(64))})
    active = active_on(item.result.program, item.active, samples(x))["conv2d"]
    assert active.tolist() == [[False, True, False, False]] * 2


def test_equal_scores_keep_the_first_blocks() -> None:
    x = images(1, 4)
    program = captured(One(), x)
    even = Predictor("topk", torch.zeros(4, 4), -torch.arange(4.0), 2, torch.arange(64))  # relu makes them equal
    mask, gather = (written(program, form, {"conv2d": even}) for form in ("mask", "gather"))
    assert active_on(mask.result.program, mask.active, samples(x))["conv2d"].tolist() == [[True, True, False, False]]
    torch.testing.assert_close(gather.result.program(x)[0], mask.result.program(x)[0], rtol=1e-5, atol=1e-5)


# Targets --------------------------------------------------------------------------------------------------------------
def test_targets_hold_the_mass_and_grow_with_it() -> None:
    heat = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.0, 9.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert share_targets(heat, 0.7).tolist() == [[True, False, True, False], [False, True, False, False], [True] * 4]
    assert share_targets(heat, 1.0).tolist() == [[True] * 4, [False, True, True, False], [True, False, False, False]]
    assert share_targets(heat, 1.1).all()
    noise = torch.rand(50, 32, generator=torch.Generator().manual_seed(0)) ** 4
    counts = torch.stack([share_targets(noise, mass).sum(1) for mass in (0.01, 0.2, 0.5, 0.8, 0.95, 1.0)])
    assert (counts.diff(dim=0) >= 0).all() and (counts >= 1).all()
    assert (share_targets(noise, count=5).sum(1) == 5).all()


def test_channels_that_are_hot_together_come_into_one_block() -> None:
    heat = torch.zeros(6, 32)
    heat[:3, ::2] = 1 + torch.rand(3, 16)
    heat[3:, 1::2] = 1 + torch.rand(3, 16)
    order = group_channels(heat, 16)
    assert sorted(order.tolist()) == list(range(32))
    assert {int(channel) % 2 for channel in order[:16]} in ({0}, {1})


def test_the_estimate_is_what_following_the_targets_leaves() -> None:
    x = images()
    program = captured(Pair(), x)
    data = [{"x": images(seed=seed)} for seed in range(10)]
    whole, some, half = (estimate(program, data, **given) for given in ({"mass": 2}, {"mass": 0.4}, {"keep": 0.5}))
    assert whole.total == 1 and set(whole.kept.values()) == {1.0}
    assert 0 < some.total < 1
    assert half.kept == {"conv2d": 0.5, "conv2d_1": 0.5}
    assert half.products == {"conv2d": 0.5, "conv2d_1": 0.25, "linear": 0.5}
    with pytest.raises(UsageError, match="give one of them"):
        estimate(program, data)


def test_work_adds_up() -> None:
    """What masks leave is what a network with only those channels computes."""
    x = images(1)
    program = captured(Pair(), x)
    given = context(program, x)
    mask, gather = (ChannelGating(keep=0.5, form=form).run(program, given) for form in ("mask", "gather"))

    def macs(of: Program) -> int:
        return total_cost(node_costs(of).values()).macs

    sites = sites_of(program, through_norms=True)
    half = {site.name: torch.tensor([[True, False] * (site.blocks // 2)]) for site in sites}
    scores = 4 * 3 + 2 * 32  # of both sites, from three channels and from half of 64
    assert macs(gather.program) - scores == round(shares(program, sites, half).total * macs(program))
    assert macs(mask.program) == macs(program) + 4 * 3 + 2 * 64
    assert f"{shares(program, sites, half).total:.1%} of the multiply-accumulates" in mask.notes[1]


# Forms ----------------------------------------------------------------------------------------------------------------
class Dead(nn.Module):
    """A third of the hidden channels never leaves zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 8, 3)
        self.first.bias = nn.Parameter(torch.where(torch.arange(24) % 3 == 0, -1e3, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def test_channels_that_no_sample_needs_are_gone() -> None:
    x = images()
    program = captured(Dead(), x)
    result = ChannelGating(mass=1.0, form="static").run(program, context(program, x))
    sizes = [node.meta["val"].shape[1] for node in result.program.nodes() if "conv2d" in str(node.target)]
    assert sizes == [16, 8]
    torch.testing.assert_close(result.program(x)[0], program(x)[0], rtol=1e-5, atol=1e-5)
    fewer = ChannelGating(keep=0.25, form="static").run(program, context(program, x))
    assert fewer.program.graph_module.graph.find_nodes(op="get_attr")[0].meta["val"].shape[0] == 6
    whole = captured(Pair(), x)
    kept = ChannelGating(mass=2.0, form="static").run(whole, context(whole, x))
    assert kept.program is whole and kept.declined[0].reason == "every channel is used"
    with pytest.raises(UsageError, match="there is no data"):
        ChannelGating(form="static").run(program, PassContext())


def test_forms_that_do_not_fit_say_why() -> None:
    x = images()
    few = captured(Pair(40), x)
    block = ChannelGating(form="block").run(few, PassContext())
    assert "its 40 channels are no two blocks of 16 or more" in [item.reason for item in block.declined]
    assert len(block.rewrites) == 1
    gather = ChannelGating(form="gather").run(captured(Pair(), x), PassContext())
    assert gather.declined[0].reason == "2 samples at once take different channels; capture it with one"
    bucket = ChannelGating(form="bucket").run(captured(Pair(), x), PassContext())
    assert "conv2d_1 is in the branches of another site" in [item.reason for item in bucket.declined]
    half = graphopt.capture(FeedForward().double(), (torch.randn(2, 3, 24, dtype=torch.float64),))
    declined = ChannelGating(form="block").run(half, PassContext()).declined
    assert "its weights are torch.float64, not float32" in [item.reason for item in declined]


def test_the_form_is_chosen_by_measurement() -> None:
    program = captured(One(), images(1, 4))
    seconds = {"cond": 1.0, "index_select": 2.0, "gated_convolution": 3.0}

    def measure(candidate: Program) -> Timing:
        names = " ".join(targets(candidate))
        return Timing(next((value for name, value in seconds.items() if name in names), 9.0), 1)

    chosen = ChannelGating().run(program, PassContext(measure=measure))
    assert any("form=bucket was measured to be the fastest" in note for note in chosen.notes)
    assert any("without gates 9000.000 ms" in note for note in chosen.notes)
    seconds["gated_convolution"] = 0.5
    chosen = ChannelGating().run(program, PassContext(measure=measure))
    assert any("gated_convolution" in name for name in targets(chosen.program))
    unmeasured = ChannelGating().run(program, PassContext())
    assert any("nothing was measured" in note and "form=block" in note for note in unmeasured.notes)
    assert str(unmeasured.program.graph_module.graph) == str(chosen.program.graph_module.graph)
