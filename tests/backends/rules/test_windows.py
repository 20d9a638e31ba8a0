"""Depthwise convolution and pooling over channels-last maps: every tail, every border, threads, levels, NaN."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt.backends.rules.windows import tile_pixels, vector_width
from graphopt.backends.target import resolve_target
from graphopt.capture import capture

Check = Callable[..., Any]
Case = Callable[[Tensor], Tensor]
Pair = int | tuple[int, int]
Kind = tuple[int, Pair, Pair, Pair, Pair]  # channels, taps, stride, padding, dilation
DEPTHWISE: list[Kind] = [
    (16, 3, 1, 1, 1),
    (17, 3, 2, 1, 1),
    (3, 5, 1, 2, 1),
    (2, 3, 1, 1, 1),
    (33, 7, 1, 3, 1),
    (20, (3, 2), (1, 2), (2, 1), (2, 1)),
    (7, 3, 4, 0, 1),
    (5, 3, 1, 4, 1),
]
POOLS: dict[str, Case] = {
    "max": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_ceil": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "max_dilated": lambda x: F.max_pool2d(x, (3, 2), (1, 2), (1, 0), (2, 1)),
    "max_sparse": lambda x: F.max_pool2d(x, 2, 4),
    "average": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "average_inside": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "average_ceil": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (3, 4)),
    "adaptive_one": lambda x: F.adaptive_avg_pool2d(x, 1),
}


class Depthwise(nn.Module):
    """Every depthwise convolution on its part of the channels of a channels-last map."""

    def __init__(self, kinds: list[Kind]) -> None:
        super().__init__()
        self.kinds = kinds
        self.layers = nn.ModuleList(
            nn.Conv2d(c, c, taps, stride, padding, dilation, groups=c) for c, taps, stride, padding, dilation in kinds
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        images = x.permute(0, 3, 1, 2)
        return [torch.relu(layer(images[:, : kind[0]])) for kind, layer in zip(self.kinds, self.layers, strict=True)]


def channels_last(case: Case) -> Case:
    return lambda x: case(x.permute(0, 3, 1, 2))


@pytest.mark.parametrize(("height", "width"), [(9, 13), (1, 40)])
def test_depthwise(agree: Check, height: int, width: int) -> None:
    kinds = DEPTHWISE if height > 6 else [kind for kind in DEPTHWISE if kind[3] == 1]
    run = agree(Depthwise(kinds).eval(), [torch.randn(2, height, width, 40)])
    assert {"depthwise"} <= {kernel.rule for kernel in run.artifact.manifest.variants[0].kernels.values()}


def test_depthwise_of_symbolic_images(agree: Check) -> None:
    more = [(torch.randn(1, 14, 18, 40),), (torch.randn(3, 8, 5, 40),)]
    agree(Depthwise(DEPTHWISE[:5]).eval(), [torch.randn(2, 9, 13, 40)], [{0: "b", 1: "h", 2: "w"}], more)


def test_depthwise_of_sequences(agree: Check) -> None:
    layer = nn.Conv1d(19, 19, 3, padding=2, dilation=2, groups=19)
    agree({"one": lambda x: layer(x.transpose(1, 2))}, [torch.randn(2, 37, 19)])


@pytest.mark.parametrize("channels", [1, 19])
def test_pools(agree: Check, channels: int) -> None:
    image = torch.randn(2, 9, 14, channels)
    image[0, 4, 5], image[1, 8, 13], image[0, 0, 0], image[1, 2, 2] = torch.nan, torch.nan, torch.inf, -torch.inf
    agree(
        {name: channels_last(case) for name, case in POOLS.items()},
        [image],
        [{0: "b"}],
        [(torch.randn(1, 9, 14, channels),)],
    )


def test_pools_of_other_ranks_and_types(agree: Check) -> None:
    agree(
        {
            "three": lambda x: F.max_pool3d(x.reshape(1, 2, 4, 6, 6), 2, 1, 1),
            "mean": lambda x: F.avg_pool3d(x.reshape(1, 2, 4, 6, 6), 3, 2, 1, count_include_pad=False),
            "unbatched": lambda x: F.max_pool2d(x.reshape(8, 6, 6), 2),
            "double": lambda x: F.avg_pool2d(x.double(), 3, 1, 1),
            "half": lambda x: F.max_pool2d(x.half(), 3, 1, 1),
        },
        [torch.randn(1, 8, 6, 6)],
    )


@pytest.mark.parametrize("target", ["cpu", "cpu:x86-64-v3"])
def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    compiling = importlib.import_module("graphopt.compile")
    monkeypatch.setattr(compiling, "check_session", lambda *_: {})
    module, image = Depthwise(DEPTHWISE[:5]).eval(), torch.randn(1, 7, 9, 40)
    program = capture(module, (image,))
    feed = {program.inputs[0].name: image.numpy()}
    one, two = (compiling.compile(program, target, threads=n).session().run(None, feed) for n in (1, 2))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    for result, want in zip(one, program(image), strict=True):
        torch.testing.assert_close(torch.from_numpy(result), want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("outputs", "pixels"), [(112, 16), (56, 14), (28, 14), (14, 14), (7, 7), (1, 1), (17, 9)])
def test_tiles_waste_little(outputs: int, pixels: int) -> None:
    assert tile_pixels(outputs, resolve_target("cpu:x86-64-v4")) == pixels


@pytest.mark.parametrize(("channels", "lanes"), [(1, 1), (3, 2), (15, 8), (16, 16), (100, 16)])
def test_vectors_are_no_wider_than_the_channels(channels: int, lanes: int) -> None:
    assert vector_width(channels, resolve_target("cpu:x86-64-v4")) == lanes
