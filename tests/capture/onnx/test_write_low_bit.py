"""Products with weights in few bits as ONNX: the same numbers in ONNX Runtime, and from the file read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

import graphopt
from graphopt.contract import PassContext
from graphopt.errors import UsageError
from graphopt.low_bit import Grid, place_weights, rounded
from graphopt.passes.lut_matmul import LutMatmul
from tests.passes.checking import captured, targets


class Two(nn.Module):
    """A linear of 80 inputs, whose last group is short, and a product without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(80, 64), nn.Parameter(torch.randn(64, 48) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)) @ self.second


def lowered(open_rows: bool, **options: Any) -> Any:
    torch.manual_seed(0)
    program = captured(Two().eval(), torch.randn(5, 80), dynamic={"x": {0: "rows"}} if open_rows else None)
    return LutMatmul(min_size=1, **options).run(program, PassContext()).program


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("open_rows", [False, True])
@pytest.mark.parametrize(
    ("options", "nodes"),
    [
        ({"bits": 4}, 2), ({"bits": 2}, 2), ({"bits": 8}, 2), ({"bits": 3}, 2), ({"grid": "ternary"}, 2),
        ({"grid": "odd", "bits": 4}, 2), ({"grid": "nf4"}, 0), ({"bits": 4, "group_size": 48}, 0),
    ],
)  # fmt: skip
def test_onnx_runtime_gives_the_same(options: dict[str, Any], nodes: int, open_rows: bool, tmp_path: Path) -> None:
    program = lowered(open_rows, **{"group_size": 32, **options})
    path = tmp_path / "low.onnx"
    program.to_onnx(str(path))
    model = onnx.load(str(path))
    assert sum(node.op_type == "MatMulNBits" for node in model.graph.node) == nodes
    for x in (program.examples[0], torch.randn(5, 80) * 3):
        (wanted,) = program(x)
        torch.testing.assert_close(run(path, x), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    again = graphopt.capture(str(path))
    (wanted,) = program(*program.examples)
    torch.testing.assert_close(again(*program.examples)[0], wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_codes_are_packed_in_the_file(tmp_path: Path) -> None:
    lowered(False, bits=4, group_size=16).to_onnx(str(tmp_path / "low.onnx"))
    held = {tuple(tensor.dims) for tensor in onnx.load(str(tmp_path / "low.onnx")).graph.initializer}
    assert {(64, 5, 8), (64, 3), (48, 4, 8), (48, 2)} <= held


def test_weights_of_a_file_are_lowered_as_they_are(tmp_path: Path) -> None:
    """MatMulNBits that was written here, read as codes again; activations are rounded in the same groups once more."""
    program = lowered(False, bits=4, group_size=32)
    program.to_onnx(str(tmp_path / "low.onnx"))
    again = graphopt.capture(str(tmp_path / "low.onnx"))
    result = LutMatmul(min_size=1, bits=2).run(again, PassContext())
    assert len(result.rewrites) == 2 and "codes as they were" in result.notes[1]
    (wanted,) = program(*program.examples)
    torch.testing.assert_close(result.program(*program.examples)[0], wanted, rtol=1e-4, atol=1e-4)


def test_matmul_of_few_bits_is_lowered_as_it_is(tmp_path: Path) -> None:
    """A file as ONNX Runtime's quantizer writes it: two codes a byte, zero points likewise."""
    generator = np.random.default_rng(0)
    codes, zeros = generator.integers(0, 16, (64, 2, 32), np.uint8), generator.integers(0, 16, (64, 2), np.uint8)
    scales = generator.random((64, 2), np.float32)
    held = {
        "codes": codes[:, :, ::2] | codes[:, :, 1::2] << 4,
        "scales": scales.reshape(-1),
        "zeros": zeros[:, 0] | zeros[:, 1] << 4,
    }
    node = helper.make_node(
        "MatMulNBits", ["x", *held], ["y"], domain="com.microsoft", K=64, N=64, bits=4, block_size=32
    )
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3, 64]) for name in "xy"]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in held.items()]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "few", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), tmp_path / "n.onnx")
    program = graphopt.capture(str(tmp_path / "n.onnx"))
    result = LutMatmul().run(program, PassContext())
    assert len(result.rewrites) == 1 and "codes as they were" in result.notes[1]
    numbers = (codes.astype(np.float32) - zeros[:, :, None]) * scales[:, :, None]
    x = torch.randn(3, 64)
    wanted = x @ torch.from_numpy(numbers.reshape(64, 64)).t()
    found = result.program(x)[0]
    assert float((found - wanted).square().sum() / wanted.square().sum()) < 1e-4


def test_blocks_of_dequantize_linear_are_lowered_as_they_are(tmp_path: Path) -> None:
    """Weights put in by name are written as DequantizeLinear with blocks, where zero points are whole."""
    torch.manual_seed(0)
    program = captured(nn.Linear(64, 64).eval(), torch.randn(3, 64))
    weight = rounded(program.graph_module.state_dict()["weight"], Grid("affine", 4), 32)
    place_weights(program, {"weight": weight}).to_onnx(str(tmp_path / "w.onnx"))
    nodes = onnx.load(str(tmp_path / "w.onnx")).graph.node
    assert "DequantizeLinear" in {node.op_type for node in nodes}
    again = graphopt.capture(str(tmp_path / "w.onnx"))
    result = LutMatmul().run(again, PassContext())
    assert "graphopt.lut_gemv" in targets(result.program)
    held = [item for item in result.program.graph_module.state_dict().values() if item.dtype == torch.uint8]
    assert len(result.rewrites) == 1 and any(torch.equal(item, weight.codes) for item in held)


def test_tables_have_no_form(tmp_path: Path) -> None:
    program = lowered(True, bits=2, group_size=32, table="int8")
    with pytest.raises(UsageError, match=r"write what lut-matmul\{table=exact\} makes"):
        program.to_onnx(str(tmp_path / "low.onnx"))
