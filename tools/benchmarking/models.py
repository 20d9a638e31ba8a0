"""The models of `--suite e2e`: transformers configurations with seeded weights; MiniLM has its real ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SEED = 0
IMAGE = (1, 3, 224, 224)
CLASSES = 1000


@dataclass(frozen=True)
class SuiteModel:
    """`configuration` is what differs from the defaults of `architecture`'s configuration class in transformers.

    `tokens` is the length of the input, None for an image. `counts`: part of the geometric mean; the others are models
    that no schedule was written for.
    """

    title: str
    architecture: str
    output: str
    configuration: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of the call
    counts: bool = True

    def describe(self) -> str:
        """The configuration, in one line."""
        if self.architecture == MINILM:
            return f"{self.title}: {MINILM}, its own weights, {self.tokens} tokens"
        changed = ", ".join(f"{name}={value}" for name, value in self.configuration.items())
        size = "x".join(map(str, IMAGE)) if self.tokens is None else f"{self.tokens} tokens"
        return f"{self.title}: {self.architecture}({changed}), weights from seed {SEED}, {size}"

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """(module, example inputs). Raises MissingExtraError for MiniLM where its package is not installed."""
        import torch

        if self.architecture == MINILM:
            from graphopt.tools.demo_model import minilm

            ids = torch.randint(1000, 30000, (1, self.tokens or 1), generator=generator())
            return minilm()[0], (ids, torch.ones_like(ids))
        import transformers

        architecture = getattr(transformers, self.architecture)
        configuration = architecture.config_class(**self.configuration)
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            module = one_output(architecture(configuration).eval(), self.output, self.options)
        if self.tokens is None:
            return module, (torch.randn(IMAGE, generator=generator()),)
        ids = torch.randint(0, configuration.vocab_size, (1, self.tokens), generator=generator())
        return module, (ids,)


def one_output(module: Any, output: str, options: Mapping[str, Any]) -> Any:
    """The module as a function of its first input alone, without what only training or a second step needs."""
    import torch

    class OneOutput(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, input: torch.Tensor) -> Any:
            return getattr(self.model(input, **options), output)

    return OneOutput().eval()


def generator() -> Any:
    import torch

    return torch.Generator().manual_seed(SEED)


MINILM = "all-MiniLM-L6-v2"
IMAGES: Mapping[str, Any] = {"num_labels": CLASSES}
MODELS: Mapping[str, SuiteModel] = {
    "minilm": SuiteModel("MiniLM", MINILM, "", tokens=128),
    "resnet50": SuiteModel("ResNet-50", "ResNetForImageClassification", "logits", IMAGES),
    "mobilenetv2": SuiteModel("MobileNetV2", "MobileNetV2ForImageClassification", "logits", IMAGES),
    "vit-s": SuiteModel(
        "ViT-S/16",
        "ViTForImageClassification",
        "logits",
        {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, **IMAGES},
    ),
    "convnext-t": SuiteModel("ConvNeXt-T", "ConvNextForImageClassification", "logits", IMAGES),
    "gpt2": SuiteModel("GPT-2", "GPT2LMHeadModel", "logits", tokens=128, options={"use_cache": False}),
    "llama-8x768": SuiteModel(
        "Llama-style 8x768",
        "LlamaForCausalLM",
        "logits",
        {
            "hidden_size": 768,
            "num_hidden_layers": 8,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "intermediate_size": 2048,
            "vocab_size": 32000,
        },
        tokens=64,
        options={"use_cache": False},
    ),
    "regnet-y": SuiteModel("RegNetY-4GF", "RegNetForImageClassification", "logits", IMAGES, counts=False),
    "swin-t": SuiteModel("Swin-T", "SwinForImageClassification", "logits", IMAGES, counts=False),
}


def choose_models(text: str | None, known: Mapping[str, Any] | None = None) -> list[str]:
    """The names in "a,b", all of `known` (the suite of models) without; raises UnknownNameError."""
    from graphopt.errors import UnknownNameError

    known = MODELS if known is None else known
    names = list(known) if text is None else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UnknownNameError("model", name, known)
    return list(dict.fromkeys(names))
