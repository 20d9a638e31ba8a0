"""Small ONNX files with something wrong in them: bytes, types, names, sizes, edges, external data, nesting, growth.

`python -m tests.capture.onnx.mutations 10000` reads as many of them and prints what became of them; with `--quick` each
is walked through in this process and read at one choice of sizes, which takes a third of the time.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphopt.capture import Limits, capture
from graphopt.capture.onnx import program, reading
from graphopt.capture.onnx.sizes import hint_choices
from graphopt.errors import GraphoptError
from graphopt.untrusted.onnx_file import check_file
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
    if node.output:
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
        if inner.ByteSize() > 1 << 16:
            break
    for node in model.graph.node:
        if node.op_type == "If" and node.attribute:
            node.attribute[0].g.CopyFrom(inner)


def change_opset(rng: random.Random, model: onnx.ModelProto) -> None:
    model.opset_import[0].version = rng.choice([0, 7, 11, 12, 13, 18, 23, 99, 2**40])


def grow(rng: random.Random, model: onnx.ModelProto) -> None:
    """A few bytes that ask for much: huge results, and arrays, numbers or sizes that double from node to node."""
    node = helper.make_node
    huge = np.array([rng.choice([2**20, 2**31, 2**40, 2**62]) for _ in range(2)])
    model.graph.initializer.append(numpy_helper.from_array(huge, "huge"))
    model.graph.initializer.append(numpy_helper.from_array(huge[0], "much"))
    name = rng.choice(["Expand", "Tile", "ConstantOfShape", "Range", "OneHot", "Pad", "Concat", "Mul", "Add"])
    if name in ("Concat", "Mul", "Add"):
        settings: dict[str, Any] = {"axis": 0} if name == "Concat" else {}
        first = rng.choice(["s", "rest", "huge"])
        chain = [node(name, [first if k == 0 else f"d{k - 1}"] * 2, [f"d{k}"], **settings) for k in range(40)]
        model.graph.node.extend([*chain, node("Reshape", ["h", "d39"], ["grown"])])
    else:
        inputs = {
            "ConstantOfShape": ["huge"], "Range": ["zero", "much", "much"], "OneHot": ["first", "much", "rest"],
            "Pad": ["h", "huge"],
        }.get(name, [rng.choice(["h", "first"]), "huge"])  # fmt: skip
        model.graph.node.append(node(name, inputs, ["grown"]))
    model.graph.node.append(node("Neg", ["grown"], ["grown_more"]))
    model.graph.output.append(onnx.ValueInfoProto(name="grown_more"))


def repeat(rng: random.Random, model: onnx.ModelProto) -> None:
    """Loops, within one another too, that run for long or do not end."""
    trips = rng.choice([0, 3, 50, 10**6, 2**62, -1])
    model.graph.initializer.append(numpy_helper.from_array(np.array(trips), "trips"))
    inner = [helper.make_node(rng.choice(["Relu", "Identity", "Exp"]), ["h"], ["turned"])]
    for depth in range(rng.randint(1, 3)):
        values = [
            helper.make_tensor_value_info(f"{name}_{depth}", kind, [])
            for name, kind in (("trip", TensorProto.INT64), ("going", TensorProto.BOOL))
        ]
        nodes = [*inner, helper.make_node("Identity", [f"going_{depth}"], [f"on_{depth}"])]
        body = helper.make_graph(nodes, "body", values, [onnx.ValueInfoProto(name=f"on_{depth}")])
        inner = [helper.make_node("Loop", ["trips", "yes"], [], body=body)]
    model.graph.node.extend(inner)


def call(rng: random.Random, model: onnx.ModelProto) -> None:
    """Functions of the model's own that call one another: twice each, themselves, or one that is not there."""
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    count = rng.choice([1, 3, 40, 300])
    for index in range(count):
        callee = (
            rng.choice([f"f{index - 1}", f"f{index - 1}", f"f{index}", "missing"]) if count < 40 else f"f{index - 1}"
        )
        node = helper.make_node(callee, ["a"], ["b"], domain="own") if index else helper.make_node("Neg", ["a"], ["b"])
        more = helper.make_node(node.op_type, ["b"], ["c"], domain=node.domain)
        model.functions.append(helper.make_function("own", f"f{index}", ["a"], ["c"], [node, more], versions))
    model.opset_import.append(versions[1])
    model.graph.node.append(helper.make_node(f"f{count - 1}", ["h"], ["called"], domain="own"))
    model.graph.output.append(onnx.ValueInfoProto(name="called"))


def spell_out(rng: random.Random, model: onnx.ModelProto) -> None:
    """Weights as lists of numbers, at times of another type or length."""
    proto = rng.choice(model.graph.initializer)
    plain = (TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL)
    if proto.data_type in plain and proto.data_location != TensorProto.EXTERNAL:
        values = numpy_helper.to_array(proto).ravel().tolist() if proto.raw_data else []
        proto.ClearField("raw_data")
        del values[len(values) - rng.choice([0, 0, 1]) :]
        field = rng.choice(["float_data", "int64_data", "int32_data", "double_data"])
        getattr(proto, field).extend(
            value if "a" in field[:5] or "double" in field else int(value) % 2**31 for value in values
        )


def turn_around(rng: random.Random, model: onnx.ModelProto) -> None:
    """A cycle: a node reads what a node after it makes."""
    first, last = sorted(rng.sample(range(len(model.graph.node)), 2))
    if model.graph.node[first].input and model.graph.node[last].output:
        model.graph.node[first].input[0] = model.graph.node[last].output[0]


def other_kind(rng: random.Random, model: onnx.ModelProto) -> None:
    """Inputs and results that are no tensors, or have types within types."""
    value = rng.choice([*model.graph.input, *model.graph.output])
    kind = value.type
    for _ in range(rng.choice([1, 2, 40])):
        kind = kind.sequence_type.elem_type if rng.random() < 0.5 else kind.optional_type.elem_type
    kind.tensor_type.elem_type = TensorProto.FLOAT


MUTATIONS: tuple[Mutation, ...] = (
    rewire, rename_output, drop_input, add_input, shuffle_nodes, other_operator, change_attribute, new_attribute,
    change_weight, change_interface, nest, change_opset,
    grow, repeat, call, spell_out, turn_around, other_kind,
)  # fmt: skip
_FIRST_KINDS, _FIRST_SEEDS = 12, 2000  # those seeds stay the same files


def mutated(seed: int) -> bytes:
    """A file with one to three things wrong, and sometimes with wrong bytes or without its end."""
    rng = random.Random(seed)
    model = sound()
    kinds = MUTATIONS[:_FIRST_KINDS] if seed < _FIRST_SEEDS else MUTATIONS
    for _ in range(rng.randint(1, 3)):
        rng.choice(kinds)(rng, model)
    data = bytearray(model.SerializeToString())
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    if seed >= _FIRST_SEEDS and rng.random() < 0.03:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def outcome(seed: int, path: Path, *, quick: bool = False) -> str:
    """What becomes of the file of this seed, written to `path`: "imported", or the sentence that refuses it.

    Raises whatever else comes up. `quick`: walked through in this process, and read at one choice of sizes.
    """
    path.write_bytes(mutated(seed))
    try:
        with _quick() if quick else nullcontext():
            capture(path)
    except GraphoptError as error:
        if not str(error).strip() or "\n" in str(error):
            raise AssertionError(f"no sentence: {str(error)!r}") from error
        return str(error)
    return "imported"


@contextmanager
def _quick() -> Iterator[None]:
    def here(function: str, path: Path, folder: Path, limits: Limits) -> None:
        check_file(path, folder, limits)

    def first(*arguments: Any) -> list[dict[str, int]]:
        return hint_choices(*arguments)[:1]

    with mock.patch.object(reading, "run_child", here), mock.patch.object(program, "hint_choices", first):
        yield


def main() -> int:
    """Prints a table; 1 where a file ended otherwise, or took over a minute."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("last", type=int, help="up to this seed")
    parser.add_argument("--first", type=int, default=0, help="from this seed on")
    parser.add_argument("--quick", action="store_true", help="in this process, at one choice of sizes")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    slowest, wrong, begin = (0.0, 0), 0, time.monotonic()
    signal.signal(signal.SIGALRM, _too_slow)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.first, arguments.last):
            start = time.monotonic()
            signal.alarm(60)
            try:
                said = outcome(seed, Path(folder, "mutated.onnx"), quick=arguments.quick)
                counts["imported" if said == "imported" else "refused"] += 1
            except Exception as error:
                wrong += 1
                print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
            signal.alarm(0)
            slowest = max(slowest, (time.monotonic() - start, seed))
            if seed % 500 == 499:
                print(f"  up to {seed}: {dict(counts)}, {wrong} otherwise", flush=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"imported {counts['imported']}, refused {counts['refused']}, otherwise {wrong}")
    print(
        f"slowest: seed {slowest[1]}, {slowest[0]:.1f} s; {time.monotonic() - begin:.0f} s in all; {memory} MB at most"
    )
    return 1 if wrong else 0


def _too_slow(*_: object) -> None:
    raise TimeoutError("over a minute")


if __name__ == "__main__":
    sys.exit(main())
