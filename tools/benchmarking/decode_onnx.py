"""The decoder as ONNX Runtime runs it best: its own operators for norms, attention with a cache, and 4-bit products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphopt.low_bit.grids import Grid
from graphopt.low_bit.rounding import rounded
from graphopt.tools.benchmarking.llama import Layer, Llama

MICROSOFT = "com.microsoft"
GROUP = 128
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level
_LARGE = 1 << 10  # elements from which tensors are kept beside the file
_EPSILON = 1e-6
Array = np.ndarray[Any, Any]


class DecoderFile:
    """The nodes and weights of a decoder while it is written, its products in 4 bits or, with no grid, in float32.

    Weights are rounded as `lut-matmul` does it, in groups of `GROUP`.
    """

    def __init__(self, module: Llama, grid: Grid | None) -> None:
        self.module, self.shape, self.grid = module, module.shape, grid
        self.nodes: list[Any] = []
        self.tensors: dict[str, Array] = {}

    def write(self, path: Path) -> None:
        """Weights go to a file beside it."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        shape = self.shape
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [1]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []),
        ]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, shape.vocabulary])]
        cache = [1, shape.groups, shape.length, shape.depth]
        for number in range(shape.layers):
            for name in ("key", "value"):
                inputs.append(helper.make_tensor_value_info(f"past.{number}.{name}", TensorProto.FLOAT, cache))
                present = helper.make_tensor_value_info(f"present.{number}.{name}", TensorProto.FLOAT, cache)
                outputs.insert(-1, present)
        self._write_nodes()
        weights = [numpy_helper.from_array(value, name) for name, value in self.tensors.items()]
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.save_model(
            model, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=_LARGE
        )

    def _write_nodes(self) -> None:
        module = self.module
        self._keep("embedding", module.embedding.weight)
        for name in ("cos", "sin"):
            self._keep(name, getattr(module, name))
        x = self._add("Gather", ["embedding", "input_ids"])
        for number, layer in enumerate(module.layers):
            assert isinstance(layer, Layer)
            x = self._layer(x, layer, number)
        self.tensors |= {"from": np.array([-1]), "to": np.array([1 << 62]), "axis": np.array([1])}
        x = self._norm(self._add("Slice", [x, "from", "to", "axis"]), module.norm, "norm")
        self._product(x, module.head, "head", "logits")

    def _layer(self, x: str, layer: Layer, number: int) -> str:
        attention, name = layer.attention, f"layer{number}"
        h = self._norm(x, layer.attention_norm, f"{name}.attention_norm")
        projections = {"query": attention.query, "key": attention.key, "value": attention.value}
        q, k, v = (self._product(h, linear, f"{name}.{what}") for what, linear in projections.items())
        cache = [f"past.{number}.key", f"past.{number}.value"]
        attended = f"{name}.attended"
        self._add(
            "GroupQueryAttention",
            [q, k, v, *cache, "seqlens_k", "total_sequence_length", "cos", "sin"],
            [attended, *(past.replace("past", "present") for past in cache)],
            MICROSOFT,
            num_heads=self.shape.heads,
            kv_num_heads=self.shape.groups,
            do_rotary=1,
        )
        x = self._add("Add", [x, self._product(attended, attention.output, f"{name}.output")])
        h = self._norm(x, layer.hidden_norm, f"{name}.hidden_norm")
        gate = self._product(h, layer.gate, f"{name}.gate")
        up = self._product(h, layer.up, f"{name}.up")
        gated = self._add("Mul", [self._add("Mul", [gate, self._add("Sigmoid", [gate])]), up])
        return self._add("Add", [x, self._product(gated, layer.down, f"{name}.down")])

    def _norm(self, x: str, norm: torch.nn.RMSNorm, name: str) -> str:
        self._keep(name, norm.weight)
        return self._add("SimplifiedLayerNormalization", [x, name], axis=-1, epsilon=_EPSILON, stash_type=1)

    def _product(self, x: str, linear: torch.nn.Linear, name: str, output: str = "") -> str:
        outputs = [output or f"{name}.product"]
        if self.grid is None:
            self._keep(name, linear.weight.t())
            return self._add("MatMul", [x, name], outputs)
        n, k = linear.weight.shape
        low = rounded(linear.weight.detach(), self.grid, GROUP)
        assert low.zero is not None and k % GROUP == 0
        blocks = _in_pairs(low.codes.numpy().reshape(-1, GROUP)).reshape(n, k // GROUP, GROUP // 2)
        self.tensors |= {name: blocks, f"{name}.scale": low.scale.numpy().reshape(-1)}
        self.tensors[f"{name}.zero"] = _in_pairs(low.zero.numpy().astype(np.uint8)).reshape(-1)
        return self._add(
            "MatMulNBits",
            [x, name, f"{name}.scale", f"{name}.zero"],
            outputs,
            MICROSOFT,
            K=k,
            N=n,
            bits=4,
            block_size=GROUP,
            accuracy_level=INT8_ACTIVATIONS,
        )

    def _keep(self, name: str, weight: Any) -> None:
        self.tensors[name] = weight.detach().contiguous().numpy()

    def _add(
        self, kind: str, inputs: list[str], outputs: list[str] | None = None, domain: str = "", **attributes: Any
    ) -> str:
        from onnx import helper

        names = outputs or [f"{kind.lower()}{len(self.nodes)}"]
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names[0]


def _in_pairs(codes: Array) -> Array:
    """uint8 [rows, columns] -> [rows, ceil(columns / 2)], the first of two in the lower half of a byte."""
    padded = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    found: Array = padded[:, ::2] | padded[:, 1::2] << 4
    return found
