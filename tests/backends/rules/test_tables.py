"""Tables of 256 entries: every code, on every kind of target, alone and behind a product."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.arrays import array_of
from graphopt.backends import target as targets
from graphopt.backends.table_instructions import table_definitions
from graphopt.capture import capture
from graphopt.operators import integer_elements, integer_products  # noqa: F401
from graphopt.runtime.features import host_features

ops = torch.ops.graphopt
KINDS = ["cpu:x86-64-v3", "cpu:x86-64-v4", "with bytes permuted"]


class Table(nn.Module):
    table: Tensor

    def __init__(self, result: torch.dtype) -> None:
        super().__init__()
        codes = torch.randint(0, 256, (256,), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
        self.register_buffer("table", codes.view(result) if result != torch.float32 else codes.float() / 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = ops.table256(x, self.table)
        return result


class Tables(Table):
    def forward(self, inputs: list[Tensor]) -> Any:  # type: ignore[override]
        return [super(Tables, self).forward(x) for x in inputs]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A target; one that permutes bytes is made of this machine's own, where it can."""
    if request.param != KINDS[-1]:
        return str(request.param)
    if "avx512vbmi" not in host_features():
        pytest.skip("this CPU has no AVX512-VBMI")
    level = targets.LEVELS["cpu:x86-64-v4"]
    monkeypatch.setitem(targets.LEVELS, "cpu:trial", (level[0], (*level[1], "avx512vbmi")))
    return "cpu:trial"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_every_code(kind: str, dtype: torch.dtype) -> None:
    inputs = [
        torch.arange(rows * columns, dtype=torch.int32).reshape(rows, columns).to(torch.uint8).view(dtype)
        for rows, columns in ((1, 256), (4, 64), (3, 600), (7, 37))
    ]
    for result in (torch.uint8, torch.int8, torch.float32):
        module = Tables(result)
        session = graphopt.compile(capture(module, (inputs,)), target=kind, threads=2).session()
        names = [each.name for each in session.get_inputs()]
        found = session.run(None, {name: array_of(x) for name, x in zip(names, inputs, strict=True)})
        for each, x in zip(found, inputs, strict=True):
            assert np.array_equal(each, array_of(Table.forward(module, x)))


def test_a_table_behind_a_product_is_in_its_kernel(kind: str) -> None:
    class Product(Table):
        weight: Tensor

        def __init__(self) -> None:
            super().__init__(torch.uint8)
            generator = torch.Generator().manual_seed(1)
            self.register_buffer("weight", torch.randint(-128, 128, (48, 32), generator=generator).to(torch.int8))
            self.register_buffer("scale", torch.tensor(0.02))

        def forward(self, x: Tensor) -> Tensor:
            s = self.scale
            y = ops.qlinear(x, s, None, self.weight, s, None, s, None, None, None, None, dtype=torch.uint8)
            result: Tensor = ops.table256(y, self.table)
            return result

    x = torch.randint(0, 256, (19, 32), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    module = Product()
    artifact = graphopt.compile(capture(module, (x,)), target=kind, threads=2)
    assert "qlinear_48x32_requantize_table" in artifact.manifest.variants[0].kernels
    assert np.array_equal(artifact.session().run(None, {"x": array_of(x)})[0], array_of(module(x)))


def test_which_instructions_look_up() -> None:
    def of(name: str) -> str:
        return table_definitions(targets.resolve_target(name))

    assert "vpermi2var.qi.512" in of("cpu:sapphirerapids") and "vpermi2var.hi.512" in of("cpu:x86-64-v4")
    assert "neon.tbl4" in of("cpu:aarch64") and "@llvm" not in of("cpu:x86-64-v3")
