"""Small ONNX files with something wrong in them: bytes, types, names, sizes, edges, external data, nesting."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.capture.onnx.tiny import model_of

Mutation = Callable[[random.Random, onnx.ModelProto], None]
OPERATORS = (  # a list of its own, so that a seed stays the same file when operators are added
    "Abs", "ArgMax", "AveragePool", "BatchNormalization", "Cast", "Ceil", "Clip", "Concat", "Constant",
    "ConstantOfShape", "Conv", "ConvTranspose", "CumSum", "DepthToSpace", "Div", "Dropout", "Einsum", "Equal",
    "Expand", "EyeLike", "Flatten", "Gather", "GatherElements", "GatherND", "Gemm", "GlobalAveragePool",
    "GroupNormalization", "Identity", "If", "InstanceNormalization", "LayerNormalization", "LpNormalization",
    "MatMul", "Max", "MaxPool", "Mod", "NonZero", "OneHot", "Pad", "Pow", "RMSNormalization", "Range", "ReduceMax",
    "ReduceProd", "Reshape", "Resize", "ScatterND", "Shape", "Slice", "Softmax", "SpaceToDepth", "Split", "Squeeze",
    "Tile", "Transpose", "Trilu", "Unsqueeze", "Where", "Loop", "LSTM", "com.microsoft.Attention",
    "com.microsoft.FusedConv", "com.microsoft.MultiHeadAttention", "com.example.None",
)  # fmt: skip
HUGE = (2**31, 2**40, 2**62, -1, -(2**62), 0)


def sound() -> onnx.ModelProto:
    """A little of everything: a product, a norm, shape arithmetic, a branch, weights and constants."""
    rng = np.random.default_rng(0)
    node = helper.make_node
    branches = [
        helper.make_graph([node(name, ["h"], [f"{name}_r"])], name, [], [onnx.ValueInfoProto(name=f"{name}_r")])
        for name in ("Relu", "Tanh")
    ]
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("LayerNormalization", ["a", "g", "b"], ["h"], axis=-1, epsilon=1e-5),
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Unsqueeze", ["n", "first"], ["n1"]),
        node("Concat", ["n1", "rest"], ["sizes"], axis=0),
        node("Reshape", ["h", "sizes"], ["v"]),
        node("Transpose", ["v"], ["t"], perm=[0, 2, 1]),
        node("Softmax", ["t"], ["p"], axis=-1),
        node("If", ["yes"], ["c"], then_branch=branches[0], else_branch=branches[1]),
        node("Slice", ["c", "axes", "end", "axes"], ["c1"]),
        node("ReduceMean", ["p", "axes"], ["r"], keepdims=0),
        node("Conv", ["image", "k"], ["f"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Add", ["r", "c1"], ["out"]),
    ]
    weights = {
        "w": rng.normal(size=(4, 6)).astype(np.float32), "g": np.ones(6, np.float32), "b": np.zeros(6, np.float32),
        "k": rng.normal(size=(3, 2, 3, 3)).astype(np.float32), "zero": np.int64(0), "axes": np.array([1]),
        "first": np.array([0]), "end": np.array([3]), "rest": np.array([2, 3]), "yes": np.array(True),
    }  # fmt: skip
    inputs = {"x": ("float32", ("n", 4)), "image": ("float32", (1, 2, 8, 8))}
    return model_of(nodes, inputs, ["p", "c1", "f"], {n: np.asarray(v) for n, v in weights.items()})


def _node(rng: random.Random, model: onnx.ModelProto) -> onnx.NodeProto:
    return rng.choice(model.graph.node)


def _names(model: onnx.ModelProto) -> list[str]:
    held = [proto.name for proto in model.graph.initializer]
    return ["", "nothing", *held, *(name for node in model.graph.node for name in (*node.input, *node.output))]


def rewire(rng: random.Random, model: onnx.ModelProto) -> None:
    node = _node(rng, model)
    if node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(_names(model))


def rename_output(rng: random.Random, model: onnx.ModelProto) -> None:
    node = _node(rng, model)
    node.output[0] = rng.choice(_names(model))


def drop_input(rng: random.Random, model: onnx.ModelProto) -> None:
    node = _node(rng, model)
    if node.input:
        node.input.pop(rng.randrange(len(node.input)))


def add_input(rng: random.Random, model: onnx.ModelProto) -> None:
    _node(rng, model).input.extend(rng.choices(_names(model), k=rng.randint(1, 4)))


def shuffle_nodes(rng: random.Random, model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)
    rng.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def other_operator(rng: random.Random, model: onnx.ModelProto) -> None:
    node = _node(rng, model)
    name = rng.choice(OPERATORS)
    node.domain, _, node.op_type = name.rpartition(".")


def change_attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    node = _node(rng, model)
    if not node.attribute:
        return
    entry = rng.choice(node.attribute)
    kind = rng.randrange(5)
    if kind == 0:
        entry.i = rng.choice([*HUGE, 1, 7])
    elif kind == 1:
        entry.ints.extend(rng.choices(HUGE, k=2))
    elif kind == 2:
        entry.type = rng.choice(onnx.AttributeProto.AttributeType.values())
    elif kind == 3:
        entry.name = rng.choice(["axis", "perm", "to", "mode", "\x00", "x" * 5000])
    else:
        entry.ints[:] = [rng.choice([-3, 0, 1, 2, 99, *HUGE]) for _ in entry.ints]


def new_attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    _node(rng, model).attribute.append(
        helper.make_attribute(rng.choice(["axis", "keepdims", "group"]), rng.choice(HUGE))
    )


def change_weight(rng: random.Random, model: onnx.ModelProto) -> None:
    proto = rng.choice(model.graph.initializer)
    kind = rng.randrange(6)
    if kind == 0:
        proto.data_type = rng.choice([*TensorProto.DataType.values(), 99])
    elif kind == 1:
        proto.dims[:] = [rng.choice([*HUGE, 2, 3]) for _ in range(rng.randint(0, 4))]
    elif kind == 2:
        proto.raw_data = proto.raw_data[: rng.randrange(len(proto.raw_data) + 1)]
    elif kind == 3:
        proto.name = rng.choice(_names(model))
    elif kind == 4 and proto.data_type == TensorProto.INT64:
        count = len(proto.raw_data) // 8
        proto.raw_data = np.array(rng.choices([*HUGE, 1, 5, -7], k=count)).tobytes()
    else:
        proto.data_location = TensorProto.EXTERNAL
        place = rng.choice(["../../etc/passwd", "/etc/passwd", "none", "", "\x00", "."])
        for key, value in (("location", place), ("offset", str(rng.choice(HUGE))), ("length", str(rng.choice(HUGE)))):
            proto.external_data.add(key=key, value=value)


def change_interface(rng: random.Random, model: onnx.ModelProto) -> None:
    kind = rng.randrange(5)
    dims = model.graph.input[rng.randrange(2)].type.tensor_type.shape.dim
    if kind == 0 and dims:
        dims[0].dim_value = rng.choice(HUGE)
    elif kind == 1 and dims:
        dims[-1].dim_param = rng.choice(["n", "n + 1", "n * 10**9", "__import__('os')", "\x00", "n" * 5000, "1/0"])
    elif kind == 2:
        model.graph.input[0].type.tensor_type.elem_type = rng.choice([*TensorProto.DataType.values(), 99])
    elif kind == 3:
        del dims[:]
    else:
        model.graph.output.append(onnx.ValueInfoProto(name=rng.choice(_names(model))))


def nest(rng: random.Random, model: onnx.ModelProto) -> None:
    """Branches within branches, more than any model has."""
    inner = helper.make_graph([helper.make_node("Relu", ["h"], ["r"])], "g", [], [onnx.ValueInfoProto(name="r")])
    for _ in range(rng.choice([3, 30, 90])):
        node = helper.make_node("If", ["yes"], ["r"], then_branch=inner, else_branch=inner)
        inner = helper.make_graph([node], "g", [], [onnx.ValueInfoProto(name="r")])
        if inner.ByteSize() > 1 << 20:
            break
    for node in model.graph.node:
        if node.op_type == "If" and node.attribute:
            node.attribute[0].g.CopyFrom(inner)


def change_opset(rng: random.Random, model: onnx.ModelProto) -> None:
    model.opset_import[0].version = rng.choice([0, 7, 11, 12, 13, 18, 23, 99, 2**40])


MUTATIONS: tuple[Mutation, ...] = (
    rewire, rename_output, drop_input, add_input, shuffle_nodes, other_operator, change_attribute, new_attribute,
    change_weight, change_interface, nest, change_opset,
)  # fmt: skip


def mutated(seed: int) -> bytes:
    """A file with one to three things wrong, and sometimes with wrong bytes."""
    rng = random.Random(seed)
    model = sound()
    for _ in range(rng.randint(1, 3)):
        rng.choice(MUTATIONS)(rng, model)
    data = bytearray(model.SerializeToString())
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)
