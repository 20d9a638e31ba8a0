"""Models as tf2onnx writes them: data with the channels last, names with colons, shapes computed from slices."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.capture import capture
from tests.capture.onnx.tiny import Array, worst_error


class Graph:
    """Collects nodes and constants; every result has the name of a TensorFlow tensor."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._random = np.random.default_rng(0)

    def add(self, operator: str, *inputs: Any, scope: str = "model", **attributes: Any) -> str:
        """`inputs`: names of tensors or arrays."""
        name = f"StatefulPartitionedCall/{scope}/{operator}_{len(self.nodes)}"
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        self.nodes.append(helper.make_node(operator, names, [f"{name}:0"], name, **attributes))
        return f"{name}:0"

    def constant(self, value: Any) -> str:
        name = f"const_fold_opt__{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def floats(self, *shape: int) -> Array:
        return self._random.normal(size=shape).astype(np.float32) / 4

    def model(self, inputs: list[Any], outputs: dict[str, str], opset: int) -> onnx.ModelProto:
        """`outputs`: name in the file -> name of the tensor."""
        self.nodes += [helper.make_node("Identity", [held], [name], name) for name, held in outputs.items()]
        made = [onnx.ValueInfoProto(name=name) for name in outputs]
        graph = helper.make_graph(self.nodes, "tf2onnx", inputs, made, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)
        model.producer_name = "tf2onnx"
        return onnx.shape_inference.infer_shapes(model)


def first(*values: int) -> Array:
    return np.array(values, np.int64)


def rows_of(graph: Graph, value: str) -> str:
    """The first size as TensorFlow's strided slice of a shape gives it, int32 and one axis long."""
    sizes = graph.add("Cast", graph.add("Shape", value), to=TensorProto.INT32)
    row = graph.add("Slice", sizes, first(0), first(1), first(0))
    return graph.add("Unsqueeze", graph.add("Squeeze", row, axes=[0]), axes=[0])


def reshaped(graph: Graph, value: str, *sizes: int) -> str:
    """To the same number of rows and these other sizes."""
    parts = graph.add("Concat", rows_of(graph, value), np.array(sizes, np.int32), axis=0)
    return graph.add("Reshape", value, graph.add("Cast", parts, to=TensorProto.INT64))


def channels_last(graph: Graph, operator: str, value: str, *weights: Any, **attributes: Any) -> str:
    """An operator of ONNX around which the layout is turned, as for every one of TensorFlow's."""
    inner = graph.add(operator, graph.add("Transpose", value, perm=[0, 3, 1, 2]), *weights, **attributes)
    return graph.add("Transpose", inner, perm=[0, 2, 3, 1])


def normalized(graph: Graph, value: str, channels: int) -> str:
    scale, variance = graph.floats(channels) + 1, graph.floats(channels) ** 2 + 0.5
    statistics = [scale, graph.floats(channels), graph.floats(channels), variance]
    return channels_last(graph, "BatchNormalization", value, *statistics, epsilon=1e-3)


def image_classifier() -> onnx.ModelProto:
    """uint8 pixels [n, 18, 18, 3] through convolutions, a depthwise one among them, to classes and scores."""
    graph = Graph()
    x = graph.add("Cast", "image:0", to=TensorProto.FLOAT, scope="Cast")
    x = graph.add("Sub", graph.add("Mul", x, np.float32(1 / 127.5)), np.full((1, 1, 1, 3), 1, np.float32))
    x = channels_last(graph, "Conv", x, graph.floats(8, 3, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER")
    x = normalized(graph, x, 8)
    x = graph.add("Clip", x, np.float32(0), np.float32(6), scope="re_lu/Relu6")
    x = graph.add("Pad", x, first(0, 1, 1, 0, 0, 1, 1, 0), scope="zero_padding2d")
    x = channels_last(graph, "Conv", x, graph.floats(8, 1, 3, 3), group=8, pads=[0, 0, 0, 0])
    x = graph.add("Add", x, graph.floats(1, 1, 1, 8), scope="depthwise/BiasAdd")
    x = graph.add("Min", graph.add("Max", x, np.float32(0)), np.float32(6), scope="relu6")
    y = channels_last(graph, "Conv", x, graph.floats(8, 8, 1, 1), graph.floats(8), pads=[0, 0, 0, 0])
    x = graph.add("Add", x, graph.add("LeakyRelu", y, alpha=0.3))
    x = channels_last(graph, "MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")
    mean = graph.add("ReduceMean", x, axes=[1, 2], keepdims=0)
    flat = reshaped(graph, x, 5 * 5 * 8)
    hidden = graph.add("Add", graph.add("MatMul", flat, graph.floats(200, 8), scope="dense"), graph.floats(8))
    hidden = graph.add("Concat", graph.add("Tanh", hidden), mean, axis=-1)
    scores = graph.add("Add", graph.add("MatMul", hidden, graph.floats(16, 5), scope="dense_1"), graph.floats(5))
    outputs = {"Identity:0": graph.add("Softmax", scores), "classes": graph.add("ArgMax", scores, axis=1, keepdims=0)}
    image = helper.make_tensor_value_info("image:0", TensorProto.UINT8, ["unk__7", 18, 18, 3])
    return graph.model([image], outputs, 11)


def layer_norm(graph: Graph, value: str, width: int) -> str:
    mean = graph.add("ReduceMean", value, axes=[-1], keepdims=1, scope="moments/mean")
    centred = graph.add("Sub", value, mean, scope="moments/SquaredDifference")
    square = graph.add("Mul", centred, centred, scope="moments/SquaredDifference")
    variance = graph.add("ReduceMean", square, axes=[-1], keepdims=1, scope="moments/variance")
    root = graph.add("Sqrt", graph.add("Add", variance, np.float32(1e-6)), scope="batchnorm/Rsqrt")
    factor = graph.add("Mul", graph.add("Reciprocal", root), graph.floats(width) + 1, scope="batchnorm/mul")
    rest = graph.add("Sub", graph.floats(width), graph.add("Mul", mean, factor), scope="batchnorm/sub")
    return graph.add("Add", graph.add("Mul", value, factor, scope="batchnorm"), rest, scope="batchnorm/add_1")


def dense(graph: Graph, value: str, before: int, after: int) -> str:
    """Rows are put together for the product and taken apart by sizes that are computed."""
    flat = graph.add("Reshape", value, first(-1, before), scope="Tensordot")
    product = graph.add("MatMul", flat, graph.floats(before, after), scope="Tensordot/MatMul")
    sizes = graph.add("Cast", graph.add("Shape", value), to=TensorProto.INT32)
    free = graph.add("Gather", sizes, np.array([0, 1], np.int32), axis=0, scope="Tensordot/GatherV2")
    shape = graph.add("Concat", free, np.array([after], np.int32), axis=0, scope="Tensordot/concat")
    back = graph.add("Reshape", product, graph.add("Cast", shape, to=TensorProto.INT64), scope="Tensordot")
    return graph.add("Add", back, graph.floats(after), scope="BiasAdd")


def text_encoder() -> onnx.ModelProto:
    """int32 ids [n, s] and their mask through one layer of a transformer, pooled by the first token."""
    graph = Graph()
    x = graph.add("Gather", graph.floats(40, 16), "ids:0", scope="word_embeddings")
    length = graph.add(
        "Squeeze", graph.add("Slice", graph.add("Shape", "ids:0"), first(1), first(2), first(0)), axes=[0]
    )
    places = graph.add("Range", np.int64(0), length, np.int64(1))
    x = graph.add("Add", x, graph.add("Gather", graph.floats(32, 16), places, scope="position_embeddings"))
    x = layer_norm(graph, x, 16)
    mask = graph.add("Cast", graph.add("Unsqueeze", "mask:0", axes=[1, 2]), to=TensorProto.FLOAT)
    low = graph.add("Mul", graph.add("Sub", np.float32(1), mask), np.float32(-10000))

    def heads(value: str, *order: int) -> str:
        sizes = graph.add("Cast", graph.add("Shape", value), to=TensorProto.INT32)
        pair = graph.add("Slice", sizes, first(0), first(2), first(0))
        shape = graph.add("Concat", pair, np.array([2, 8], np.int32), axis=0)
        split = graph.add("Reshape", value, graph.add("Cast", shape, to=TensorProto.INT64))
        return graph.add("Transpose", split, perm=list(order))

    query, value = heads(dense(graph, x, 16, 16), 0, 2, 1, 3), heads(dense(graph, x, 16, 16), 0, 2, 1, 3)
    scores = graph.add("MatMul", query, heads(dense(graph, x, 16, 16), 0, 2, 3, 1), scope="MatMul")
    scores = graph.add("Add", graph.add("Mul", scores, np.float32(8**-0.5)), low, scope="attention_mask")
    mixed = graph.add("MatMul", graph.add("Softmax", scores, axis=3), value, scope="MatMul_1")
    joined = reshaped(graph, graph.add("Transpose", mixed, perm=[0, 2, 1, 3]), -1, 16)
    x = layer_norm(graph, graph.add("Add", x, dense(graph, joined, 16, 16)), 16)
    hidden = dense(graph, x, 16, 24)
    erf = graph.add("Erf", graph.add("Mul", hidden, np.float32(0.5**0.5)), scope="Gelu")
    half = graph.add("Mul", hidden, np.float32(0.5), scope="Gelu")
    hidden = graph.add("Mul", half, graph.add("Add", erf, np.float32(1)), scope="Gelu")
    x = layer_norm(graph, graph.add("Add", x, dense(graph, hidden, 24, 16)), 16)
    token = graph.add("Slice", x, first(0, 0, 0), first(2**31 - 1, 1, 2**31 - 1), first(0, 1, 2), scope="strided_slice")
    token = graph.add("Squeeze", token, axes=[1])
    pooled = graph.add("Tanh", graph.add("MatMul", token, graph.floats(16, 16), scope="pooler"))
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT32, ["unk__1", "unk__2"]) for name in ("ids:0", "mask:0")
    ]
    return graph.model(inputs, {"Identity:0": x, "Identity_1:0": pooled}, 12)


def branch(name: str, nodes: list[Any], result: str) -> Any:
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(result, TensorProto.FLOAT, ["n", 4])])


def control_flow() -> onnx.ModelProto:
    """A while loop of a known number of trips, its condition kept as TensorFlow does, and a cond on a value."""
    graph = Graph()
    graph.weights += [
        numpy_helper.from_array(np.array(value, dtype), name)
        for name, value, dtype in (("limit", 3, np.int32), ("one", 1, np.int32), ("zero", 0, np.int32),
                                   ("start", True, np.bool_), ("two", 2.0, np.float32), ("none", 0.0, np.float32))
    ]  # fmt: skip
    body = helper.make_graph(
        [
            helper.make_node("Add", ["while/i:0", "one"], ["while/add:0"]),
            helper.make_node("Mul", ["while/x:0", "two"], ["while/mul:0"]),
            helper.make_node("Add", ["while/mul:0", "x:0"], ["while/sum:0"]),
            helper.make_node("Less", ["while/add:0", "limit"], ["while/cond:0"]),
        ],
        "while",
        [helper.make_tensor_value_info("trip", TensorProto.INT64, []),
         helper.make_tensor_value_info("going", TensorProto.BOOL, []),
         helper.make_tensor_value_info("while/i:0", TensorProto.INT32, []),
         helper.make_tensor_value_info("while/x:0", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("while/cond:0", TensorProto.BOOL, []),
         helper.make_tensor_value_info("while/add:0", TensorProto.INT32, []),
         helper.make_tensor_value_info("while/sum:0", TensorProto.FLOAT, ["n", 4])],
    )  # fmt: skip
    graph.nodes.append(helper.make_node("Loop", ["", "start", "zero", "x:0"], ["count", "grown"], "while", body=body))
    total = graph.add("ReduceSum", "x:0", keepdims=0, scope="Sum")
    condition = graph.add("Greater", total, "none")
    sides = {
        "then_branch": branch("then", [helper.make_node("Relu", ["grown"], ["cond/then:0"])], "cond/then:0"),
        "else_branch": branch("else", [helper.make_node("Neg", ["grown"], ["cond/else:0"])], "cond/else:0"),
    }
    graph.nodes.append(helper.make_node("If", [condition], ["cond:0"], "cond", **sides))
    x = helper.make_tensor_value_info("x:0", TensorProto.FLOAT, ["unk__3", 4])
    return graph.model([x], {"Identity:0": "cond:0"}, 11)


MODELS = {"image": image_classifier, "text": text_encoder, "control flow": control_flow}


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_onnxruntime(name: str) -> None:
    model = MODELS[name]()
    assert worst_error(capture(model), model) < 1e-5


def test_names_and_sizes_are_those_of_the_file() -> None:
    program = capture(image_classifier())
    assert [(spec.name, spec.shape) for spec in program.inputs] == [("image:0", ("unk__7", 18, 18, 3))]
    assert [spec.name for spec in program.outputs] == ["Identity:0", "classes"]


def test_composites_are_one_node_each() -> None:
    targets = [str(node.target) for node in capture(text_encoder()).nodes()]
    counts = {name: targets.count(f"aten.{name}.default") for name in ("linear", "layer_norm", "gelu")}
    assert counts == {"linear": 7, "layer_norm": 3, "gelu": 1}
    assert targets.count("aten.scaled_dot_product_attention.default") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiled(name: str) -> None:
    program = capture(MODELS[name]())
    session = graphopt.compile(program, "cpu").session()
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, program.examples, strict=True)}
    for ours, theirs in zip(session.run(None, feed), program(*program.examples), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)
