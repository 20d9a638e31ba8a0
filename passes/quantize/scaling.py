"""Scales of channels that make a network easier to quantize, folded into the weights around them.

- equalization: the ranges of weights on both sides of a pair of layers become equal, t = sqrt(r1 / r2) (Nagel et al.
  2019, arXiv 1906.04721, equation 11);
- awq: t = mean|x|^r for the r of 0, 1/20, ..., 19/20 with the least squared error of the readers' results with their
  weights in codes (Lin et al. 2023, arXiv 2306.00978, section 3.2). r = 0 is plain rounding, so nothing gets worse on
  the rows that are kept for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.contract import PassContext, PassResult
from graphopt.data.dataset import Sample
from graphopt.data.statistics import observe
from graphopt.edit import Edit, GraphEditor
from graphopt.matcher import argument
from graphopt.passes.merge_linears import count_readers
from graphopt.passes.quantize.folds import Fold, apply, find_folds, fold_at, input_columns, output_rows, power_of_two
from graphopt.passes.scale_folding import PRODUCTS
from graphopt.program import Program

ROWS = 512  # of a value are kept for the search
GRID = 20
SMALLEST, LARGEST = 1e-4, 1e4  # factors


class Coded(Protocol):
    """A weight as codes."""

    def numbers(self) -> Tensor: ...


class Form(Protocol):
    """How weights are encoded."""

    def encode(self, weight: Tensor, outputs: int, inputs: int) -> Coded: ...


class Rows:
    """At most `ROWS` rows of a value with features last, evenly from all that came by."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.stride = 1
        self.seen = 0

    def update(self, value: Tensor) -> None:
        rows = value.detach().reshape(-1, value.shape[-1])
        first = -self.seen % self.stride
        self.kept += [row.clone() for row in rows[first :: self.stride]]
        self.seen += len(rows)
        while len(self.kept) > ROWS:
            self.kept = self.kept[::2]
            self.stride *= 2

    def result(self) -> Tensor:
        return torch.stack(self.kept)


@dataclass(frozen=True)
class Scaling:
    """Chooses factors for the folds of a program and writes them; `power_of_two` makes the folds exact."""

    power_of_two: bool

    def equalized(self, program: Program, context: PassContext) -> PassResult:
        """Every pair of layers with equal ranges, front to back."""
        edit = Edit(program, context, "quantize")
        for editor, fold in each_fold(edit):
            if fold.is_normed:
                continue
            assert fold.maker is not None
            made, read = output_rows(editor, fold.maker), input_columns(editor, fold)
            factors = torch.where((made > 0) & (read > 0), (made / read).sqrt(), 1.0)
            apply(editor, "quantize/equalization", fold, usable(factors, self.power_of_two))
        return edit.finish()

    def searched(self, program: Program, context: PassContext, samples: Iterable[Sample], form: Form) -> PassResult:
        """AWQ for weights in `form`, wherever it folds between products with features last."""
        edit = Edit(program, context, "quantize")
        names = [
            editor.full_name(fold.value)
            for editor in edit.graphs()
            for fold in folds_of(editor, edit)
            if fold.axis == -1
        ]
        rows = {name: Rows() for name in names}
        observe(program, {name: [item] for name, item in rows.items()}, samples)
        for editor, fold in each_fold(edit):
            name = editor.full_name(fold.value)
            if name not in rows:
                editor.decline("quantize/awq", fold.value, "its channels are not the last axis")
            elif not rows[name].kept:
                editor.decline("quantize/awq", fold.value, "no sample reaches it")
            else:
                share, factors = self._best(editor, fold, rows[name].result(), form)
                if share:
                    apply(editor, "quantize/awq", fold, factors)
                else:
                    editor.decline("quantize/awq", fold.value, "no scale has less error than plain rounding")
        return edit.finish()

    def _best(self, editor: GraphEditor, fold: Fold, rows: Tensor, form: Form) -> tuple[float, Tensor]:
        """The share r with the least error, and its factors."""
        size = rows.double().abs().mean(0)
        best, least = (0.0, torch.ones_like(size)), float("inf")
        for step in range(GRID):
            factors = size.clamp(min=SMALLEST) ** (step / GRID)
            factors = usable(factors / (factors.max() * factors.min()).sqrt(), self.power_of_two)
            error = sum(_error(editor, reader, rows, factors, form) for reader in fold.readers)
            if error < least:
                best, least = (step / GRID, factors), error
        return best


def usable(factors: Tensor, exact: bool) -> Tensor:
    """Within bounds, and powers of two where `exact`."""
    clamped = factors.clamp(SMALLEST, LARGEST)
    return power_of_two(clamped) if exact else clamped


def _error(editor: GraphEditor, reader: Node, rows: Tensor, factors: Tensor, form: Form) -> float:
    """The mean squared difference that codes of the scaled weight make to a product of `rows`."""
    operands = PRODUCTS[reader.target]
    weight = editor.constant_value(argument(reader, operands.weight))
    assert weight is not None
    value = weight.detach().double()
    sizes = [1, 1]
    sizes[operands.inputs] = -1
    own = factors.reshape(sizes)
    coded = form.encode((value * own).float(), operands.outputs, operands.inputs).numbers().double() / own
    difference = coded - value
    if operands.inputs == 1:
        difference = difference.t()
    return float((rows.double() @ difference).square().mean())


def folds_of(editor: GraphEditor, edit: Edit, insert: bool = False) -> Iterator[Fold]:
    """Every fold of one graph of an edit that has changed nothing yet."""
    return find_folds(editor, count_readers(edit.original), insert)


def each_fold(edit: Edit, insert: bool = False) -> Iterator[tuple[GraphEditor, Fold]]:
    """Every fold as it is when its turn comes: those before it have changed its constants."""
    shared = count_readers(edit.original)
    for editor in list(edit.graphs()):
        for value in [fold.value for fold in find_folds(editor, shared, insert)]:
            fold = fold_at(editor, value, shared, insert)
            if fold is not None:
                yield editor, fold
