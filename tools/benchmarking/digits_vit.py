"""A vision transformer on scikit-learn's handwritten digits, trained from scratch in seconds."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import MissingExtraError
from graphopt.tools.benchmarking.small_transformers import Batch, Block, Case, Feed, Trained, seeded, train

BLOCKS = 6
WIDTH, HEADS, HIDDEN = 48, 4, 96
SIDE, PATCH, CLASSES = 8, 2, 10
BATCH = 32
STEPS = 800
RATE = 2e-3
Parts = tuple[tuple[int, int], ...]  # images and feeds: to train on, to choose by, held out
PARTS: Parts = ((1000, 32), (250, 8), (547, 10))
MANY_TO_CHOOSE_BY: Parts = ((800, 32), (450, 8), (547, 10))  # thresholds for half a point need some hundred images


class DigitsViT(nn.Module):
    """Logits [batch, CLASSES] of `images` [batch, SIDE, SIDE] with brightness from 0 to 1."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, WIDTH)
        self.summary = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, HIDDEN, causal=False) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        count = SIDE // PATCH
        rows = images.unflatten(2, (count, PATCH)).unflatten(1, (count, PATCH)).transpose(2, 3)
        x = self.patches(rows.flatten(3).flatten(1, 2)) + self.positions
        x = torch.cat((self.summary.expand(x.shape[0], -1, -1), x), 1)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x[:, 0]))
        return found


@cache
def digits() -> Batch:
    """1797 images, float32 from 0 to 1, and their classes, int64, mixed in one fixed order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("digits need scikit-learn; run pip install scikit-learn") from error
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(found.images / 16).float()[order], torch.from_numpy(found.target).long()[order]


def train_digits_vit(seed: int, steps: int = STEPS, parts: Parts = PARTS) -> Trained:
    """On the first of the parts; its loss is that of the last one."""
    images, classes = digits()
    known, held_out = parts[0][0], parts[-1][0]

    def batch(generator: torch.Generator) -> Batch:
        chosen = torch.randint(known, (BATCH,), generator=generator)
        return images[chosen], classes[chosen]

    module = seeded(seed, DigitsViT)
    return train(module, batch, (images[-held_out:], classes[-held_out:]), steps=steps, seed=seed, rate=RATE)


def case(seed: int, steps: int = STEPS, parts: Parts = PARTS) -> Case:
    """Captured with a batch of any size.

    A pass that learns does so on what was trained on, and chooses by the second of the parts.
    """
    trained = train_digits_vit(seed, steps, parts)
    images, classes = digits()
    example = torch.zeros(2, SIDE, SIDE)
    program = graphopt.capture(trained.module, (example,), dynamic_shapes={"images": {0: "batch"}}, name="digits-vit")
    return Case(program, feeds(images, classes, parts), "accuracy", trained)


def feeds(images: Tensor, classes: Tensor, parts: Parts = PARTS) -> list[Feed]:
    """All of the parts, each in its feeds: of PARTS with 31 or 32 images, then 54 or 55 of those held out."""
    data: list[Feed] = []
    start = 0
    for count, number in parts:
        part = slice(start, start + count)
        pairs = zip(images[part].tensor_split(number), classes[part].tensor_split(number), strict=True)
        data += [({"images": some}, labels) for some, labels in pairs]
        start += count
    return data
