"""A decoder over characters, trained from scratch on the English of Python's docstrings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

import graphopt
from graphopt.tools.benchmarking.english_text import sentences
from graphopt.tools.benchmarking.small_transformers import Batch, Block, Case, Feed, Trained, seeded, train

BLOCKS = 8
WIDTH, HEADS, HIDDEN = 96, 4, 256
CONTEXT = 64
BATCH = 16
STEPS = 400
RATE = 4e-3
FIRST_STRENGTH = 0.25  # of what a block adds, beside what nn.Linear begins with
FIRST, LAST = " ", "~"  # characters are numbered from the first printable one of ASCII
NEWLINE = ord(LAST) - ord(FIRST) + 1
CHARACTERS = NEWLINE + 1
FEEDS = 160
HELD_OUT = 32  # feeds


class CharLM(nn.Module):
    """Logits [batch, CONTEXT, CHARACTERS] of the next character after each of `ids` [batch, CONTEXT], int64."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, HIDDEN, causal=True) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS)
        nn.init.normal_(self.characters.weight, std=0.02)
        with torch.no_grad():
            for block in self.blocks:
                assert isinstance(block, Block)
                block.output.weight.mul_(FIRST_STRENGTH)
                block.down.weight.mul_(FIRST_STRENGTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.characters(ids)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x))
        return found


@cache
def text() -> tuple[Tensor, Tensor]:
    """The numbers of the characters, int64: four fifths to train on, and the last one, which is held out."""
    joined = "\n".join(sentences())
    ids = torch.tensor([NEWLINE if letter == "\n" else ord(letter) - ord(FIRST) for letter in joined])
    return ids[: len(ids) * 4 // 5], ids[len(ids) * 4 // 5 :]


def windows(ids: Tensor, starts: Tensor) -> Batch:
    """CONTEXT characters from each start, and those that follow each of them."""
    found = ids[starts[:, None] + torch.arange(CONTEXT + 1)]
    return found[:, :-1].contiguous(), found[:, 1:].contiguous()


def train_char_lm(seed: int, steps: int = STEPS) -> Trained:
    """On windows of the training text; its loss is of windows spread over the held-out text."""
    known, unknown = text()

    def batch(generator: torch.Generator) -> Batch:
        return windows(known, torch.randint(len(known) - CONTEXT, (BATCH,), generator=generator))

    held_out = windows(unknown, spread(unknown, 4 * BATCH))
    module = seeded(seed, CharLM)
    return train(module, batch, held_out, steps=steps, seed=seed, rate=RATE)


def spread(ids: Tensor, count: int) -> Tensor:
    """So many starts of windows at equal distances."""
    return torch.arange(count) * ((len(ids) - CONTEXT) // count)


def negative_perplexity(outputs: Sequence[Tensor], labels: Tensor) -> float:
    """Minus e to the mean cross entropy of the next character; -1 would be to know it."""
    return -math.exp(float(nn.functional.cross_entropy(outputs[0].flatten(0, -2), labels.flatten())))


def case(seed: int, steps: int = STEPS) -> Case:
    """Captured with a batch of any size; feeds of BATCH windows, the last HELD_OUT of them from the held-out text."""
    return judged(train_char_lm(seed, steps), seed)


def judged(trained: Trained, seed: int) -> Case:
    """The case of a module that is trained already."""
    example = torch.zeros(2, CONTEXT, dtype=torch.int64)
    program = graphopt.capture(trained.module, (example,), dynamic_shapes={"ids": {0: "batch"}}, name="char-lm")
    known, unknown = text()
    shuffled = torch.randperm((FEEDS - HELD_OUT) * BATCH, generator=torch.Generator().manual_seed(seed))
    data: list[Feed] = []
    for ids, starts in (
        (known, spread(known, len(shuffled))[shuffled]),
        (unknown, spread(unknown, HELD_OUT * BATCH)),
    ):
        for part in starts.split(BATCH):
            inputs, labels = windows(ids, part)
            data.append(({"ids": inputs}, labels))
    return Case(program, data, negative_perplexity, trained)
