"""The table of operators, by family; importing this registers all of them."""

from graphopt.capture.onnx import shape_domain
from graphopt.capture.onnx.operators import (
    activations,
    attention,
    convolution,
    creation,
    elementwise,
    indexing,
    linear,
    microsoft,
    microsoft_attention,
    microsoft_quantization,
    movement,
    normalization,
    pooling,
    quantization,
    reduction,
    resizing,
    rotary,
)

FAMILIES = (
    activations,
    attention,
    convolution,
    creation,
    elementwise,
    indexing,
    linear,
    microsoft,
    microsoft_attention,
    microsoft_quantization,
    movement,
    normalization,
    pooling,
    quantization,
    reduction,
    resizing,
    rotary,
    shape_domain,
)
