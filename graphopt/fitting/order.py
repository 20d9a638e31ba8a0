"""Samples in the order of a seed; the order is a function of seed and epoch, so that a checkpoint need not hold it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from graphopt.data.dataset import Sample
from graphopt.fitting.options import FitOptions


def seed_of(seed: int, purpose: str, number: int) -> int:
    """A seed of its own for every purpose and number."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def step_samples(samples: Sequence[Sample], options: FitOptions, step: int) -> list[Sample]:
    """The samples of step `step` (from 0): `accumulate` of them or, at the end of an epoch, fewer."""
    epoch, place = divmod(step, options.steps_an_epoch(len(samples)))
    generator = torch.Generator().manual_seed(seed_of(options.seed, "order", epoch))
    order = torch.randperm(len(samples), generator=generator).tolist()
    start = place * options.accumulate
    return [samples[index] for index in order[start : start + options.accumulate]]
