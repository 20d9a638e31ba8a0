"""Sizes that fit no tile: every operator with a rule at drawn sizes, against float64, and at any number of threads.

Sizes are 1, primes, and the sides of powers of two and of tiles. All draws come from a seed, so a failure repeats.
"""

from __future__ import annotations

import copy
import importlib
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.program import Program
from graphopt.runtime.session import InferenceSession

F = nn.functional
SIZES = (1, 2, 3, 5, 7, 13, 16, 17, 31, 48, 49, 97, 128, 131)
MOST = 60_000  # elements of one tensor
SLOW_DRAWS = 6  # of each operator
INFINITE = (math.nan, math.inf, -math.inf)
NO_NUMBER = (math.nan, math.inf)  # where the limit at -inf is not PyTorch's, as docs/numerics.md says


class Case(nn.Module):
    """A function of the inputs as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> Any:
        return self.function(*(x for x in (a, b, c) if x is not None))


Drawn = tuple[nn.Module, tuple[Tensor, ...]]


class Draw:
    """Choices from one seed; a size of 0 can be forced on the axis that is drawn as number `empty`."""

    def __init__(self, seed: str, empty: int | None = None) -> None:
        self.random, self.empty, self.drawn = random.Random(seed), empty, 0
        self.generator = torch.Generator().manual_seed(self.random.randrange(1 << 30))

    def sizes(self, count: int, most: int = MOST) -> tuple[int, ...]:
        """`count` sizes whose product is at most `most`."""
        while math.prod(found := [self.random.choice(SIZES) for _ in range(count)]) > most:
            pass
        place = -1 if self.empty is None else self.empty - self.drawn
        self.drawn += count
        return tuple(0 if number == place else size for number, size in enumerate(found))

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def linear(draw: Draw) -> Drawn:
    rows, k, n = draw.sizes(3, 400_000)
    bias, end = draw.pick(True, False), draw.pick(nn.Identity(), nn.ReLU(), nn.SiLU())
    return nn.Sequential(nn.Linear(k, n, bias=bias), end), (draw.tensor(rows, k),)


def matmul(draw: Draw) -> Drawn:
    batch, m, k, n = draw.sizes(4, 400_000)
    shared = draw.pick(True, False)
    right = draw.tensor(*(() if shared else (batch,)), k, n)
    if draw.pick(True, False):
        return Case(lambda a, b: a @ b.transpose(-1, -2)), (
            draw.tensor(batch, m, k),
            right.transpose(-1, -2).contiguous(),
        )
    return Case(torch.matmul), (draw.tensor(batch, m, k), right)


def attention(draw: Draw) -> Drawn:
    batch, groups, rows, columns, depth = draw.sizes(5, 200_000)
    heads = groups * draw.pick(1, 1, 2)
    shapes = [(batch, heads, rows, depth), (batch, groups, columns, depth), (batch, groups, columns, depth)]
    function = Case(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != groups))
    return function, tuple(draw.tensor(*shape) for shape in shapes)


def causal(draw: Draw) -> Drawn:
    batch, heads, rows, depth = draw.sizes(4)
    function = Case(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    return function, tuple(draw.tensor(batch, heads, rows, depth) for _ in range(3))


def convolution(draw: Draw) -> Drawn:
    groups = draw.pick(1, 1, 2, 3)
    batch, inputs, outputs, height, width = draw.sizes(5, 100_000)
    taps, dilation = (draw.pick(1, 2, 3, 5), draw.pick(1, 2, 4)), draw.pick(1, 1, 2)
    reach = [(tap - 1) * dilation + 1 for tap in taps]
    padding = [
        max(-(-(least - size) // 2), draw.pick(0, least // 2))
        for least, size in zip(reach, (height, width), strict=True)
    ]
    options = {"stride": draw.pick(1, 2, 3), "padding": tuple(padding), "dilation": dilation, "groups": groups}
    module = nn.Conv2d(inputs * groups, outputs * groups, taps, bias=draw.pick(True, False), **options)
    return nn.Sequential(module, draw.pick(nn.Identity(), nn.ReLU())), (
        draw.tensor(batch, inputs * groups, height, width),
    )


def minimal_filtering(draw: Draw) -> Drawn:
    batch, height, width = draw.sizes(3, 1500)
    inputs, outputs = draw.pick(31, 32, 48, 49), draw.pick(31, 32, 48, 97)
    padding = max(draw.pick(0, 1), int(0 < min(height, width) < 3))
    return nn.Conv2d(inputs, outputs, 3, padding=padding), (draw.tensor(batch, inputs, height, width),)


def depthwise(draw: Draw) -> Drawn:
    batch, channels, height, width = draw.sizes(4)
    tap = draw.pick(3, 5, 7)
    module = nn.Conv2d(channels, channels, tap, stride=draw.pick(1, 2), padding=tap // 2, groups=max(channels, 1))
    return module, (draw.tensor(batch, channels, height, width),)


def convolution_1d(draw: Draw) -> Drawn:
    batch, inputs, outputs, length = draw.sizes(4, 100_000)
    tap = draw.pick(1, 3, 4)
    return nn.Conv1d(inputs, outputs, tap, stride=draw.pick(1, 2), padding=tap // 2), (
        draw.tensor(batch, inputs, length),
    )


def pooling(draw: Draw) -> Drawn:
    shape, window, stride = draw.sizes(4), draw.pick(1, 2, 3), draw.pick(1, 2, 3)
    padding = window // 2
    function = draw.pick(
        lambda x: F.max_pool2d(x, window, stride, padding),
        lambda x: F.avg_pool2d(x, window, stride, padding, count_include_pad=False),
        lambda x: F.avg_pool2d(x, window, stride, padding),
        lambda x: F.adaptive_avg_pool2d(x, 1),
    )
    return Case(function), (draw.tensor(*shape[:2], *(size and max(size, window) for size in shape[2:])),)


def softmax(draw: Draw) -> Drawn:
    shape, function = draw.sizes(3), draw.pick(torch.softmax, torch.log_softmax)
    axis = draw.pick(0, 1, 2, 2)
    return Case(lambda x: function(x, axis)), (draw.tensor(*shape),)


def layer_norm(draw: Draw) -> Drawn:
    shape, axes = draw.sizes(3), draw.pick(1, 1, 2)
    return nn.LayerNorm(shape[-axes:], elementwise_affine=draw.pick(True, False)), (draw.tensor(*shape),)


def other_norms(draw: Draw) -> Drawn:
    batch, channels, height, width = draw.sizes(4)
    module = draw.pick(
        nn.BatchNorm2d(channels),
        nn.GroupNorm(draw.pick(1, max(channels, 1)), channels),
        nn.RMSNorm((height, width), 1e-6),
    )
    return module, (draw.tensor(batch, channels, height, width),)


def reduction(draw: Draw) -> Drawn:
    shape = draw.sizes(3)
    axes = draw.pick((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))
    function = draw.pick(torch.sum, torch.mean, torch.amax, torch.amin)
    return Case(lambda x: function(x, axes, keepdim=draw.empty is None)), (draw.tensor(*shape),)


def spread(draw: Draw) -> Drawn:
    """A reduction of rows, and the rows with it."""
    shape, function = draw.sizes(3), draw.pick(torch.sum, torch.mean, torch.amax, torch.amin)
    return Case(lambda x: x - 0.5 * function(x, -1, keepdim=True).square()), (draw.tensor(*shape),)


def positions(draw: Draw) -> Drawn:
    shape, axis = draw.sizes(3), draw.pick(0, 1, 2)
    function = draw.pick(torch.argmax, torch.argmin)
    return Case(lambda x: function(x, axis)), (draw.tensor(*shape),)


def running_sums(draw: Draw) -> Drawn:
    shape, axis = draw.sizes(3), draw.pick(0, 1, 2)
    return Case(lambda x: x.cumsum(axis)), (draw.tensor(*shape),)


def functions(draw: Draw) -> Drawn:
    chosen = draw.pick(torch.exp, torch.erf, torch.tanh, torch.sigmoid)
    return Case(chosen), (4 * draw.tensor(*draw.sizes(3)),)


def gelu(draw: Draw) -> Drawn:
    form = draw.pick("none", "tanh")
    return Case(lambda x: F.gelu(x, approximate=form)), (4 * draw.tensor(*draw.sizes(3)),)


def broadcasting(draw: Draw) -> Drawn:
    shape = draw.sizes(3)
    others = [[size if draw.pick(True, False) else 1 for size in shape] for _ in "bc"]
    return Case(lambda a, b, c: (a + b) * c - b), (draw.tensor(*shape), *(draw.tensor(*other) for other in others))


def transposing(draw: Draw) -> Drawn:
    shape, order = draw.sizes(4), draw.random.sample(range(4), 4)
    return Case(lambda x: x.permute(order).contiguous() * 2), (draw.tensor(*shape),)


def joining(draw: Draw) -> Drawn:
    rows, columns, more = draw.sizes(3)
    return Case(lambda a, b: torch.cat([a, b.flip(1), a], 1)), (draw.tensor(rows, columns), draw.tensor(rows, more))


@dataclass(frozen=True)
class Family:
    """How one operator is drawn; `error` is of float32 results, as a share of the largest value or of 1."""

    draw: Callable[[Draw], Drawn]
    error: float = 2e-6
    placed: tuple[float, ...] = INFINITE  # what is put among the inputs
    first: int = 0  # of the inputs into which


FAMILIES = {
    "linear": Family(linear, placed=NO_NUMBER),  # silu(-inf)
    "matmul": Family(matmul),
    # Where scores are NaN or infinite attention may give 0 or NaN: docs/numerics.md.
    "attention": Family(attention, first=2),
    "causal": Family(causal, placed=()),
    "convolution": Family(convolution),
    # An infinity becomes NaN around it where filtering is minimal: docs/numerics.md.
    "minimal_filtering": Family(minimal_filtering, error=1e-5, placed=()),
    "depthwise": Family(depthwise),
    "convolution_1d": Family(convolution_1d),
    "pooling": Family(pooling),
    "softmax": Family(softmax),
    "layer_norm": Family(layer_norm),
    "other_norms": Family(other_norms),
    "reduction": Family(reduction),
    "spread": Family(spread),
    "positions": Family(positions),
    "running_sums": Family(running_sums),
    "functions": Family(functions, error=1e-6),
    "gelu": Family(gelu, error=3e-6, placed=NO_NUMBER),
    "broadcasting": Family(broadcasting, error=3e-7),
    "transposing": Family(transposing, error=0.0),
    "joining": Family(joining, error=0.0),
}


@dataclass(frozen=True)
class Drawing:
    """One drawn case and its program."""

    family: Family
    module: nn.Module
    inputs: tuple[Tensor, ...]
    program: Program

    def feed(self, inputs: Sequence[Tensor]) -> dict[str, np.ndarray]:
        return {spec.name: value.numpy() for spec, value in zip(self.program.inputs, inputs, strict=True)}

    def exact(self, inputs: Sequence[Tensor]) -> Tensor:
        """In float64."""
        with torch.no_grad():
            result: Tensor = copy.deepcopy(self.module).double()(*(x.double() for x in inputs))
        return result


def drawing(name: str, seed: str, empty: int | None = None) -> Drawing:
    family = FAMILIES[name]
    torch.manual_seed(0)
    module, inputs = family.draw(Draw(f"{name} {seed}", empty))
    return Drawing(family, module.eval(), inputs, capture(module.eval(), inputs))


def sessions(monkeypatch: pytest.MonkeyPatch, drawings: Mapping[str, Drawing], target: str) -> list[InferenceSession]:
    """All cases as entries of an artifact: compiled for one thread and for two, each run by one and by two.

    They are what `compile` makes for its own check: of another machine's target the same kernels as code for this one.
    """
    compiling = importlib.import_module("graphopt.compile")
    found: list[InferenceSession] = []
    open_one = compiling.Artifact.session

    def open_both(artifact: Any) -> None:
        found.extend(open_one(artifact, threads) for threads in (1, 2))

    with monkeypatch.context() as patched:
        patched.setattr(compiling.Artifact, "session", open_both)
        patched.setattr(compiling, "check_session", lambda *_: {})
        for threads in (1, 2):
            compiling.compile({name: each.program for name, each in drawings.items()}, target, threads=threads)
    return found


def problem(result: Tensor, exact: Tensor, error: float) -> str:
    """What is wrong with `result`, or nothing: NaN and infinities in their places, the rest within `error`."""
    if result.shape != exact.shape:
        return f"has shape {list(result.shape)} instead of {list(exact.shape)}"
    if not result.is_floating_point():
        return "" if torch.equal(result, exact) else "differs"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        if wrong := int((kind(result) != kind(exact)).sum()):
            return f"differs in {kind.__name__} at {wrong} of {result.numel()} places"
    finite = exact.isfinite()
    if not finite.any():
        return ""
    largest = max(1.0, float(exact[finite].abs().max()))
    found = float((result[finite].double() - exact[finite]).abs().max())
    return "" if found <= error * largest else f"is off by {found:.2g}, the largest value is {largest:.2g}"


def run(every: Sequence[InferenceSession], name: str, each: Drawing, inputs: Sequence[Tensor]) -> str:
    """What is wrong with the results on these inputs, or nothing."""
    results = [session.run(None, each.feed(inputs), entry=name)[0] for session in every]
    if len({result.tobytes() for result in results}) > 1:
        return "depends on the number of threads"
    return problem(torch.from_numpy(results[0]), each.exact(inputs), each.family.error)


def poisoned(each: Drawing, seed: str) -> tuple[Tensor, ...]:
    """The inputs with a few numbers replaced by NaN and infinities."""
    chance = random.Random(seed)
    inputs = [value.clone() for value in each.inputs]
    for value in inputs[each.family.first :]:
        for special in each.family.placed:
            value.view(-1)[chance.randrange(value.numel())] = special
    return tuple(inputs)


def check(monkeypatch: pytest.MonkeyPatch, drawings: Mapping[str, Drawing], target: str) -> None:
    every = sessions(monkeypatch, drawings, target)
    problems = []
    for name, each in drawings.items():
        for kind, inputs in (("drawn", each.inputs), ("with NaN and infinities", poisoned(each, name))):
            if found := run(every, name, each, inputs):
                problems.append(f"{name} {[tuple(x.shape) for x in each.inputs]} {each.module}, {kind}: {found}")
    assert not problems, "\n".join(problems)


def test_one_draw_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, {f"one_{name}": drawing(name, "fast") for name in FAMILIES}, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "cpu:x86-64-v3", "cpu:cortex-a78ae"])
@pytest.mark.parametrize("name", FAMILIES)
def test_many_draws(monkeypatch: pytest.MonkeyPatch, name: str, target: str) -> None:
    drawings = {f"{name}_{number}": drawing(name, f"{target} {number}") for number in range(SLOW_DRAWS)}
    check(monkeypatch, drawings, target)


@pytest.mark.parametrize("name", ["linear", "matmul", "convolution", "softmax", "reduction", "functions"])
def test_a_size_of_zero(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check_empty(monkeypatch, name, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("axis", range(1, 5))
@pytest.mark.parametrize("name", FAMILIES)
def test_a_size_of_zero_anywhere(monkeypatch: pytest.MonkeyPatch, name: str, axis: int) -> None:
    check_empty(monkeypatch, name, axis)


def check_empty(monkeypatch: pytest.MonkeyPatch, name: str, axis: int) -> None:
    """The result is PyTorch's, or one clear sentence refuses the model; what PyTorch refuses has no right result."""
    try:
        each = drawing(name, "empty", axis)
        each.exact(each.inputs)
    except (RuntimeError, IndexError, ValueError, ZeroDivisionError, GraphoptError):
        pytest.skip("PyTorch has no result either")
    try:
        every = sessions(monkeypatch, {"main": each}, "cpu")
    except GraphoptError as e:
        assert re.search(r"0|zero|empty", str(e)) and "\n" not in str(e)
        return
    assert not run(every, "main", each, each.inputs)
