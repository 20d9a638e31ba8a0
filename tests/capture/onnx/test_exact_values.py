"""Numbers on the way into a graph are those of their types, and defaults are the standard's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from graphopt.backends.onnx import prepare
from graphopt.capture import capture
from graphopt.errors import CaptureError
from tests.capture.onnx.tiny import Array, model_of

X = np.array([[1.5, -2.25]], np.float32)
IMAGE = np.arange(24, dtype=np.float32).reshape(1, 1, 4, 6) ** 2
Nodes = Sequence[onnx.NodeProto]


def node(operator: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    domain = attributes.pop("domain", "")
    return helper.make_node(operator, inputs.split(), outputs.split(), domain=domain, **attributes)


def constant(name: str, value: Any) -> onnx.NodeProto:
    return node("Constant", "", name, value=numpy_helper.from_array(np.asarray(value)))


def model(
    nodes: Nodes, x: Array = X, weights: dict[str, Any] | None = None, outputs: str = "y", opset: int = 20
) -> onnx.ModelProto:
    dtype = "float32" if x.dtype.name == "float16" else x.dtype.name
    made = model_of(nodes, {"x": (dtype, x.shape)}, outputs.split(), weights, opset)
    if dtype != x.dtype.name:
        made.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
        for value in made.graph.output:
            value.ClearField("type")
        made.graph.ClearField("value_info")
        made = onnx.shape_inference.infer_shapes(made)
    return made


def runtime(made: onnx.ModelProto, x: Array) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return list(onnxruntime.InferenceSession(made.SerializeToString(), options).run(None, {"x": x}))


def reference(made: onnx.ModelProto, x: Array) -> list[Array]:
    return list(ReferenceEvaluator(made).run(None, {"x": x}))


def agrees(made: onnx.ModelProto, x: Array, theirs: list[Array], tolerance: float = 0.0) -> None:
    for ours, wanted in zip(prepare(made).run([x]), theirs, strict=True):
        assert (ours.dtype, ours.shape) == (wanted.dtype, wanted.shape)
        if tolerance:
            np.testing.assert_allclose(ours, wanted, rtol=tolerance, atol=tolerance)
        else:
            np.testing.assert_array_equal(ours, wanted)


WHOLE = np.array([[5, 7]])
KNOWN: dict[str, tuple[Nodes, Array]] = {
    "Pow has the base's type": (
        [constant("a", [[3]]), constant("b", np.float32(2.5)), node("Pow", "a b", "p"), node("Concat", "x p", axis=1)],
        WHOLE),
    "Mod has the dividend's sign": (
        [constant("a", -7), constant("b", 3), node("Mod", "a b", "m", fmod=1), node("Add", "x m")], WHOLE),
    "ReduceProd of no axes": (
        [constant("a", [2, 3]), node("ReduceProd", "a", "p", noop_with_empty_axes=1), node("Add", "x p")], WHOLE),
    "a float32 as double": (
        [constant("a", np.float32(0.1)), node("Cast", "a", "b", to=11), node("Cast", "x", "z", to=11),
         node("Mul", "z b")], X),
    "a float32 as an integer": (
        [constant("a", np.float32(1e11)), node("Cast", "a", "b", to=7), node("Add", "x b")], WHOLE),
    "Pad of large integers": (
        [constant("a", [0, 1, 0, 0]), constant("b", 2**53 + 1), node("Pad", "x a b")], WHOLE),
}  # fmt: skip


@pytest.mark.parametrize("case", KNOWN)
def test_known_numbers_are_those_of_onnx_runtime(case: str) -> None:
    nodes, x = KNOWN[case]
    made = model(nodes, x)
    agrees(made, x, runtime(made, x))


def test_known_halves_are_rounded() -> None:
    numbers = [constant("a", np.float16(2048)), constant("b", np.float16(1))]
    nodes = [*numbers, node("Add", "a b", "c"), node("Sub", "c a", "d"), node("Add", "x d")]
    x = X.astype(np.float16)
    made = model(nodes, x)
    agrees(made, x, reference(made, x))


def test_half_of_a_size_is_not_its_floor() -> None:
    nodes = [node("Shape", "x", "s"), node("Cast", "s", "f", to=1), constant("two", np.array([2], np.float32)),
             node("Div", "f two", "h"), node("Floor", "h", "w"), node("Equal", "w h", "e"), node("Neg", "x", "z"),
             node("Where", "e x z")]  # fmt: skip
    made = model_of(nodes, {"x": ("float32", ["n"])}, ["y"])
    with pytest.raises(CaptureError):
        capture(made)
    x = np.array([1, 2, 3], np.float32)
    made = model(nodes, x)
    agrees(made, x, runtime(made, x))


RESIZE: dict[str, tuple[dict[str, Any], dict[str, Array]]] = {
    f"{mode} {policy}": (
        {"mode": mode, "keep_aspect_ratio_policy": policy, "axes": [2, 3]},
        {"sizes": np.array([7, 8])},
    )
    for mode in ("nearest", "linear", "cubic") for policy in ("not_larger", "not_smaller")
} | {
    f"{mode} {scales}": ({"mode": mode}, {"scales": np.array([1, 1, *scales], np.float32)})
    for mode in ("nearest", "linear", "cubic") for scales in ((1.2, 2), (1.2, 1.1))
}  # fmt: skip


@pytest.mark.parametrize("case", RESIZE)
def test_images_are_stepped_through_by_the_scale(case: str) -> None:
    attributes, weights = RESIZE[case]
    inputs = "x  scales" if "scales" in weights else "x   sizes"
    made = model([helper.make_node("Resize", inputs.split(" "), ["y"], **attributes)], IMAGE, weights)
    agrees(made, IMAGE, runtime(made, IMAGE), 1e-4)


@pytest.mark.parametrize("name", ["float16", "float32"])
def test_statistics_of_a_norm_are_float32(name: str) -> None:
    x = (np.linspace(-3, 5, 24).reshape(2, 12) ** 3 + 10).astype(name)
    made = model([node("LayerNormalization", "x w b", "y m d")], x, {"w": x[0], "b": x[1]}, "y m d")
    agrees(made, x, runtime(made, x), 1e-5 if name == "float32" else 1e-3)
    mean = prepare(made).run([x])[1]
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize(("operator", "states"), [("Adagrad", 1), ("Adam", 2)])
def test_a_step_of_nothing_is_finite(operator: str, states: int) -> None:
    domain = "ai.onnx.preview.training"
    zeros = {f"s{number}": X * 0 for number in range(states)}
    weights = {"r": np.float32(0.1), "t": np.int64(1), "g": X * 0, **zeros}
    names, results = " ".join(zeros), " ".join(f"y{number}" for number in range(states))
    step = node(operator, f"r t x g {names}", f"y {results}", domain=domain)
    made = model([step], X, weights, f"y {results}")
    made.opset_import.append(helper.make_opsetid(domain, 1))
    for value in made.graph.output:
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, X.shape))
    agrees(made, X, [X, *(X * 0 for _ in zeros)])


def test_rows_of_a_quantized_product_have_scales() -> None:
    x = np.array([[1, 2], [3, 4]], np.int64)
    nodes = [node("Cast", "x", "a", to=TensorProto.INT8), node("QLinearMatMul", "a s z b s z t o")]
    scales = np.array([1, 10], np.float32)
    weights = {
        "s": np.float32(1),
        "z": np.int8(0),
        "b": np.array([[1, 20], [1, 20]], np.int8),
        "t": scales,
        "o": np.array([0, 0], np.int8),
    }
    made = model(nodes, x, weights)
    assert prepare(made).run([x])[0].tolist() == [[3, 60], [1, 14]]


@pytest.mark.parametrize(("dtype", "code"), [("float16", 2), ("float32", 3)])
def test_the_scale_says_how_exact_a_division_is(dtype: str, code: int) -> None:
    """2.5004 is 2.5 in float16, and halves round to even."""
    x = np.array([[2.5004]], np.float32)
    made = model([node("QuantizeLinear", "x s")], x, {"s": np.ones((), dtype)}, opset=23)
    assert prepare(made).run([x])[0].tolist() == [[code]]
