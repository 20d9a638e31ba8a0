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
    recurrent,
    reduction,
    resizing,
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
    recurrent,
    reduction,
    resizing,
    shape_domain,
)
