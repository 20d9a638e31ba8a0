"""What a model of `--suite int8` is calibrated with and compared on, and the QDQ file that ONNX Runtime makes of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.tools.benchmarking.english_text import sentences
from graphopt.tools.benchmarking.models import MINILM, SuiteModel

if TYPE_CHECKING:
    from graphopt.program import Program

Feed = dict[str, "np.ndarray[Any, Any]"]

CALIBRATING = 32  # samples for the quantizer
_SIDES = (4, 14, 56)  # of the noise that an image is the sum of
_MOST = 6  # sentences in one text


def draw_inputs(model: SuiteModel, program: Program, count: int, seed: int) -> Iterator[Feed]:
    """Inputs of the examples' shapes: texts for MiniLM, else noise from `seed`, of several scales in images."""
    import torch

    if model.architecture == MINILM:
        yield from draw_texts(program, count, seed)
        return
    generator = torch.Generator().manual_seed(seed)
    ((spec,), (example,)) = program.inputs, program.examples
    for _ in range(count):
        if not example.is_floating_point():
            yield {spec.name: torch.randint(0, int(example.max()) + 1, example.shape, generator=generator).numpy()}
            continue
        value = torch.randn(example.shape, generator=generator)
        if example.ndim == 4:
            value = sum(
                torch.nn.functional.interpolate(
                    torch.randn(*example.shape[:2], side, side, generator=generator), example.shape[2:], mode="bilinear"
                )
                for side in _SIDES
            )  # type: ignore[assignment]
            value = (value - value.mean()) / value.std()
        yield {spec.name: value.numpy()}


def draw_texts(program: Program, count: int, seed: int) -> Iterator[Feed]:
    """One to six neighbouring sentences each, padded to the example's length; a seed's are its own."""
    from tokenizers import Tokenizer

    from graphopt.tools.demo_model import model_folder

    length = int(program.examples[0].shape[1])
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    text, names = sentences(), [spec.name for spec in program.inputs]
    at = seed * count * _MOST
    for number in range(count):
        size = 1 + number % _MOST
        encoded = tokenizer.encode(" ".join(text[(at + step) % len(text)] for step in range(size)))
        at += size
        yield dict(
            zip(names, (np.array([part], np.int64) for part in (encoded.ids, encoded.attention_mask)), strict=True)
        )


def write_qdq(program: Program, samples: Sequence[Feed], folder: Path) -> str:
    """The path of the program as ONNX Runtime quantizes it: uint8 activations, int8 weights with a scale an output."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Samples(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> Feed | None:
            return next(self.left, None)

    plain, prepared, quantized = (str(folder / f"{name}.onnx") for name in ("float", "prepared", "int8"))
    program.to_onnx(plain)
    with quiet_logging():
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantized,
            Samples(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return quantized


@contextmanager
def quiet_logging() -> Iterator[None]:
    """The quantizer advises on the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
