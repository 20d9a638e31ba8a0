"""Linears and matrix products with constant weights as products with weights of 1 to 8 bits.

Before: q = linear(x, wq, bq); k = linear(x, wk)
After:  t = lut_build(x); q = lut_gemv(t, codes, scale, zero, bq); k = lut_gemv(t, ...)

With a fixed number of more than four rows the products are `wq_gemm`.

Float weights are rounded as the options say. Weights that are codes already are lowered as they are, whatever the
options: `dequantize` and `dequantize_lookup` of constants, as `quantize{weights=int4}` makes them, and MatMulNBits and
DequantizeLinear of ONNX files. Activations become int8 with a scale for each group of each row, once for all that read
them; sums within a group are exact.

With `size-budget` every layer gets its own number of bits: the layers that mind it least get fewest, until all weights
take that share of their float32 bytes.

Calibration inputs, for `awq` and `gptq`, are those of the program as it is, on the data for fitting or, without data,
the examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from graphopt.contract import Pass, PassContext, PassResult
from graphopt.data.dataset import Sample, View
from graphopt.errors import UsageError
from graphopt.low_bit.grids import Grid, Kind
from graphopt.low_bit.weight import LEAST_GROUP, LowBitWeight
from graphopt.operators.low_bit import MOST_LOOKED_UP
from graphopt.passes.lut_matmul.account import describe
from graphopt.passes.lut_matmul.budget import FEWEST, bits_within
from graphopt.passes.lut_matmul.encoding import Encoder, Encoding, Form, Inputs, Quantizer
from graphopt.passes.lut_matmul.layers import TARGETS, find_layers
from graphopt.passes.lut_matmul.writing import write
from graphopt.passes.quantize.ignoring import ignored_nodes
from graphopt.passes.quantize.quantization import joined
from graphopt.passes.quantize.scaling import Scaling
from graphopt.program import Program

_OWN_BITS: Mapping[Kind, int] = {"ternary": 2, "sign": 1}
_ANY_BITS = ("affine", "odd")
_CODEBOOKS = ("nf4", "fp4")


@dataclass(frozen=True)
class LutMatmul(Pass):
    """Store weights of linears and matrix products in 1 to 8 bits, and multiply by the codes."""

    name = "lut-matmul"
    preserves = "quantized"
    bits: int | None = None
    grid: Literal["affine", "odd", "ternary", "sign", "nf4", "fp4"] = "affine"
    group_size: int = 128
    quantizer: Quantizer = "nearest"
    kernel: Literal["auto", "lut", "unpack", "amx"] = "auto"
    table: Literal["exact", "int8"] = "exact"
    min_size: int = 4096
    activation_order: bool = False
    ignored: tuple[str, ...] = ()
    size_budget: float | None = None

    def __post_init__(self) -> None:
        Grid(self.grid, self._bits())
        if self.group_size < LEAST_GROUP:
            raise UsageError(f"group-size={self.group_size} must be {LEAST_GROUP} or more")
        if self.activation_order and self.quantizer != "gptq":
            raise UsageError("activation-order is of quantizer=gptq; give that, or leave it out")
        if self.grid in _CODEBOOKS and (self.table == "int8" or self.kernel == "lut"):
            raise UsageError(
                f"tables of activations sum bits of codes, and grid={self.grid} has a codebook; leave them out"
            )
        if self.table == "int8" and self.group_size % 4:
            raise UsageError("table=int8 sums four activations; give a group-size that is a multiple of 4")
        if self.table == "int8" and self.kernel not in ("auto", "lut"):
            raise UsageError(f"kernel={self.kernel} multiplies codes, and table=int8 is looked up; give one of the two")
        if self.table == "exact" and self.kernel == "lut" and self._bits() > MOST_LOOKED_UP:
            raise UsageError(
                f"kernel=lut looks exact sums up for 1 to {MOST_LOOKED_UP} bits; give bits, table=int8 or kernel=auto"
            )
        if self.size_budget is not None:
            self._check_budget(self.size_budget)

    def _check_budget(self, share: float) -> None:
        if share <= 0:
            raise UsageError(f"size-budget={share:g} must be over 0")
        if self.grid not in _ANY_BITS or self._bits() <= FEWEST:
            raise UsageError(
                f"size-budget chooses bits from {FEWEST} up to bits; give grid=affine or odd, and more bits"
            )

    def _bits(self) -> int:
        return _OWN_BITS.get(self.grid, 4) if self.bits is None else self.bits

    def starts_at(self) -> frozenset[Any]:
        return frozenset(TARGETS)

    def run(self, program: Program, context: PassContext) -> PassResult:
        samples, choosing, notes = self._samples(program, context)
        encoding = Encoding(self.grid, self.group_size, self.quantizer, self.activation_order)
        folded = PassResult(program)
        if self.quantizer == "awq":
            form = Form(Grid(self.grid, self._bits()), encoding)
            folded = Scaling(power_of_two=False).searched(program, context, samples, form)
        now = folded.program
        left = {name: f"ignored={entry} names it" for name, entry in ignored_nodes(now, self.ignored).items()}
        found = find_layers(now, self.min_size, left)
        floats = {name: layer for name, layer in found.layers.items() if layer.held is not None}
        inputs = Inputs(now, samples, {name: found.sources[name] for name in floats})
        encoder = Encoder(encoding, inputs)
        bits = dict.fromkeys(floats, self._bits())
        if self.size_budget is not None and choosing is not None:

            def write_alone(weights: Mapping[str, LowBitWeight]) -> Program:
                return write(now, found, weights, self.table, self.kernel, PassContext()).program

            bits, note = bits_within(self.size_budget, self._bits(), floats, encoder, write_alone, choosing, context)
            notes.append(note)
        weights: dict[str, LowBitWeight] = {}
        for number, (name, layer) in enumerate(found.layers.items()):
            context.progress("lut-matmul: weights", number, len(found.layers))
            weights[name] = layer.low or encoder.encode(name, layer, bits[name])
        written = write(now, found, weights, self.table, self.kernel, context)
        notes += describe(written, found, weights, inputs, self.table, self.kernel, self.quantizer)
        return joined(program, folded, written, notes, ())

    def _samples(self, program: Program, context: PassContext) -> tuple[Iterable[Sample], View | None, list[str]]:
        """What inputs of layers are taken from, what bits are chosen by, and notes."""
        if context.data is not None:
            if self.size_budget is None:
                return context.data.fit, None, []
            parts = context.data.for_fitting()
            return parts.fit, parts.held_out, []
        if self.size_budget is not None:
            raise UsageError("size-budget is judged on data; give data")
        note = (
            "there is no data: inputs of layers are those of the examples alone; give data of the kind that will come"
        )
        return [Sample(tuple(program.examples))], None, [note] if self.quantizer in ("awq", "gptq") else []
