"""Whole models of real size, seeded, at O2: they compile, agree with PyTorch, and say which kernels are slow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt

pytestmark = pytest.mark.slow


class Logits(nn.Module):
    def __init__(self, network: nn.Module, **options: object) -> None:
        super().__init__()
        self.network, self.options = network, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x, **self.options).logits
        return logits


def test_resnet50() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    network = ResNetForImageClassification(ResNetConfig()).eval()
    program = graphopt.capture(Logits(network), (torch.randn(1, 3, 224, 224),))
    result = graphopt.optimize(program, "O2")
    artifact = graphopt.compile(result.program)  # compares with PyTorch, or raises
    folded = next(item for item in result.report.passes if item.name == "batch-norm-folding")
    assert len(folded.rewrites) == 53
    assert artifact.report["errors"]["main"] < 1e-5
    assert not artifact.report["slow"]


def test_gpt2_with_its_head_at_any_length() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config()).eval()
    ids = torch.randint(0, 50257, (1, 24))
    program = graphopt.capture(Logits(network, use_cache=False), (ids,), dynamic_shapes={"x": {1: "seq"}})
    artifact = graphopt.compile(graphopt.optimize(program, "O2").program)
    assert artifact.report["errors"]["main"] < 1e-5
    rules = artifact.report["kernels"].values()
    assert {"packed-gemm", "fused-attention", "row-reduction"} <= set(rules)
    assert all(name.startswith("cumsum") for name in artifact.report["slow"])
