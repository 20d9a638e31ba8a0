"""What may be chosen for fused attention: the tile, and how many keys a block has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphopt.backends.bfloat16 import BFLOAT16
from graphopt.backends.choice import UNUSUAL, Choice, epilogue_parameters, size_parameter
from graphopt.backends.kernel import Code
from graphopt.backends.target import Target
from graphopt.backends.tuner.record import Workload
from graphopt.backends.values import View

RULE = "fused-attention"
_BLOCK = 256  # keys of one block, about
_TOLERANCE = 1e-5  # of the largest result: between blocks of different sizes


@dataclass(frozen=True)
class Configuration:
    """What may be chosen: a tile of query rows x vectors of keys, or of values, and keys of a block.

    Rows and vectors change no result; blocks change how large the exponents are that sums are carried on with.
    """

    rows: int
    vectors: int
    block: int


def configure(target: Target) -> Configuration:
    """The default."""
    return Configuration(8 if target.lanes == 16 else 6, 2, _BLOCK)


def is_one_block(k: View, choice: Configuration) -> bool:
    """Whether the keys [B, G, T, D] are known to be one block, so that no unfinished row is kept in the output."""
    return isinstance(k.shape[2], int) and k.shape[2] <= choice.block


def worth_timing(target: Target) -> list[Configuration]:
    """Tiles whose sums, vectors of keys and broadcasts fit the registers, those with the least loads first."""
    found = []
    for vectors in (1, 2, 3, 4):
        columns = vectors * target.lanes
        for rows in (2, 4, 6, 8, 12, 16):
            if rows * vectors + vectors + 2 > target.registers or rows * vectors < target.registers // 4:
                continue
            loads = (rows + 2.5 * vectors) / (rows * vectors)
            found += [
                (loads * (1 if keys == _BLOCK else UNUSUAL), rows, vectors, keys // columns * columns)
                for keys in (_BLOCK, _BLOCK // 2, 2 * _BLOCK)
            ]
    return [Configuration(*choice) for _, *choice in sorted(found)]


def offer(
    q: View,
    k: View,
    v: View,
    mask: View | None,
    causal: bool,
    end: Any,
    target: Target,
    write: Callable[[Configuration], Code],
) -> Choice[Configuration]:
    """What may be chosen for the attention of these, followed by the tree `end`, which `write` writes.

    One row has another kernel; results of pairs of bfloat16 are rounded at the end of the one block that they need.
    """
    batch, heads, rows, depth = q.shape
    parameters = {
        **{"batch": size_parameter(batch), "heads": size_parameter(heads), "groups": size_parameter(k.shape[1])},
        **{"rows": size_parameter(rows), "keys": size_parameter(k.shape[2])},
        **{"depth": size_parameter(depth), "value_depth": size_parameter(v.shape[3])},
        "mask": "causal" if causal else "none" if mask is None else f"{mask.dtype} {_spread(mask)}",
        "apart": all(view.contiguous for view in (q, k, v)),
    }
    return Choice(
        Workload.of(RULE, {**parameters, **epilogue_parameters(end)}),
        configure(target),
        lambda: () if rows == 1 or q.dtype == BFLOAT16 else worth_timing(target),
        write,
        _TOLERANCE,
    )


def _spread(mask: View) -> str:
    """Along which axes of the scores a mask differs."""
    axes = zip(mask.shape, mask.strides, strict=True)
    names = ("batch", "heads", "rows", "keys")[4 - len(mask.shape) :]
    return ",".join(name for name, (size, stride) in zip(names, axes, strict=True) if size != 1 and stride != 0)
