"""Small models of many architectures that `transformers` has, with random weights: one row of a table each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 100
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
NO_CACHE = {"use_cache": False}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
STATES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
SPEECH = {
    **{key: value for key, value in TEXT.items() if key != "max_position_embeddings"},
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0}


def ids(batch: int = 2, length: int = 8) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text() -> dict[str, Tensor]:
    """The second row is padded."""
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 6:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def image(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": floats(1, 3, size, size)}


def pair() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids(2, 5)}


def tokens() -> dict[str, Tensor]:
    return {"input_ids": ids()}


@dataclass(frozen=True)
class Architecture:
    """A model class of `transformers`, its configuration, its inputs, and the field of its answer that is compared.

    Or a module of its own, without a configuration, that answers with one tensor.
    """

    model: str | type[nn.Module]
    config: str
    options: Mapping[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = text
    output: str = "last_hidden_state"
    call: Mapping[str, Any] = field(default_factory=dict)
    cache: bool = False


class OneOutput(nn.Module):
    """The model with its inputs by position, returning one tensor."""

    def __init__(self, model: nn.Module, architecture: Architecture, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.output = architecture.output
        self.call = {**architecture.call, "return_dict": True}

    def forward(self, *values: Tensor) -> Tensor:
        result = self.model(**dict(zip(self.names, values, strict=True)), **self.call)
        found: Tensor = getattr(result, self.output)
        return found


class Cached(nn.Module):
    """A decoder with its keys and values so far as inputs; it returns logits and all keys and values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        result = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        return result.logits, *(kept for layer in cache.layers for kept in (layer.keys, layer.values))


class InvertedResidual(nn.Module):
    """A block of MobileNetV3 (Howard et al. 2019, arXiv 1905.02244) with squeeze and excitation."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.Hardswish())
        depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(inner), nn.Hardswish())
        squeeze = nn.Conv2d(inner, channels, 1), nn.ReLU(), nn.Conv2d(channels, inner, 1), nn.Hardsigmoid()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), *squeeze)
        self.project = nn.Sequential(nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        residual: Tensor = self.project(y * self.gate(y))
        return x + residual


class MobileNetV3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()
        self.features = nn.Sequential(*first, InvertedResidual(8, 16), InvertedResidual(8, 24))
        self.classifier = nn.Sequential(nn.Linear(8, 16), nn.Hardswish(), nn.Linear(16, 5))

    def forward(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = self.classifier(self.features(pixel_values).mean((2, 3)))
        return found


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model in eval mode and its example inputs."""
    import transformers

    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    if isinstance(architecture.model, str):
        config = getattr(transformers, architecture.config)(**architecture.options)
        # Of the other forms of experts torch exports only grouped_mm, for which neither ONNX exporter has a form; the
        # loop of "eager" goes over the experts that the tokens choose.
        config._experts_implementation = "batched_mm"
        model: Any = getattr(transformers, architecture.model)(config).eval()
    else:
        model = architecture.model().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.numel() == max(weight.shape, default=0):  # norms begin equal, and exporters merge what is equal
                weight += 0.1 * torch.randn_like(weight)
    inputs = architecture.inputs()
    if isinstance(architecture.model, str):
        model = Cached(model) if architecture.cache else OneOutput(model, architecture, list(inputs))
    return model.eval(), tuple(inputs.values())


def _past(heads: int) -> Callable[[], dict[str, Tensor]]:
    kept = {f"past_{place}": floats(2, heads, 5, 8, seed=place) for place in range(4)}
    return lambda: {"input_ids": ids(2, 3), **kept}


def _causal(name: str, **options: Any) -> Architecture:
    return Architecture(f"{name}ForCausalLM", f"{name}Config", {**DECODER, **options}, text, "logits", NO_CACHE)


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture("BertModel", "BertConfig", TEXT),
    "roberta": Architecture("RobertaModel", "RobertaConfig", TEXT),
    "distilbert": Architecture(
        "DistilBertModel",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": 64,
        },
    ),
    "albert": Architecture("AlbertModel", "AlbertConfig", {**TEXT, "embedding_size": 16}),
    "electra": Architecture("ElectraModel", "ElectraConfig", {**TEXT, "embedding_size": 16}),
    "mpnet": Architecture("MPNetModel", "MPNetConfig", TEXT),
    "deberta_v2": Architecture(
        "DebertaV2Model",
        "DebertaV2Config",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "modernbert": Architecture("ModernBertModel", "ModernBertConfig", {**TEXT, "cls_token_id": 1, "sep_token_id": 2}),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", GPT2, text, "logits", NO_CACHE),
    "gpt2_with_cache": Architecture("GPT2LMHeadModel", "GPT2Config", GPT2, _past(4), cache=True),
    "llama_with_cache": Architecture("LlamaForCausalLM", "LlamaConfig", DECODER, _past(2), cache=True),
    "gpt_neox": _causal("GPTNeoX"),
    "opt": Architecture(
        "OPTForCausalLM", "OPTConfig", {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32}, text, "logits", NO_CACHE
    ),
    "llama": _causal("Llama"),
    "mistral": _causal("Mistral"),
    "qwen2": _causal("Qwen2"),
    "qwen3": _causal("Qwen3"),
    "gemma2": _causal("Gemma2"),
    "phi": _causal("Phi"),
    "gptj": Architecture("GPTJForCausalLM", "GPTJConfig", {**GPT2, "rotary_dim": 4}, text, "logits", NO_CACHE),
    "falcon": Architecture("FalconForCausalLM", "FalconConfig", {**TEXT, "num_kv_heads": 1}, text, "logits", NO_CACHE),
    "bloom": Architecture(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        text,
        "logits",
        NO_CACHE,
    ),
    "mixtral": _causal("Mixtral", **EXPERTS),
    "olmoe": _causal("Olmoe", **EXPERTS),
    "qwen2_moe": _causal("Qwen2Moe", **EXPERTS, moe_intermediate_size=32, shared_expert_intermediate_size=32),
    "mamba": Architecture("MambaForCausalLM", "MambaConfig", {**STATES, "state_size": 8}, tokens, "logits", NO_CACHE),
    "mamba2": Architecture(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {**STATES, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        tokens,
        "logits",
        NO_CACHE,
    ),
    "rwkv": Architecture("RwkvForCausalLM", "RwkvConfig", {**STATES, "context_length": 64}, tokens, "logits", NO_CACHE),
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", T5, pair, "logits", NO_CACHE),
    "bart": Architecture("BartModel", "BartConfig", BART, pair, "last_hidden_state", NO_CACHE),
    "whisper": Architecture(
        "WhisperModel",
        "WhisperConfig",
        WHISPER,
        lambda: {"input_features": floats(1, 8, 32), "decoder_input_ids": ids(1, 5)},
        "last_hidden_state",
        NO_CACHE,
    ),
    "vit": Architecture("ViTModel", "ViTConfig", IMAGE, image),
    "deit": Architecture("DeiTModel", "DeiTConfig", IMAGE, image),
    "dinov2": Architecture("Dinov2Model", "Dinov2Config", {**IMAGE, "mlp_ratio": 2}, image),
    "beit": Architecture("BeitModel", "BeitConfig", {**IMAGE, "use_relative_position_bias": True}, image),
    "swin": Architecture(
        "SwinModel",
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        image,
    ),
    "convnext": Architecture(
        "ConvNextModel",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
        image,
    ),
    "resnet": Architecture(
        "ResNetModel", "ResNetConfig", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}, image
    ),
    "mobilenet_v2": Architecture(
        "MobileNetV2Model", "MobileNetV2Config", {"image_size": 32, "depth_multiplier": 0.25}, image
    ),
    "mobilenet_v3": Architecture(MobileNetV3, "", {}, image),
    "segformer": Architecture(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
            "num_labels": 5,
        },
        image,
        "logits",
    ),
    "dpt": Architecture(
        "DPTForDepthEstimation",
        "DPTConfig",
        {
            **IMAGE,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 8,
            "reassemble_factors": [4, 2, 1, 0.5],
            "is_hybrid": False,
        },
        image,
        "predicted_depth",
    ),
    "clip": Architecture("CLIPVisionModel", "CLIPVisionConfig", IMAGE, image),
    "yolos": Architecture(
        "YolosModel", "YolosConfig", {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 4}, image
    ),
    "wav2vec2": Architecture("Wav2Vec2Model", "Wav2Vec2Config", {**SPEECH}, lambda: {"input_values": floats(1, 400)}),
    "hubert": Architecture("HubertModel", "HubertConfig", {**SPEECH}, lambda: {"input_values": floats(1, 400)}),
    "ast": Architecture(
        "ASTModel",
        "ASTConfig",
        {**IMAGE, "num_mel_bins": 16, "max_length": 32, "frequency_stride": 8, "time_stride": 8},
        lambda: {"input_values": floats(1, 32, 16)},
    ),
}
