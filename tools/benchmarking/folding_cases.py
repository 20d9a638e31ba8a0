"""The models of `--suite folding`: MiniLM with its own weights, and two small networks that are trained first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphopt.data.dataset import View
from graphopt.errors import MissingExtraError
from graphopt.program import Program

SEED = 0
SENTENCES = 3200
BATCH = 32
LONGEST = 64  # tokens
TIMED_TOKENS = 128
RANKED = 512  # sentences whose similarities are put in order


@dataclass(frozen=True)
class Subject:
    """`metric` is what the pass is given, `figures` of (program, held-out samples) are reported; more is better.

    `timed` are the inputs of the run that is timed.
    """

    program: Program
    data: Sequence[Any]
    metric: Any
    figures: Callable[[Program, View], Mapping[str, float]]
    timed: tuple[Tensor, ...]
    about: str


@dataclass(frozen=True)
class FoldingCase:
    """Up to `most` blocks are removed, then healed for `heal_steps` steps with these other options of block-folding."""

    title: str
    build: Callable[[], Subject]
    most: int
    heal_steps: int
    options: str = ""  # of healing


def minilm() -> Subject:
    """Sentences of docstrings in batches of like length; the last fifth is of other files. No labels."""
    import graphopt
    from graphopt.tools import demo_model
    from graphopt.tools.benchmarking.english_text import sentences

    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise MissingExtraError("transformers is not installed; run pip install transformers") from e
    module, example = demo_model.minilm()
    program = graphopt.capture(module, example, dynamic_shapes=demo_model.dynamic_shapes(), name="minilm")
    tokenizer = AutoTokenizer.from_pretrained(str(demo_model.model_folder()))
    chosen = sentences()[:SENTENCES]
    cut = len(chosen) * 4 // 5

    def feeds(part: Sequence[str]) -> list[dict[str, Tensor]]:
        by_length = sorted(part, key=len)
        batches = [by_length[at : at + BATCH] for at in range(0, len(part) - BATCH + 1, BATCH)]
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(SEED)).tolist()
        options = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
        found = [tokenizer(batches[place], **options) for place in order]
        return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in found]

    data = [*feeds(chosen[:cut]), *feeds(chosen[cut:])]
    ids = torch.randint(1000, 30000, (1, TIMED_TOKENS), generator=torch.Generator().manual_seed(SEED))
    figures = partial(agreement, program)
    about = f"{len(chosen)} sentences of Python's docstrings, timed at 1x{TIMED_TOKENS}"
    return Subject(program, data, "cosine", figures, (ids, torch.ones_like(ids)), about)


def char_lm() -> Subject:
    from graphopt.tools.benchmarking.char_lm import case

    return from_case(case(SEED), "negative perplexity")


def digits_vit() -> Subject:
    from graphopt.tools.benchmarking.digits_vit import case

    return from_case(case(SEED), "accuracy")


def from_case(case: Any, name: str) -> Subject:
    """A trained network, with its metric by this name as the only figure; one sample is timed."""
    from graphopt.data.metric import measure, open_metric

    metric = open_metric(case.metric)

    def figures(program: Program, held_out: View) -> dict[str, float]:
        return {name: measure(program, held_out, metric)}

    trained = case.trained
    about = f"trained {trained.steps} steps in {trained.seconds:.0f} s, last fifth {trained.last_gain:+.2%}, timed at 1"
    timed = tuple(example[:1] for example in case.program.examples)
    return Subject(case.program, case.data, case.metric, figures, timed, about)


CASES = {
    "minilm": FoldingCase("MiniLM", minilm, most=3, heal_steps=160),
    "char-lm": FoldingCase("character LM", char_lm, most=4, heal_steps=80, options="heal-rate=0.002"),
    "digits-vit": FoldingCase("digits ViT", digits_vit, most=3, heal_steps=160, options="heal-rate=0.001"),
}


def embeddings(program: Program, held_out: View) -> Tensor:
    """The first output for every held-out sample, float64, one below another."""
    with torch.no_grad():
        return torch.cat([program(*sample.inputs)[0] for sample in held_out]).double()


def agreement(original: Program, program: Program, held_out: View) -> dict[str, float]:
    """How alike the embeddings [sentences, width] of two programs are.

    "cosine" is the mean over sentences; "spearman" the rank correlation of the similarities of all pairs of the first
    RANKED sentences.
    """
    ours, theirs = embeddings(program, held_out), embeddings(original, held_out)
    ranks = [_ranks(_similarities(rows[:RANKED])) for rows in (ours, theirs)]
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean()),
        "spearman": float(torch.corrcoef(torch.stack(ranks))[0, 1]),
    }


def _similarities(rows: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(rows, dim=-1)
    first, second = torch.triu_indices(len(unit), len(unit), offset=1)
    return (unit @ unit.T)[first, second]


def _ranks(values: Tensor) -> Tensor:
    """Equal values are as good as absent among float64 similarities of different sentences."""
    return values.argsort().argsort().double()
