"""What `--suite gating` measures: a trained network, one as large as ResNet-18, and single kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.program import Program

SEEDS = (0, 1, 2)
KEEPS = (0.625, 0.75, 0.875)  # of the blocks, tried in this order
FIT_STEPS = 240
LOSS = 0.01  # of accuracy, at most, on what a share is chosen by
TIMED = 16  # held-out images that are run in turn


@dataclass(frozen=True)
class Sides:
    """Two programs that take the same inputs, run in turn, and what is known of them besides their times."""

    label: str
    ungated: Program
    gated: Program
    inputs: Sequence[tuple[Tensor, ...]]
    figures: Mapping[str, float]


@dataclass(frozen=True)
class GatingCase:
    """`wanted` is the ratio of latencies, gated to ungated, to stay within; `about` says what is measured."""

    title: str
    about: str
    wanted: float
    sides: Sequence[Callable[[], Sides]]


class BasicBlock(nn.Module):
    """x + two 3 x 3 convolutions of x, each with its norm (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.first(x)).relu()
        found: Tensor = (self.norms[1](self.second(y)) + self.shortcut(x)).relu()
        return found


class ResNet(nn.Module):
    """ResNet-18 for images of 32 x 32: logits [batch, 10] of [batch, 3, 32, 32]."""

    def __init__(self, widths: Sequence[int] = (64, 128, 256, 512)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks, inputs = [], widths[0]
        for number, outputs in enumerate(widths):
            blocks += [BasicBlock(inputs, outputs, 1 if number == 0 else 2), BasicBlock(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 10)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.head(self.blocks(self.stem(images)).mean((2, 3)))
        return found


def digits(seed: int, widths: Sequence[int] = (), side: int = 0, steps: int = 0) -> Sides:
    """The network as trained, and gated by the first of KEEPS that costs little on images that it is not judged on."""
    from graphopt.contract import PassContext
    from graphopt.data.dataset import open_data
    from graphopt.data.metric import measure, open_metric
    from graphopt.passes.channel_gating import ChannelGating
    from graphopt.tools.benchmarking import digits_cnn

    case = digits_cnn.case(seed, steps or digits_cnn.STEPS, widths or digits_cnn.WIDTHS, side or digits_cnn.LARGE)
    data, metric = open_data(case.data, case.program), open_metric("accuracy")
    choosing = data.for_fitting().held_out
    least = measure(case.program, choosing, metric) - LOSS
    chosen, share = case.program, 1.0
    for keep in KEEPS:
        pass_ = ChannelGating(keep=keep, form="block", fit_steps=FIT_STEPS)
        gated = pass_.run(case.program, PassContext(data=data, metric=metric, seed=seed)).program
        if measure(gated, choosing, metric) >= least:
            chosen, share = gated, keep
            break
    accuracy = [100 * measure(program, data.held_out, metric) for program in (case.program, chosen)]
    images, _ = digits_cnn.images_of(side or digits_cnn.LARGE)
    inputs = [(image[None],) for image in images[-TIMED:]]
    figures = {"kept": share, "% right": accuracy[0], "% right gated": accuracy[1]}
    return Sides(f"seed {seed}", case.program, chosen, inputs, figures)


def resnet(widths: Sequence[int] = (64, 128, 256, 512)) -> Sides:
    """Half of the channels inside each block, chosen by predictors that nothing has trained."""
    import graphopt
    from graphopt.contract import PassContext
    from graphopt.data.dataset import open_data
    from graphopt.passes.channel_gating import ChannelGating
    from graphopt.tools.benchmarking.small_transformers import seeded

    module = seeded(0, lambda: ResNet(widths)).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(TIMED, 1, 3, 32, 32, generator=generator)
    program = graphopt.capture(module, (images[0],), name="resnet-18")
    data = open_data([{"images": image} for image in images], program)
    gated = ChannelGating(keep=0.5, form="block").run(program, PassContext(data=data)).program
    return Sides("half", program, gated, [(image,) for image in images], {"kept": 0.5})


class Kernel(nn.Module):
    """One convolution with its activation; plain, it does not read the masks, so that both sides take the same."""

    def __init__(self, inputs: int, outputs: int, taps: int, stride: int, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.convolution = nn.Conv2d(inputs, outputs, taps, stride, taps // 2)

    def forward(self, x: Tensor, taking: Tensor, making: Tensor) -> Tensor:
        own = self.convolution
        if not self.gated:
            plain: Tensor = own(x).relu()
            return plain
        options: dict[str, Any] = {"stride": own.stride, "padding": own.padding, "dilation": own.dilation}
        options = {name: list(value) for name, value in options.items()}
        gated = torch.ops.graphopt.gated_convolution(x, own.weight, own.bias, taking, making, **options)
        found: Tensor = gated.relu()
        return found


def kernel(inputs: int, outputs: int, side: int, taps: int, stride: int) -> Sides:
    """All blocks active."""
    import graphopt
    from graphopt.tools.benchmarking.small_transformers import seeded

    x = torch.randn(1, inputs, side, side, generator=torch.Generator().manual_seed(0))
    given = (x, *(torch.ones(1, channels // 16, dtype=torch.bool) for channels in (inputs, outputs)))
    modules = (seeded(0, partial(Kernel, inputs, outputs, taps, stride, gated)).eval() for gated in (False, True))
    plain, gated = (graphopt.capture(module, given) for module in modules)
    return Sides(f"{inputs}->{outputs} {side}x{side} {taps}x{taps}/{stride}", plain, gated, [given], {})


KERNELS = (
    (64, 64, 32, 3, 1),
    (128, 256, 32, 3, 1),
    (256, 256, 32, 3, 1),
    (128, 128, 16, 3, 1),
    (256, 256, 8, 3, 1),
    (512, 512, 4, 3, 1),
    (64, 128, 32, 3, 2),
    (256, 512, 8, 3, 2),
    (256, 256, 14, 1, 1),
)

CASES: dict[str, GatingCase] = {
    "digits-cnn": GatingCase(
        "digits CNN",
        "128-256-256 channels, 32x32 images, trained on for its gates, the share of blocks chosen on images that "
        "accuracy is not measured on",
        0.75,
        [lambda seed=seed: digits(seed) for seed in SEEDS],  # type: ignore[misc]
    ),
    "resnet-18": GatingCase(
        "ResNet-18", "half of the channels inside blocks, random weights and images", 0.7, [resnet]
    ),
    "kernels": GatingCase(
        "kernels",
        "one convolution with all blocks active, beside the plain one",
        1.05,
        [lambda sizes=sizes: kernel(*sizes) for sizes in KERNELS],  # type: ignore[misc]
    ),
}
