"""Biases that give results in codes the mean that they had: b + (W - W') E[x] for each output channel.

E[x] is the mean of each input channel over the samples, W' the weight that the codes stand for. Padding of convolutions
counts as if it held the mean, too. Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.contract import PassContext
from graphopt.data.accumulators import Accumulator, Moments, Statistics
from graphopt.data.dataset import Sample
from graphopt.data.statistics import observe
from graphopt.edit import Edit, GraphEditor
from graphopt.matcher import argument
from graphopt.passes.quantize.placement import Layer, place
from graphopt.passes.quantize.scheme import Scheme
from graphopt.passes.quantize.writing import RULE
from graphopt.passes.scale_folding import PRODUCTS


def corrected_biases(scheme: Scheme, samples: Iterable[Sample]) -> dict[str, Tensor]:
    """New biases (float32, [outputs]) of the layers whose weights get codes, by name."""
    found = []
    for editor in Edit(scheme.program, PassContext(), RULE).graphs():
        layers = place(editor, scheme.rules()).layers.values()
        found += [(editor, layer) for layer in layers if layer.weight is not None and scheme.weight is not None]
    moments: dict[str, list[Accumulator]] = {}
    for editor, layer in found:
        axis = PRODUCTS[layer.node.target].channels
        moments.setdefault(editor.full_name(layer.values[0]), [Moments(axis)])
    observe(scheme.program, moments, samples)
    biases = {}
    for editor, layer in found:
        seen = moments[editor.full_name(layer.values[0])][0].result()
        bias = _bias(editor, layer)
        if isinstance(seen, Statistics) and bias is not None:
            lost = _shift(scheme, editor, layer, seen.mean.nan_to_num(0.0))
            biases[editor.full_name(layer.node)] = (bias.detach().double() + lost).float()
    return biases


def _bias(editor: GraphEditor, layer: Layer) -> Tensor | None:
    """The bias, zeros where there is none; None where it is computed or no vector."""
    operands = PRODUCTS[layer.node.target]
    node = argument(layer.node, operands.bias) if operands.bias else None
    if isinstance(node, Node):
        value = editor.constant_value(node)
        return value if value is not None and value.dim() == 1 else None
    assert layer.weight is not None
    return torch.zeros(layer.weight.meta["val"].shape[operands.outputs])


def _shift(scheme: Scheme, editor: GraphEditor, layer: Layer, mean: Tensor) -> Tensor:
    """(W - W') E[x], float64 [outputs]."""
    assert layer.weight is not None
    operands = PRODUCTS[layer.node.target]
    weight = editor.constant_value(layer.weight)
    form = scheme.form_of(editor.full_name(layer.node))
    assert weight is not None and form is not None
    coded = scheme.weights.of(weight, form, operands.outputs, operands.inputs).numbers()
    difference = (weight.detach().double() - coded.double()).movedim((operands.outputs, operands.inputs), (0, 1))
    summed = difference.flatten(2).sum(2) if difference.dim() > 2 else difference
    outputs, inputs = summed.shape
    groups = len(mean) // inputs
    parts = summed.reshape(groups, outputs // groups, inputs) @ mean.reshape(groups, inputs, 1)
    return parts.reshape(outputs)
