"""SmoothQuant: what is hard in activations goes to weights, t = max|x|^a / max|w|^(1 - a) for each channel.

Channels of x are divided by t and columns of w multiplied by it, so that a few large channels no longer decide the one
scale that all of them share. The strength a is given, or is the best for each value: the one with the least squared
error of its readers' results on at most `ROWS` of its rows, with both operands in codes. No division at all is among
the choices, so nothing gets worse on those rows; one that takes a multiplication of its own has to halve the error.

Source: Xiao et al. 2022, arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.contract import PassContext, PassResult
from graphopt.data.accumulators import Accumulator, Moments, Statistics
from graphopt.data.dataset import Sample
from graphopt.data.statistics import observe
from graphopt.edit import Edit, GraphEditor
from graphopt.matcher import argument
from graphopt.passes.quantize.activations import ActivationForm, Range
from graphopt.passes.quantize.folds import Fold, apply, input_columns
from graphopt.passes.quantize.scaling import Rows, each_fold, folds_of, usable
from graphopt.passes.quantize.scheme import Activations
from graphopt.passes.quantize.weights import WeightForm
from graphopt.passes.scale_folding import PRODUCTS
from graphopt.program import Program

RULE = "quantize/smoothquant"
STRENGTHS = tuple(step / 20 for step in range(6, 21))
USUAL = 0.5  # of values whose channels are not the last axis, whose error is not measured
_WORTH = 0.5  # of the error at most is left where a multiplication is inserted


@dataclass(frozen=True)
class Smoothing:
    """`strength` is None where the best is searched; with `exact` factors are powers of two.

    The others say what codes the products will read: `weight` is None for weights in float32.
    """

    strength: float | None
    exact: bool
    weight: WeightForm | None
    activations: Activations
    form: ActivationForm

    def run(self, program: Program, context: PassContext, samples: Iterable[Sample]) -> PassResult:
        """The same function with smoother values, wherever that folds or a multiplication may stand."""
        edit = Edit(program, context, "quantize")
        moments: dict[str, list[Accumulator]] = {}
        rows: dict[str, Rows] = {}
        for editor in edit.graphs():
            for fold in folds_of(editor, edit, insert=True):
                name = editor.full_name(fold.value)
                moments[name] = [Moments(fold.axis)]
                if self.strength is None and fold.axis == -1:
                    rows[name] = Rows()
        observe(program, {name: [*found, *filter(None, [rows.get(name)])] for name, found in moments.items()}, samples)
        for editor, fold in each_fold(edit, insert=True):
            name = editor.full_name(fold.value)
            seen = moments[name][0].result()
            if not isinstance(seen, Statistics):
                editor.decline(RULE, fold.value, "no sample reaches it")
                continue
            factors: Tensor | None
            if name in rows:
                factors = self._best(editor, fold, seen, rows[name].result().double())
            else:
                factors = self._factors(editor, fold, seen, USUAL if self.strength is None else self.strength)
            if factors is None:
                editor.decline(RULE, fold.value, "no strength has clearly less error than none")
            else:
                apply(editor, RULE, fold, factors)
        return edit.finish()

    def _factors(self, editor: GraphEditor, fold: Fold, seen: Statistics, strength: float) -> Tensor:
        largest, read = seen.absolute_maximum, input_columns(editor, fold)
        factors = torch.where((largest > 0) & (read > 0), largest**strength / read ** (1 - strength), 1.0)
        return usable(factors, self.exact)

    def _best(self, editor: GraphEditor, fold: Fold, seen: Statistics, rows: Tensor) -> Tensor | None:
        """The factors with the least error, or None where none are better than no factors."""

        def error(factors: Tensor) -> float:
            coded = self._rounded(rows / factors, seen, factors)
            return sum(self._error(editor, reader, rows, coded, factors) for reader in fold.readers)

        plain = error(torch.ones_like(seen.absolute_maximum))
        tried = [self._factors(editor, fold, seen, strength) for strength in STRENGTHS]
        least, best = min(((error(factors), number) for number, factors in enumerate(tried)))
        return tried[best] if least < plain * (_WORTH if fold.maker is None else 1) else None

    def _rounded(self, rows: Tensor, seen: Statistics, factors: Tensor) -> Tensor:
        """What codes make of divided rows."""
        if self.activations == "none":
            return rows
        if self.activations == "int8":
            low, high = seen.minimum / factors, seen.maximum / factors
            return self.form.rounded(rows, Range(float(low.nan_to_num(0.0).amin()), float(high.nan_to_num(0.0).amax())))
        low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
        scale = torch.where(high > low, (high - low) / 255, 1.0)
        return (rows / scale).round() * scale

    def _error(self, editor: GraphEditor, reader: Node, rows: Tensor, coded: Tensor, factors: Tensor) -> float:
        """The sum of squared differences that codes of both operands make to a product of `rows`."""
        operands = PRODUCTS[reader.target]
        weight = editor.constant_value(argument(reader, operands.weight))
        assert weight is not None
        value = weight.detach().double()
        sizes = [1, 1]
        sizes[operands.inputs] = -1
        scaled = value * factors.reshape(sizes)
        if self.weight is not None and self.weight.refusal(weight) is None:
            scaled = self.weight.encode(scaled.float(), operands.outputs, operands.inputs).numbers().double()
        if operands.inputs == 1:
            value, scaled = value.t(), scaled.t()
        return float((coded @ scaled - rows @ value).square().sum())
