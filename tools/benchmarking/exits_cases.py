"""The networks of `--suite exits`: each with data to learn from, and inputs to be timed on that were held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.program import Program

SEED = 0
MOST_TIMED = 64  # inputs one by one

Feed = Mapping[str, Tensor]


@dataclass(frozen=True)
class ExitSubject:
    """One trained network.

    `program` takes any number of samples and is what exits learn on; `single`, the same network, takes one. `one` are
    held-out samples one by one, `many` the same in batches.
    """

    program: Program
    single: Program
    data: Sequence[Any]
    metric: str
    one: Sequence[Feed]
    many: Sequence[Feed]


@dataclass(frozen=True)
class ExitCase:
    """A network for each seed; `options` are those of early-exit, `targets` what quality is asked for, in turn."""

    title: str
    build: Callable[[int], ExitSubject]
    seeds: tuple[int, ...]
    options: str
    targets: tuple[float | None, ...]
    quality: str


def digits_vit(seed: int) -> ExitSubject:
    """Held-out digits one by one, and in batches of 32."""
    import graphopt
    from graphopt.tools.benchmarking import digits_vit as digits

    case = digits.case(seed, parts=digits.MANY_TO_CHOOSE_BY)
    example = torch.zeros(1, digits.SIDE, digits.SIDE)
    single = graphopt.capture(case.trained.module, (example,), name="digits-vit")
    images = digits.digits()[0][-digits.PARTS[-1][0] :]
    one = [{"images": image[None]} for image in images[:MOST_TIMED]]
    many = [{"images": some} for some in images.split(digits.BATCH) if len(some) == digits.BATCH]
    return ExitSubject(case.program, single, case.data, "accuracy", one, many)


def minilm(seed: int) -> ExitSubject:
    """Sentences of docstrings; those to be timed are of files that nothing was learned from."""
    import graphopt
    from graphopt.tools import demo_model
    from graphopt.tools.benchmarking.folding_cases import minilm as sentences

    subject = sentences()
    module, example = demo_model.minilm()
    shapes = {name: {1: axes[1]} for name, axes in demo_model.dynamic_shapes().items()}
    given = {name: value[:1] for name, value in example.items()} if isinstance(example, dict) else None
    single = graphopt.capture(
        module, given or tuple(value[:1] for value in example), dynamic_shapes=shapes, name="minilm"
    )
    many = list(subject.data[len(subject.data) * 4 // 5 :])
    one = [_unpadded(feed, row) for feed in many for row in range(0, len(feed["input_ids"]), 8)]
    return ExitSubject(subject.program, single, subject.data, "cosine", one[:MOST_TIMED], many)


def _unpadded(feed: Feed, row: int) -> Feed:
    """One sentence of a batch without its padding."""
    length = int(feed["attention_mask"][row].sum())
    return {name: value[row : row + 1, :length].contiguous() for name, value in feed.items()}


CASES = {
    "digits-vit": ExitCase("digits ViT", digits_vit, (3, 4, 5), "", (None,), "accuracy"),
    "minilm": ExitCase("MiniLM", minilm, (SEED,), "policy=cosine", (0.95, 0.97, 0.98, 0.99), "mean cosine"),
}
