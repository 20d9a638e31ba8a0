"""Small random models of common architectures: every operator has a lowering and the outputs agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests import models

Check = Callable[..., None]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "gpt2")]
TEXT = {"num_hidden_layers": 1, "vocab_size": 100, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_key_value_heads=1, max_position_embeddings=40, **TEXT)
    return models.TextModel(LlamaForCausalLM(config), "logits", use_cache=False)


def t5_encoder() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return models.TextModel(T5EncoderModel(config), "last_hidden_state")


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {key: value for key, value in TEXT.items() if key != "vocab_size"}
    return models.ImageModel(ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, num_labels=5, **sizes)))


def mobilenet() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(depth_multiplier=0.1, image_size=32, num_labels=5)
    return models.ImageModel(MobileNetV2ForImageClassification(config))


def randomized(module: nn.Module) -> nn.Module:
    """Statistics of batch norms that are not the trivial ones."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.normal_(child.running_mean, 0, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(child.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return module.eval()


@pytest.mark.parametrize(
    "make", [llama, pytest.param(t5_encoder, marks=pytest.mark.slow)], ids=lambda make: make.__name__
)
def test_text_models(agree: Check, make: Callable[[], nn.Module]) -> None:
    def example(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        mask = torch.ones(rows, tokens, dtype=torch.int64)
        mask[-1, tokens // 2 + 1 :] = 0
        return torch.randint(1, 100, (rows, tokens)), mask

    axes = {0: "batch", 1: "seq"}
    more = [example(1, 1), example(3, 17)]
    agree(randomized(make()), example(2, 6), [axes, axes], more, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("make", [vit, pytest.param(mobilenet, marks=pytest.mark.slow)], ids=lambda make: make.__name__)
def test_image_models(agree: Check, make: Callable[[], nn.Module]) -> None:
    images = [torch.randn(n, 3, 32, 32) for n in (2, 1, 3)]
    more = [(image,) for image in images[1:]]
    agree(randomized(make()), images[:1], [{0: "batch"}], more, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["resnet", "tied", "dict_output", "conv_net", *SLOW])
def test_shared_models(agree: Check, name: str) -> None:
    module, examples, dynamic = getattr(models, name)()
    agree(module, examples, list(dynamic.values()), rtol=1e-4, atol=2e-5)
