"""What the manifest says of a low-bit product in words: which instructions make it, why, and what is slow about it."""

from __future__ import annotations

from graphopt.backends.rules.low_bit_codes import Operands
from graphopt.backends.rules.low_bit_nibbles import Nibbles
from graphopt.backends.table_instructions import ENTRIES, looks_up_one_by_one
from graphopt.backends.target import Target
from graphopt.runtime.manifest import SLOW, WHY

LOOKED_UP, TAKEN_APART, TILES = "sums looked up", "bits taken apart", "tiles of int8"  # what products are made of
_MOST_PADDED = 2  # times as many numbers as the weight has


def account(operands: Operands, target: Target, products: str, reason: str) -> dict[str, str]:
    """Entries of a configuration, for `products` that are one of these or several."""
    names = {
        LOOKED_UP: _look_ups(target, isinstance(operands.layout, Nibbles)),
        TAKEN_APART: _multiplication(target),
        TILES: "TDPBSUD",
    }
    used = ", ".join(f"{name} with {names[name]}" for name in products.split("; "))
    bits = operands.layout.bits
    found = {WHY: f"{bits} bit{'s' * (bits > 1)}: {used}; {reason}"}
    return {**found, SLOW: slow} if (slow := "; ".join(_slow(operands, target))) else found


def _look_ups(target: Target, nibbles: bool) -> str:
    if not nibbles:
        return "VPERMB and VPDPBUSD"
    return "TBL and SADDL" if target.machine == "aarch64" else "VPSHUFB and VPMADDUBSW"


def _multiplication(target: Target) -> str:
    if target.machine == "aarch64":
        return {"uint8": "USDOT", "int8": "SDOT"}.get(str(target.quads), "SMULL")
    return "VPDPBUSD" if target.quads else "VPMADDUBSW"


def _slow(operands: Operands, target: Target) -> list[str]:
    layout, found = operands.layout, []
    times = layout.packed_k * layout.panels * layout.outputs / (layout.n * layout.k)
    if times > _MOST_PADDED:
        found.append(
            f"{times:.1f} times the numbers of the weight: {layout.n} outputs fill panels of {layout.outputs}, groups "
            f"of {layout.group} fill {layout.depth}"
        )
    if operands.book is not None and int(operands.book.shape[0]) == ENTRIES and looks_up_one_by_one(target):
        found.append(f"the {ENTRIES} numbers of codebooks are loaded one by one")
    return found
