"""Small networks of blocks with a head, and the same with exits in each form."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from graphopt.contract import PassContext
from graphopt.edit import Edit
from graphopt.passes.early_exit.decisions import Policy
from graphopt.passes.early_exit.forms import Form, with_exits
from graphopt.passes.early_exit.heads import Product, final_product
from graphopt.passes.early_exit.places import Places, find_places
from graphopt.program import Program
from graphopt.tools.benchmarking.small_transformers import seeded

WIDTH, CLASSES, TOKENS = 16, 5, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return found


class Network(nn.Module):
    """Logits [samples, CLASSES] of x [samples, TOKENS, 8]; of every token, or as an embedding of length 1."""

    def __init__(self, blocks: int = 3, gives: str = "classes") -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(8, WIDTH), nn.ModuleList(Block() for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.gives = gives

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        if self.gives == "embeddings":
            return nn.functional.normalize(x.mean(1), dim=-1)
        found: Tensor = self.head(self.norm(x if self.gives == "steps" else x.mean(1)))
        return found


@cache
def network(rows: int | None, **options: Any) -> Program:
    """With a dynamic number of samples, or a fixed one."""
    module = seeded(0, lambda: Network(**options)).eval()
    with torch.no_grad():
        module.head.weight.mul_(3)
    x = torch.randn(rows or 3, TOKENS, 8, generator=torch.Generator().manual_seed(1))
    return graphopt.capture(module, (x,), dynamic_shapes=None if rows else {"x": {0: "batch"}}, name="network")


def heads(program: Program) -> dict[str, Product]:
    """By node, a head behind every block but the last: the network's own, a little changed."""
    edit = Edit(program, PassContext(), "test")
    (editor,) = edit.graphs()
    places = find_places(program, "auto", needs_product=True)
    assert isinstance(places, Places)
    generator = torch.Generator().manual_seed(2)
    found = {}
    for place in places.exits:
        found[place.name] = product = final_product(editor, places.head)
        with torch.no_grad():
            product.weight.add_(0.3 * torch.randn(product.weight.shape, generator=generator))
    return found


def with_form(program: Program, form: Form, thresholds: Sequence[float], policy: str = "pmax") -> Program:
    return with_exits(program, PassContext(), heads(program), Policy(policy, tuple(thresholds)), form).program


def inputs(rows: int, seed: int = 3) -> Tensor:
    return torch.randn(rows, TOKENS, 8, generator=torch.Generator().manual_seed(seed))


def labelled(count: int = 30, rows: int = 16) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Classes that the network itself gives, some of them changed."""
    program = network(None)
    feeds = []
    for seed in range(count):
        x = inputs(rows, 100 + seed)
        label = program(x)[0].argmax(-1)
        label[0] = (label[0] + 1) % CLASSES
        feeds.append(({"x": x}, label))
    return feeds
