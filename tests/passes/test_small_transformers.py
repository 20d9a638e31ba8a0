"""The networks on which passes are shown to hold: what they compute, and that they learn."""

from __future__ import annotations

import torch

from graphopt.tools.benchmarking.char_lm import CHARACTERS, CONTEXT, CharLM, negative_perplexity, windows
from graphopt.tools.benchmarking.digits_vit import CLASSES, SIDE, DigitsViT
from graphopt.tools.benchmarking.small_transformers import train


def test_a_character_depends_on_none_that_follows() -> None:
    module = CharLM(blocks=2).eval()
    ids = torch.randint(CHARACTERS, (2, CONTEXT))
    changed = ids.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % CHARACTERS
    with torch.no_grad():
        before, after = module(ids), module(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_labels_are_the_characters_that_follow() -> None:
    ids = torch.arange(200) % CHARACTERS
    inputs, labels = windows(ids, torch.tensor([3, 90]))
    assert torch.equal(inputs[1], ids[90 : 90 + CONTEXT]) and torch.equal(labels[1], ids[91 : 91 + CONTEXT])
    evenly = torch.zeros(2, CONTEXT, CHARACTERS)
    assert round(-negative_perplexity([evenly], labels), 3) == CHARACTERS


def test_two_steps_change_a_network_and_are_the_same_again() -> None:
    images, classes = torch.rand(8, SIDE, SIDE), torch.arange(8) % CLASSES
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        module = DigitsViT(blocks=1)
        trained = train(module, lambda _: (images, classes), (images, classes), steps=2, seed=0, rate=1e-3)
        losses.append(trained.held_out)
    assert losses[0] == losses[1] and losses[0][0] > losses[0][1]
