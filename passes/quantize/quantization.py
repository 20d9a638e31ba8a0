"""Quantize a program after training: 8-bit or narrower codes for weights, 8-bit codes for what products read.

Before: y = linear(x, w, b)
After:  y = linear(dequantize(quantize(x)), dequantize(codes), b)       codes is stored as int8

The result is in explicit form, a pair of quantize and dequantize on every value that an integer kernel would read as
codes: it runs in PyTorch, says exactly what integer kernels have to compute, and is what ONNX Runtime writes (QDQ).
`placement` says which operators read codes; biases, norms, softmax and attention stay float32.

Ranges come from the data for fitting; without data from the examples, and a note says so. With `max-drop` or a budget a
fifth of the data for fitting is kept for choosing: nothing is chosen by what is held out. Run it after O2: a batch norm
that is not folded stands between a product and its codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from graphopt.contract import Pass, PassContext, PassResult, Region, TradeOff
from graphopt.data.dataset import Dataset, Sample
from graphopt.errors import UsageError
from graphopt.passes.quantize.activations import ActivationForm
from graphopt.passes.quantize.budget import for_bytes, for_seconds
from graphopt.passes.quantize.calibration import Calibration
from graphopt.passes.quantize.correction import corrected_biases
from graphopt.passes.quantize.gate import gated
from graphopt.passes.quantize.guard import guarded
from graphopt.passes.quantize.ignoring import ignored_nodes
from graphopt.passes.quantize.placement import STARTS
from graphopt.passes.quantize.scaling import Scaling
from graphopt.passes.quantize.scheme import Activations, Scheme
from graphopt.passes.quantize.smoothing import Smoothing
from graphopt.passes.quantize.weights import Granularity, WeightForm
from graphopt.program import Program

_BATCH_NORM = torch.ops.aten.batch_norm.default


@dataclass(frozen=True)
class Quantize(Pass):
    """Store weights in 8 bits or fewer, and give products 8-bit codes to read."""

    name = "quantize"
    preserves = "quantized"
    measured = False  # a program of pairs says nothing of the time that codes take: `gate` races the regions
    weights: Literal["int8", "int4", "nf4", "fp8", "none"] = "int8"
    activations: Literal["auto", "int8", "dynamic-int8", "none"] = "auto"
    granularity: Literal["auto", "per-tensor", "per-channel", "per-group"] = "auto"
    group_size: int = 128
    symmetric: bool | None = None
    calibration: Literal["minmax", "percentile", "entropy", "mse"] = "minmax"
    percentile: float = 99.99
    algorithm: Literal["plain", "smoothquant", "awq"] = "plain"
    migration_strength: float | None = None
    equalization: bool = False
    power_of_two: bool = False
    bias_correction: bool = False
    ignored: tuple[str, ...] = ()
    max_drop: float | None = None
    size_budget: float | None = None
    latency_budget: float | None = None

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise UsageError(f"group-size={self.group_size} must be 1 or more")
        if not 50 < self.percentile <= 100:
            raise UsageError(f"percentile={self.percentile} must be over 50 and at most 100")
        if self.migration_strength is not None and not 0 <= self.migration_strength <= 1:
            raise UsageError(f"migration-strength={self.migration_strength} must be from 0 to 1")
        for option in ("max_drop", "size_budget", "latency_budget"):
            value = getattr(self, option)
            if value is not None and value < 0:
                raise UsageError(f"{option.replace('_', '-')}={value} must be 0 or more")
        self._check_together()

    def _check_together(self) -> None:
        activations = self._activations()
        if self.weights == "none" and activations == "none":
            raise UsageError("weights=none and activations=none leave nothing to do; give one of them")
        if activations != "int8" and (self.calibration != "minmax" or self.symmetric is not None):
            raise UsageError("calibration and symmetric are of activations=int8; leave them out")
        if self.weights == "none" and (self.algorithm == "awq" or self.bias_correction):
            raise UsageError(
                "algorithm=awq and bias-correction are of weights in codes; give weights, or leave them out"
            )
        if self.power_of_two and self.algorithm == "plain" and not self.equalization:
            raise UsageError("power-of-two is of scales that are folded; give an algorithm or equalization=true")
        if self.migration_strength is not None and self.algorithm != "smoothquant":
            raise UsageError("migration-strength is of algorithm=smoothquant; give that, or leave it out")
        if self.percentile != Quantize.percentile and self.calibration != "percentile":
            raise UsageError("percentile is of calibration=percentile; give that, or leave it out")
        form = self._weight_form()
        grouped = self.size_budget is not None or (form is not None and form.granularity == "per-group")
        if self.group_size != Quantize.group_size and not grouped:
            raise UsageError(
                "group-size is of granularity=per-group and size-budget; give one of them, or leave it out"
            )
        if self.size_budget is not None and self.weights != "int8":
            raise UsageError("size-budget chooses between int8 and int4 for each layer; give weights=int8")
        if self.size_budget is not None and self.latency_budget is not None:
            raise UsageError("size-budget and latency-budget exclude each other; give one of them")

    def starts_at(self) -> frozenset[Any]:
        return STARTS

    def _activations(self) -> Activations:
        if self.activations != "auto":
            return self.activations
        return "int8" if self.weights in ("int8", "none") else "none"

    def _weight_form(self) -> WeightForm | None:
        if self.weights == "none":
            return None
        own: Granularity = "per-group" if self.weights in ("int4", "nf4") else "per-channel"
        return WeightForm(self.weights, own if self.granularity == "auto" else self.granularity, self.group_size)

    def _activation_form(self, context: PassContext) -> ActivationForm:
        return ActivationForm(not context.target.startswith("cpu") if self.symmetric is None else self.symmetric)

    def run(self, program: Program, context: PassContext) -> PassResult:
        fit, choosing, notes = self._samples(program, context)
        floats = {name: f"ignored={entry} names it" for name, entry in ignored_nodes(program, self.ignored).items()}
        folded = self._folded(program, context, fit)
        scheme = Scheme(
            program=folded.program,
            activations=self._activations(),
            form=self._activation_form(context),
            weight=self._weight_form(),
            whole_sums=context.target.startswith("cpu"),
            floats=floats,
        )
        if scheme.activations == "int8":
            scheme = self._calibrated(scheme, fit)
        scheme, told, trade_offs = self._within_bounds(scheme, program, choosing, context)
        regions: tuple[Region, ...] = ()
        if context.race is not None:
            raced = gated(scheme, context.race, context)
            scheme, regions = raced.scheme, raced.regions
            notes += raced.notes
        if self.bias_correction:
            scheme = replace(scheme, biases=corrected_biases(scheme, fit))
        if any(node.target is _BATCH_NORM for node in program.nodes()):
            notes.append(
                "a batch norm stands behind products, so that their results are not taken as codes; run O2 first"
            )
        result = joined(program, folded, scheme.write(context), (*notes, *told), trade_offs)
        return replace(result, regions=regions)

    def _samples(self, program: Program, context: PassContext) -> tuple[Iterable[Sample], Dataset | None, list[str]]:
        """What ranges are taken from, the data in two parts where something is chosen by the second, and notes."""
        bounds = [self.max_drop, self.size_budget, self.latency_budget]
        if context.data is None:
            if any(bound is not None for bound in bounds):
                raise UsageError("max-drop and budgets are judged on data; give data")
            uses = self._activations() == "int8" or self.bias_correction or self.algorithm != "plain"
            note = "there is no data: ranges are those of the examples alone; give data of the kind that will come"
            return [Sample(tuple(program.examples))], None, [note] if uses else []
        if all(bound is None for bound in bounds):
            return context.data.fit, None, []
        parts = context.data.for_fitting()
        return parts.fit, parts, []

    def _folded(self, program: Program, context: PassContext, fit: Iterable[Sample]) -> PassResult:
        """The same function with weights and values that are easier to quantize."""
        results, form = [PassResult(program)], self._weight_form()
        scaling = Scaling(self.power_of_two)
        if self.equalization:
            results.append(scaling.equalized(program, context))
        now = results[-1].program
        if self.algorithm == "smoothquant":
            codes = form, self._activations(), self._activation_form(context)
            smoothing = Smoothing(self.migration_strength, self.power_of_two, *codes)
            results.append(smoothing.run(now, context, fit))
        if self.algorithm == "awq" and form is not None:
            results.append(scaling.searched(now, context, fit, form))
        rewrites = tuple(item for result in results for item in result.rewrites)
        notes: tuple[str, ...] = ()
        if len(results) > 1 and not rewrites:
            notes = ("no scale folds: each value that layers read has another reader, or no operator that takes it up",)
        declined = tuple(item for result in results for item in result.declined)
        return PassResult(results[-1].program, rewrites, declined, notes)

    def _calibrated(self, scheme: Scheme, fit: Iterable[Sample]) -> Scheme:
        """With the ranges of every value that may get codes."""
        placements, name = scheme.survey()
        roots = {name(value): name(root) for item in placements for value, root in item.observed()}
        calibration = Calibration(self.calibration, self.percentile, scheme.form)
        return replace(scheme, ranges=calibration.ranges(scheme.program, roots, fit))

    def _within_bounds(
        self, scheme: Scheme, original: Program, parts: Dataset | None, context: PassContext
    ) -> tuple[Scheme, Sequence[str], Sequence[TradeOff]]:
        """With narrower codes or more float32 as budgets and `max-drop` have it."""
        if parts is None:
            return scheme, (), ()
        notes: list[str] = []
        trade_offs: list[TradeOff] = []
        if self.size_budget is not None:
            narrow = WeightForm("int4", "per-group", self.group_size)
            found = for_bytes(scheme, self.size_budget, narrow, parts.held_out, context)
            scheme = found.scheme
            notes += found.notes
        if self.latency_budget is not None:
            found = for_seconds(scheme, self.latency_budget, parts.held_out, context)
            scheme = found.scheme
            notes += found.notes
            trade_offs += found.trade_offs
        if self.max_drop is not None:
            held = guarded(scheme, original, parts.held_out, context, self.max_drop)
            scheme = held.scheme
            notes += held.notes
            trade_offs += held.trade_offs
        return scheme, notes, trade_offs


def joined(
    program: Program, folded: PassResult, written: PassResult, notes: Sequence[str], trade_offs: Sequence[TradeOff]
) -> PassResult:
    """The account of both steps; folds alone are not what was asked for."""
    declined = (*folded.declined, *written.declined)
    notes = (*folded.notes, *notes, *written.notes)
    if not written.rewrites:
        if not declined:
            notes = (*notes, "no product with a constant weight was found, so that nothing is done")
        return PassResult(program, declined=declined, notes=notes, trade_offs=tuple(trade_offs))
    return replace(
        written,
        rewrites=(*folded.rewrites, *written.rewrites),
        declined=declined,
        notes=notes,
        trade_offs=tuple(trade_offs),
    )
