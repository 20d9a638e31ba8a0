"""What ships: embeds sentences with an artifact in a process that cannot import torch, onnx or tvm.

Usage: python -m graphopt.tools.demo_embed model.gopt tokenizer.json embeddings.npy < sentences
One sentence a line; prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

BLOCKED = ("torch", "onnx", "onnxruntime", "tvm", "transformers")


class Blocker:
    """First on sys.meta_path: whoever imports a blocked package fails."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} cannot be imported in this process", name=name)
        return None


def main(artifact: str, tokenizer: str, output: str) -> None:
    sys.meta_path.insert(0, Blocker())
    import numpy as np
    from tokenizers import Tokenizer

    begin = time.perf_counter()
    import graphopt
    from graphopt.tools.benchmarking.usage import peak_memory

    session = graphopt.InferenceSession(artifact)
    load_seconds = time.perf_counter() - begin
    encoder = Tokenizer.from_file(tokenizer)
    encoder.enable_truncation(256)
    encoder.enable_padding()
    encoded = encoder.encode_batch([line.rstrip("\n") for line in sys.stdin])
    feed = {
        "input_ids": np.array([item.ids for item in encoded], np.int64),
        "attention_mask": np.array([item.attention_mask for item in encoded], np.int64),
    }
    (embeddings,) = session.run(["sentence_embedding"], feed)
    np.save(output, embeddings)
    assert not set(BLOCKED) & set(sys.modules)
    tokens = [sum(item.attention_mask) for item in encoded]
    print(json.dumps({"load_seconds": load_seconds, "peak_bytes": peak_memory(), "tokens": tokens}))


if __name__ == "__main__":
    main(*sys.argv[1:])
