"""Weights of layers in few bits: by rounding, or with regard to the inputs that a layer reads on the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from graphopt.data.accumulators import Accumulator
from graphopt.data.dataset import Sample
from graphopt.data.statistics import observe
from graphopt.low_bit.gptq import Hessian, compensated
from graphopt.low_bit.grids import Grid, Kind
from graphopt.low_bit.rounding import FitSteps, least_error_steps, own_steps, rounded
from graphopt.low_bit.weight import LowBitWeight
from graphopt.operators.low_bit import TABLE_CODES
from graphopt.passes.lut_matmul.layers import Layer
from graphopt.passes.quantize.scaling import Rows
from graphopt.program import Program

Quantizer = Literal["nearest", "mse", "awq", "gptq"]
JUDGED = 8  # samples whose rows tell signal from noise
TABLE_BYTES = 1 << 25  # that a product by tables, as PyTorch has it, takes at once
HESSIAN_BYTES = 1 << 30  # that are held at once, each part summed in a pass over the data


@dataclass(frozen=True)
class Encoding:
    """How float weights become codes; `by_size` is the order of columns that GPTQ takes."""

    kind: Kind
    group: int
    quantizer: Quantizer
    by_size: bool

    @property
    def fit(self) -> FitSteps:
        return own_steps if self.quantizer == "nearest" else least_error_steps


@dataclass(frozen=True)
class Coded:
    """A weight [N, K] of one layer as `scaling` asks for it, in the axes that the layer has."""

    weight: LowBitWeight
    turned: bool

    def numbers(self) -> Tensor:
        found = self.weight.dequantize()
        return found.t() if self.turned else found


@dataclass(frozen=True)
class Form:
    """What a search of scales rounds weights to."""

    grid: Grid
    encoding: Encoding

    def encode(self, weight: Tensor, outputs: int, inputs: int) -> Coded:
        turned = inputs == 0
        value = weight.t() if turned else weight
        return Coded(rounded(value, self.grid, self.encoding.group, self.encoding.fit), turned)


class Inputs:
    """What layers read: some rows of it, and for GPTQ the sums of its products, by the name of the value."""

    def __init__(self, program: Program, samples: Iterable[Sample], sources: Mapping[str, str]) -> None:
        """`sources` are the values' names by layer, in order of execution; samples may be read again."""
        self.program = program
        self.samples = samples
        self.sources = sources
        self.rows = {name: Rows() for name in sources.values()}
        self.hessians: dict[str, Hessian] = {}
        observe(program, {name: [item] for name, item in self.rows.items()}, islice(samples, JUDGED))

    def hessian(self, layer: str) -> Tensor | None:
        """Of what a layer reads, summed together with those that follow it, as far as memory allows; None unreached."""
        name = self.sources[layer]
        if name not in self.hessians:
            part = next(part for part in self._parts() if name in part)
            self.hessians = {item: Hessian() for item in part}
            accumulators: Mapping[str, Sequence[Accumulator]] = {item: [seen] for item, seen in self.hessians.items()}
            observe(self.program, accumulators, self.samples)
        return self.hessians[name].result()

    def _parts(self) -> Iterable[list[str]]:
        """Values whose Hessians fit into HESSIAN_BYTES together."""
        part: list[str] = []
        taken = 0
        for name, rows in self.rows.items():
            size = 8 * rows.kept[0].numel() ** 2 if rows.kept else 0
            if part and taken + size > HESSIAN_BYTES:
                yield part
                part, taken = [], 0
            part.append(name)
            taken += size
        if part:
            yield part

    def decibels(self, layer: str, weight: Tensor, coded: LowBitWeight, table: str) -> float | None:
        """Signal to noise of the layer's result on the rows seen; None where none are, or all are zero.

        Noise is what rounding the weight and rounding x, as `table` says, do together.
        """
        kept = self.rows[self.sources[layer]].kept
        if not kept:
            return None
        x = torch.stack(kept).float()
        wanted = x @ weight.float().t()
        noise = float((coded_product(x, coded, table) - wanted).square().sum())
        power = float(wanted.square().sum())
        if not power:
            return None
        return 10 * math.log10(power / noise) if noise else math.inf


def group_of(weight: LowBitWeight, table: str) -> int:
    """The group that products take: with tables a multiple of the activations that one sums, where there is one group.

    It may exceed the columns then.
    """
    rounds_up = table == "int8" and weight.groups == 1
    return -(-weight.group // TABLE_CODES) * TABLE_CODES if rounds_up else weight.group


def coded_product(x: Tensor, weight: LowBitWeight, table: str) -> Tensor:
    """x [R, K] times the weight [N, K], both rounded as the rewritten layer has them: float32 [R, N]."""
    order = torch.arange(weight.columns) if weight.permutation is None else weight.permutation
    codes, scale, sums = torch.ops.graphopt.lut_build(x[:, order], group_of(weight, table), table)
    if table == "exact":
        rounded_x = torch.empty_like(x)
        rounded_x[:, order] = codes.float() * weight.spread(scale)
        return rounded_x @ weight.dequantize().t()

    def of(part: slice) -> Tensor:
        zero = None if weight.zero is None else weight.zero[part]
        operands = weight.codes[part], weight.scale[part], zero, None, None, weight.bits, group_of(weight, table)
        found: Tensor = torch.ops.graphopt.lut_gemv(codes, scale, sums, *operands, table=table)
        return found

    step = max(1, TABLE_BYTES // (8 * 4 * weight.columns * weight.bits))
    return torch.cat([of(slice(first, first + step)) for first in range(0, weight.rows, step)], 1)


class Encoder:
    """Codes of layers, made once for each weight and number of bits."""

    def __init__(self, encoding: Encoding, inputs: Inputs) -> None:
        self.encoding = encoding
        self.inputs = inputs
        self._made: dict[Any, LowBitWeight] = {}

    def encode(self, name: str, layer: Layer, bits: int) -> LowBitWeight:
        """`layer` in `bits`; without a row of its input GPTQ has nothing to go by and rounds."""
        value = layer.floats()
        key = value.data_ptr(), tuple(value.shape), value.stride(), bits
        if key not in self._made:
            self._made[key] = self._encode(name, layer, Grid(self.encoding.kind, bits))
        return self._made[key]

    def _encode(self, name: str, layer: Layer, grid: Grid) -> LowBitWeight:
        how = self.encoding
        hessian = self.inputs.hessian(name) if how.quantizer == "gptq" else None
        if hessian is None:
            return rounded(layer.floats(), grid, how.group, how.fit)
        return compensated(layer.floats(), hessian, grid, how.group, how.fit, how.by_size)
