"""Convolution on AMX tiles, with filters packed as they want them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from graphopt.backends import amx
from graphopt.backends.kernel import Code
from graphopt.backends.rules.amx_convolution import (
    Configuration,
    TileConvolution,
    pack_filter_tiles,
    runs,
    tile_convolution,
)
from graphopt.backends.rules.windows import Window
from graphopt.backends.sizes import Shape
from graphopt.backends.values import Product, View

if TYPE_CHECKING:
    from graphopt.backends.lowering import Lowering


@dataclass(frozen=True, eq=False)
class Placed:
    """x [N, H, W, C] by filters [O, C, KH, KW] into outputs [N, OH, OW, O]; `outside` is the bits of a padded word."""

    x: View
    filters: torch.Tensor
    outputs: Shape
    window: Window
    outside: int = 0


def on_tiles(lowering: Lowering, placed: Placed, choice: Configuration, result: Product, end: Any, name: str) -> Code:
    window, numbers = placed.window, amx.NUMBERS[placed.x.dtype]
    packed = lowering.weight(
        placed.filters,
        f"amx{runs(window)[0]}",
        lambda array: pack_filter_tiles(array, window, numbers),
    )
    call = TileConvolution(placed.x, packed, placed.outputs, window, placed.outside, choice)
    return tile_convolution(call, result, end, name, lowering.target)
