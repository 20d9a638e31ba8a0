"""Direct and minimal convolutions over awkward shapes, and what their kernels take along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.rules import winograd
from graphopt.backends.rules.convolution import configure
from graphopt.backends.rules.windows import Window
from graphopt.backends.target import resolve_target

Check = Callable[..., Any]


class Layers(nn.Module):
    """Convolutions of one input, each with an activation behind it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [torch.relu(layer(x)) for layer in self.layers]


def rules(artifact: graphopt.Artifact) -> set[str]:
    return {kernel.rule for kernel in artifact.manifest.variants[0].kernels.values()}


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (13, 3)])
@pytest.mark.parametrize("channels", [3, 5, 17])
def test_awkward_shapes(agree: Check, channels: int, size: tuple[int, int]) -> None:
    layers = Layers(
        nn.Conv2d(channels, 7, 3, padding=1),
        nn.Conv2d(channels, 49, 3, padding=2, stride=2, bias=False),
        nn.Conv2d(channels, 16, (1, 3), padding=(0, 2), dilation=(1, 2)),
        nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels),
        nn.Conv2d(channels, 65, 1, stride=2),
    )
    agree(layers.eval(), [torch.randn(3, channels, *size)])


def test_deep_filters_are_taken_row_by_row(agree: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 x 7 pixels times 512 channels: partial sums between rows of taps, the last tile cut short."""
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    assert configure((1, 7, 7, 70), (70, 512, 3, 3), 1, window, resolve_target("cpu:x86-64-v4")).chunked
    layer = nn.Conv2d(512, 70, 3, padding=1).eval()
    monkeypatch.setattr(winograd, "suits", lambda *_: False)
    agree(layer, [torch.randn(1, 512, 7, 7)], atol=2e-5)


@pytest.mark.parametrize("size", [(8, 8), (13, 11), (16, 30)])
def test_minimal_filtering(agree: Check, size: tuple[int, int]) -> None:
    layers = Layers(nn.Conv2d(32, 48, 3, padding=1), nn.Conv2d(32, 35, 3, padding=(0, 1), bias=False))
    x = torch.randn(2, 32, *size)
    compiled = agree(layers.eval(), [x], rtol=1e-4, atol=2e-5)
    assert "winograd" in rules(compiled.artifact)


def test_minimal_filtering_is_nearly_as_exact(agree: Check) -> None:
    """Sums of 32 x 9 products of numbers near 1: the error stays below a hundred thousandth of the largest result."""
    layer, x = nn.Conv2d(32, 32, 3, padding=1).eval(), torch.randn(1, 32, 20, 20)
    compiled = agree(layer, [x], rtol=1e-4, atol=2e-5)
    want = layer.double()(x.double())
    assert (compiled(x)[0] - want).abs().max() < 1e-5 * want.abs().max()


def test_what_minimal_filtering_is_not_for() -> None:
    target, window = resolve_target("cpu:x86-64-v4"), Window((3, 3), (1, 1), (1, 1), (1, 1))
    wide, deep = (1, 28, 28, 64), (64, 64, 3, 3)
    assert winograd.suits(wide, deep, 1, window, target)
    assert not winograd.suits((1, 5, 5, 64), deep, 1, window, target)  # most of the 4 x 4 outputs would not exist
    assert not winograd.suits(wide, (64, 16, 3, 3), 1, window, target)
    assert not winograd.suits(wide, deep, 2, window, target)
    assert not winograd.suits(wide, deep, 1, Window((3, 3), (2, 2), (1, 1), (1, 1)), target)
    assert not winograd.suits((1, 56, 56, 512), (512, 512, 3, 3), 1, window, target)  # 38 MB of filters


def test_results_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 33, 3, stride=2, padding=1), nn.Conv2d(33, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
    )
    x = torch.randn(2, 3, 27, 25)
    program = graphopt.capture(layers.eval(), (x,))
    results = []
    for threads in (1, 2, 3):
        session = graphopt.compile(program, threads=threads).session(threads=min(threads, 2))
        results.append(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_zeros_around_the_image_are_not_copied() -> None:
    """A pad node for one convolution becomes its padding, and the feature map between needs no kernel of its own."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=32, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(nn.functional.pad(x, (0, 1, 0, 1))))
            return torch.relu(self.second(nn.functional.pad(x, (1, 2, 3, 0)))).mean((2, 3))

    x = torch.randn(1, 3, 12, 14)
    module = Padded().eval()
    artifact = graphopt.compile(graphopt.capture(module, (x,)))
    assert len(artifact.manifest.variants[0].kernels) == 3
    session = artifact.session()
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(result, module(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_residual_block_is_one_kernel_a_convolution() -> None:
    """Activations, the sum with the input and permutes around a linear layer all ride along."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 7, padding=3, groups=16)
            self.wide, self.scale = nn.Linear(16, 16), nn.Parameter(torch.rand(16))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            y = torch.relu(self.second(x) + x)
            return x + (self.scale * self.wide(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    x = torch.randn(1, 16, 9, 5)
    artifact = graphopt.compile(graphopt.capture(Block().eval(), (x,)))
    names = list(artifact.manifest.variants[0].kernels)
    assert len(names) == 5  # three products, and the image is turned around on its way in and out
    assert "generic" not in rules(artifact)
