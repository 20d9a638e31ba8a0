"""A convolutional network on scikit-learn's handwritten digits, made larger, and trained from scratch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import graphopt
from graphopt.tools.benchmarking.digits_vit import CLASSES, PARTS, SIDE, digits, feeds
from graphopt.tools.benchmarking.small_transformers import Batch, Case, Trained, seeded, train

WIDTHS = (128, 256, 256)
LARGE = 32  # pixels of a side
BATCH = 32
STEPS = 120
RATE = 6e-3


class DigitsCNN(nn.Module):
    """Logits [batch, CLASSES] of `images` [batch, 1, side, side].

    3 x 3 convolutions, each normalized, with the size halved after all but the last.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        sizes = zip((1, *widths), widths, strict=False)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False) for inputs, outputs in sizes
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for outputs in widths)
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(convolution(x)).relu()
            if number + 1 < len(self.convolutions):
                x = nn.functional.max_pool2d(x, 2)
        found: Tensor = self.head(x.mean((2, 3)))
        return found


def images_of(side: int) -> Batch:
    """All digits [1797, 1, side, side], interpolated, and their classes."""
    images, classes = digits()
    if side == SIDE:
        return images[:, None], classes
    return nn.functional.interpolate(images[:, None], (side, side), mode="bilinear", align_corners=False), classes


def train_digits_cnn(seed: int, steps: int, widths: Sequence[int], side: int) -> Trained:
    """On the first of PARTS; its loss is that of the last one."""
    images, classes = images_of(side)
    known, held_out = PARTS[0][0], PARTS[-1][0]

    def batch(generator: torch.Generator) -> Batch:
        chosen = torch.randint(known, (BATCH,), generator=generator)
        return images[chosen], classes[chosen]

    module = seeded(seed, lambda: DigitsCNN(widths))
    return train(module, batch, (images[-held_out:], classes[-held_out:]), steps=steps, seed=seed, rate=RATE)


def case(seed: int, steps: int = STEPS, widths: Sequence[int] = WIDTHS, side: int = LARGE) -> Case:
    """Captured with a batch of any size; a feed has 31 or 32 images, or 54 or 55 of those held out.

    A pass that learns does so on what was trained on, and chooses by the second of PARTS.
    """
    trained = train_digits_cnn(seed, steps, widths, side)
    images, classes = images_of(side)
    example = torch.zeros(2, 1, side, side)
    program = graphopt.capture(trained.module, (example,), dynamic_shapes={"images": {0: "batch"}}, name="digits-cnn")
    return Case(program, feeds(images, classes), "accuracy", trained)
