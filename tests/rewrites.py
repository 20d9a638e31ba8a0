"""Each of the rewrites applied to a small network: a function of its name gives the rewritten program."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

import graphopt
from graphopt.contract import PassContext
from graphopt.passes.lut_matmul import LutMatmul
from graphopt.program import Program
from tests.passes import exit_models, test_block_folding, test_channel_gating, test_gated_attention, test_lut_matmul
from tests.passes.checking import captured


def gated_attention() -> Program:
    torch.manual_seed(0)
    program = captured(test_gated_attention.Own().eval(), torch.randn(3, 5, 16))
    return graphopt.optimize(program, "gated-attention").program


def block_folding() -> Program:
    torch.manual_seed(1)
    feeds = test_block_folding.feeds()
    network = test_block_folding.Network(*test_block_folding.STRENGTHS).eval()
    program = captured(network, torch.from_numpy(feeds[0]["x"]))
    return graphopt.optimize(program, "block-folding{remove=2}", data=feeds, metric="cosine").program


def channel_gating() -> Program:
    program = captured(test_channel_gating.One().eval(), test_channel_gating.images(channels=4))
    return test_channel_gating.written(program, "block", {"conv2d": test_channel_gating.stepped(4, 4)}).result.program


def qdq_fusion() -> Program:
    """Convolutions and a linear layer on 8-bit codes."""
    generator = np.random.default_rng(3)
    feeds = [{"x": generator.standard_normal((2, 3, 6, 6), np.float32)} for _ in range(10)]
    program = captured(test_channel_gating.Pair(32).eval(), torch.from_numpy(feeds[0]["x"]))
    return graphopt.optimize(program, "quantize,qdq-fusion", data=feeds, metric="cosine").program


def lut_matmul() -> Program:
    """Products with weights of two bits."""
    program = test_lut_matmul.attention(3)
    return LutMatmul(bits=2, group_size=32).run(program, PassContext()).program


def early_exit() -> Program:
    """Exits in the form of conditions inside of the program."""
    return exit_models.with_form(exit_models.network(1), "cond", (0.5, 0.4))


REWRITES: dict[str, Callable[[], Program]] = {
    "gated-attention": gated_attention,
    "block-folding": block_folding,
    "channel-gating": channel_gating,
    "qdq-fusion": qdq_fusion,
    "lut-matmul": lut_matmul,
    "early-exit": early_exit,
}
