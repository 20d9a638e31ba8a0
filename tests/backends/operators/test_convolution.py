"""Convolutions with every option."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Check = Callable[..., None]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                "plain": nn.Conv2d(4, 6, 3),
                "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
                "dilated": nn.Conv2d(4, 5, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
                "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1),
                "depthwise": nn.Conv2d(4, 4, 3, groups=4, padding=1),
                "pointwise": nn.Conv2d(4, 17, 1),
                "same": nn.Conv2d(4, 3, 4, padding="same"),
                "valid": nn.Conv2d(4, 3, 2, padding="valid"),
                "transposed": nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
                "transposed_grouped": nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2, bias=False),
                "unbatched": nn.Conv2d(4, 3, 3),
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        results = {name: layer(x[0] if name == "unbatched" else x) for name, layer in self.layers.items()}
        return results | {"relu": torch.relu(self.layers["plain"](x))}


def test_two_axes(agree: Check) -> None:
    agree(
        Convolutions().eval(), [torch.randn(2, 4, 9, 8)], [{0: "batch"}], [(torch.randn(n, 4, 9, 8),) for n in (1, 3)]
    )


def test_symbolic_image(agree: Check) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3))
    more = [(torch.randn(1, 3, h, w),) for h, w in [(10, 14), (20, 8)]]
    agree(layers.eval(), [torch.randn(1, 3, 12, 16)], [{2: "height", 3: "width"}], more)


def test_one_and_three_axes(agree: Check) -> None:
    one, three = nn.Conv1d(4, 5, 3, padding=1, stride=2), nn.Conv3d(1, 2, 2)
    back = nn.ConvTranspose1d(4, 3, 4, stride=2, padding=1)
    agree(
        {
            "one": lambda x: one(x),
            "three": lambda x: three(x.reshape(2, 1, 4, 4, 4)),
            "transposed": lambda x: back(x),
        },
        [torch.randn(2, 4, 16)],
    )
