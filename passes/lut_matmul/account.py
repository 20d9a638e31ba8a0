"""What weights in few bits take and cost, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.contract import PassResult
from graphopt.low_bit.weight import LowBitWeight
from graphopt.passes.lut_matmul.encoding import Inputs, Quantizer
from graphopt.passes.lut_matmul.layers import Found
from graphopt.passes.lut_matmul.writing import FEW_ROWS, RULE, is_many, table_of

FITTED: frozenset[Quantizer] = frozenset({"awq", "gptq"})


def describe(
    written: PassResult,
    found: Found,
    weights: Mapping[str, LowBitWeight],
    inputs: Inputs,
    table: str,
    kernel: str,
    quantizer: Quantizer,
) -> list[str]:
    """A sentence on all layers that were written, and one on each."""
    names = [item.id.removeprefix(f"{RULE}@") for item in written.rewrites]
    if not names:
        return []
    before = sum(4 * weights[name].codes.numel() for name in names)
    after = sum(weights[name].bytes for name in names)
    bits = f"{32 * after / before:.3g} bits a weight"
    whole = f"{len(names)} weights take {after} bytes instead of {before} in float32, {bits}"
    judged = " on the rows that it was fitted to" if quantizer in FITTED else ""
    each = [_sentence(name, found, weights[name], inputs, table, judged) for name in names]
    many = [name for name in names if is_many(found.layers[name])]
    if many and table == "int8":
        each.append(f"table={table} is for up to {FEW_ROWS} rows; with more, and exact codes: {', '.join(many)}")
    elif many and kernel == "lut":
        each.append(f"kernel=lut is for up to {FEW_ROWS} rows; with more, and kernel=auto: {', '.join(many)}")
    any_count = [name for name in names if found.layers[name].rows is None]
    if any_count and table == "int8":
        each.append(f"table={table} takes row after row; give exact where there may be many: {', '.join(any_count)}")
    return [whole, *each]


def _sentence(name: str, found: Found, weight: LowBitWeight, inputs: Inputs, table: str, judged: str) -> str:
    size = f"{weight.bits_a_weight:.3g} bits a weight, {4 * weight.codes.numel()} -> {weight.bytes} bytes"
    layer = found.layers[name]
    if layer.held is None:
        return f"{name}: {size}, codes as they were"
    decibels = inputs.decibels(name, layer.floats(), weight, table_of(layer, table))
    return f"{name}: {size}" if decibels is None else f"{name}: {size}, SNR of its result{judged} {decibels:.1f} dB"
