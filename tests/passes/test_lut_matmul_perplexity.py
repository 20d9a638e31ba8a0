"""A small decoder trained on a text, with weights of few bits, on the part of the text that it never saw."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import graphopt
from graphopt import Program
from graphopt.tools.benchmarking.llama import Llama, Shape, capture_decoder, entries_of
from tests.decoders import recomputed

LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
CONTEXT, BATCH, STEPS, WINDOWS = 48, 16, 200, 24
PROMPT = 12  # tokens, which the likeliest ones follow
SHAPE = Shape(layers=2, width=96, heads=4, groups=2, hidden=192, vocabulary=96, length=CONTEXT)
GUESSING = 15.0  # about the perplexity of the frequencies of letters alone


def text() -> tuple[Tensor, Tensor]:
    """Printable characters by number; the second is a fifth from the middle, which is held out."""
    letters = " ".join(LICENSE.read_text(encoding="utf-8").split())
    ids = torch.tensor([ord(letter) - 32 if 32 <= ord(letter) < 127 else 95 for letter in letters])
    first, last = 2 * len(ids) // 5, 3 * len(ids) // 5
    return torch.cat((ids[:first], ids[last:])), ids[first:last]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other at every small product take longer than one where others run beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def program(one_thread: None) -> Program:
    torch.manual_seed(0)
    module, known = Llama(SHAPE, last=False), text()[0]
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS)
    for _ in range(STEPS):
        starts = torch.randint(len(known) - CONTEXT, (BATCH,))
        windows = known[starts[:, None] + torch.arange(CONTEXT + 1)]
        logits = recomputed(module, windows[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return capture_decoder(module.eval())


def windows() -> Tensor:
    held_out = text()[1]
    return held_out[torch.arange(WINDOWS)[:, None] * (len(held_out) // (WINDOWS + 2)) + torch.arange(CONTEXT + 1)]


def perplexity(logits: Tensor) -> float:
    """Of the held-out windows, by logits [WINDOWS, CONTEXT, V]."""
    return math.exp(float(functional.cross_entropy(logits.flatten(0, 1), windows()[:, 1:].flatten())))


def of_program(program: Program) -> float:
    shared = torch.arange(CONTEXT), torch.ones(1, CONTEXT, dtype=torch.bool)
    return perplexity(torch.cat([program(row[None, :-1], *shared)[0] for row in windows()]))


def lowered(program: Program, form: str) -> Program:
    passes = f"lut-matmul{{{form},group-size=32,min-size=1024}}"
    return graphopt.optimize(program, passes, verify="structure").program


def test_perplexity_by_bits(program: Program) -> None:
    floats = of_program(program)
    four, three, two = (of_program(lowered(program, f"bits={bits}")) for bits in (4, 3, 2))
    assert floats < 0.7 * GUESSING
    assert floats * 0.98 < four < 1.05 * floats
    assert four < three < 1.1 * floats
    assert 1.05 * floats < two < 1.6 * floats, "2 bits by rounding alone cost something, and do not cost all"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bits=4", "bits=3", "bits=2", "grid=ternary"])
def test_the_artifact_has_the_perplexity_and_the_tokens_of_the_program(program: Program, form: str) -> None:
    chosen = lowered(program, form)
    session = graphopt.compile(entries_of(chosen)).session()
    rows = []
    for row in windows():
        session.reset()
        feed = {
            "input_ids": row[None, :-1].numpy(),
            "positions": torch.arange(CONTEXT).numpy(),
            "attention_mask": torch.ones(1, CONTEXT, dtype=torch.bool).numpy(),
        }
        rows.append(torch.from_numpy(session.run(["logits"], feed, entry="prefill")[0]))
    assert perplexity(torch.cat(rows)) == pytest.approx(of_program(chosen), rel=2e-3)
    prompt = windows()[0, :PROMPT].tolist()
    ids = prompt + list(session.generate(prompt, CONTEXT - PROMPT))
    assert len(set(ids[PROMPT:])) > 4, "a sequence that repeats itself shows nothing"
    (logits,) = chosen(torch.tensor([ids]), torch.arange(CONTEXT), torch.ones(1, CONTEXT, dtype=torch.bool))
    assert logits[0, PROMPT - 1 : -1].argmax(-1).tolist() == ids[PROMPT:]
