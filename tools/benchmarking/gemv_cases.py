"""The cases of `--suite gemv`: a weight of few bits times rows of activations, one matrix or a chain of many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from graphopt.program import Program

Array = np.ndarray[Any, Any]

STREAMED = 1 << 30  # bytes of packed weights that a streaming case passes over, at least
GROUP = 128


@dataclass(frozen=True)
class Grid:
    """Codes below `codes` in `bits`, whose number is scale * (code - zero); beside ONNX Runtime's of `peer` bits."""

    bits: int
    codes: int
    zero: float
    peer: int
    resident: float  # times the peer's speed that is wanted of one matrix


GRIDS: Mapping[str, Grid] = MappingProxyType(
    {
        "w4": Grid(4, 16, 8.0, 4, 1.1),
        "w3": Grid(3, 8, 4.0, 4, 1.1),
        "w2": Grid(2, 4, 2.0, 2, 1.8),
        "w1.58": Grid(2, 3, 1.0, 2, 1.8),
        "w1": Grid(1, 2, 0.5, 2, 2.5),
    }
)
SHAPES = ((4096, 4096), (11008, 4096))


@dataclass(frozen=True)
class GemvCase:
    """y = x W^T, W [n, k] in groups; `streaming`: the next layer's x are the first k of y, over many matrices."""

    title: str
    grid: Grid
    n: int
    k: int
    rows: int = 1
    streaming: bool = False

    @property
    def layer_bytes(self) -> int:
        """Of a packed matrix with its scales, which float16 has exactly."""
        return self.n * self.k * self.grid.bits // 8 + 2 * self.n * self.k // GROUP

    @property
    def layers(self) -> int:
        return -(-STREAMED // self.layer_bytes) if self.streaming else 1

    @property
    def wanted(self) -> float:
        """How many times the peer's speed."""
        return self.grid.resident if self.rows == 1 and not self.streaming else 1.0

    def codes(self) -> Array:
        """[n + layers - 1, k]: layer l has the n rows from l on, so that all differ and take the memory of one."""
        generator = np.random.default_rng(0)
        codes: Array = generator.integers(0, self.grid.codes, (self.n + self.layers - 1, self.k), dtype=np.uint8)
        return codes

    def scales(self, layer: int, codes: int | None = None) -> Array:
        """[n, groups], such that results are about as large as activations: the codes are below `codes`."""
        step = (12 / ((codes or self.grid.codes) ** 2 - 1) / self.k) ** 0.5
        generator = np.random.default_rng(layer + 1)
        near: Array = step * generator.uniform(0.9, 1.1, (self.n, self.k // GROUP))
        return near.astype(np.float16).astype(np.float32)

    def program(self) -> Program:
        import torch
        from torch import Tensor, nn

        import graphopt
        from graphopt.operators import low_bit  # noqa: F401 - the operators

        case, build, multiply = self, torch.ops.graphopt.lut_build, torch.ops.graphopt.lut_gemv
        base = torch.from_numpy(self.codes())

        class Layers(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                parts = [base[layer : layer + case.n] for layer in range(case.layers)]
                self.weights = nn.ParameterList([nn.Parameter(part, False) for part in parts])
                scales = [torch.from_numpy(case.scales(layer)) for layer in range(case.layers)]
                self.scales = nn.ParameterList([nn.Parameter(scale, False) for scale in scales])
                self.zero = nn.Parameter(torch.full((case.n, case.k // GROUP), case.grid.zero), False)

            def forward(self, x: Tensor) -> Tensor:
                for weight, scale in zip(self.weights, self.scales, strict=True):
                    built = build(x[:, : case.k], GROUP)
                    x = multiply(*built, weight, scale, self.zero, None, None, case.grid.bits, GROUP)
                return x

        x = torch.randn(self.rows, self.k, generator=torch.Generator().manual_seed(0))
        return graphopt.capture(Layers(), (x,), name="gemv")

    def write_onnx(self, path: Path) -> None:
        """The same layers of MatMulNBits with the peer's bits; the same numbers where its grid is the same."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        bits, blocks = self.grid.peer, self.k // GROUP
        codes, below = self.codes(), self.grid.codes
        if bits != self.grid.bits:
            below = 1 << bits
            drawn: Any = np.random.default_rng(0).integers(0, below, codes.shape, dtype=np.uint8)
            codes = drawn
        each = 8 // bits
        lanes = codes.reshape(len(codes), blocks, -1, each)
        shifted: Array = lanes << (np.arange(each) * bits).astype(np.uint8)
        packed: Array = shifted.sum(-1, dtype=np.uint8)
        nodes, weights, x = [], [], "x"
        if self.n != self.k:
            bounds = {"begin": 0, "end": self.k, "axis": 1}
            weights += [numpy_helper.from_array(np.array([at], np.int64), name) for name, at in bounds.items()]
        options: dict[str, Any] = {"K": self.k, "N": self.n, "bits": bits, "block_size": GROUP, "accuracy_level": 4}
        for layer in range(self.layers):
            if layer and self.n != self.k:
                nodes.append(helper.make_node("Slice", [x, *bounds], [f"x{layer}"]))
                x = f"x{layer}"
            part = np.ascontiguousarray(packed[layer : layer + self.n])
            weights.append(numpy_helper.from_array(part, f"codes{layer}"))
            weights.append(numpy_helper.from_array(self.scales(layer, below), f"scales{layer}"))
            inputs = [x, f"codes{layer}", f"scales{layer}"]
            zeros = self.peer_zeros()
            if zeros is not None:
                weights += [] if layer else [numpy_helper.from_array(zeros, "zeros")]
                inputs.append("zeros")
            x = f"y{layer}"
            nodes.append(helper.make_node("MatMulNBits", inputs, [x], domain="com.microsoft", **options))
        given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [self.rows, self.k])
        result = helper.make_tensor_value_info(x, TensorProto.FLOAT, [self.rows, self.n])
        graph = helper.make_graph(nodes, "gemv", [given], [result], weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))

    def peer_zeros(self) -> Array | None:
        """Packed zero points where they are not the peer's default, half of the codes."""
        if self.grid.bits != self.grid.peer or self.grid.zero == 1 << (self.grid.peer - 1):
            return None
        each, blocks = 8 // self.grid.peer, self.k // GROUP
        byte = sum(int(self.grid.zero) << (self.grid.peer * number) for number in range(each))
        return np.full((self.n, -(-blocks // each)), byte, np.uint8)


def _cases() -> dict[str, GemvCase]:
    found = {}
    for n, k in SHAPES:
        for name, grid in GRIDS.items():
            title = f"{n}x{k} {name}"
            found[f"{n}x{k}-{name}"] = GemvCase(title, grid, n, k)
            found[f"{n}x{k}-{name}-streaming"] = GemvCase(f"{title} streaming", grid, n, k, streaming=True)
            found[f"{n}x{k}-{name}-rows128"] = GemvCase(f"{title} 128 rows", grid, n, k, rows=128)
    return found


CASES = _cases()
