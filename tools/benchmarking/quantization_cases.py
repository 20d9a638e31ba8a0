"""What `--suite quantization` measures: MiniLM with its own weights, and two networks trained on digits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from graphopt.tools.benchmarking.folding_cases import SEED, Subject, from_case
from graphopt.tools.benchmarking.folding_cases import minilm as sentences

FLOAT = "O2"


@dataclass(frozen=True)
class QuantizationCase:
    """`passes` make the quantized form, on the data for fitting; `least` are the figures that it is to reach.

    Where `falls`, `least` are what figures may fall by against float32, at most.
    """

    title: str
    build: Callable[[], Subject]
    passes: str
    least: Mapping[str, float]
    falls: bool = False


def digits_cnn() -> Subject:
    from graphopt.tools.benchmarking.digits_cnn import case

    return from_case(case(SEED), "accuracy")


def digits_vit() -> Subject:
    from graphopt.tools.benchmarking.digits_vit import case

    return from_case(case(SEED), "accuracy")


SMOOTH = "O2,quantize{algorithm=smoothquant},qdq-fusion"
CASES: Mapping[str, QuantizationCase] = {
    "minilm": QuantizationCase("MiniLM", sentences, SMOOTH, {"cosine": 0.995, "spearman": 0.99}),
    "digits-cnn": QuantizationCase("digits CNN", digits_cnn, "O2,quantize,qdq-fusion", {"accuracy": 0.005}, falls=True),
    "digits-vit": QuantizationCase("digits ViT", digits_vit, SMOOTH, {"accuracy": 0.005}, falls=True),
}
