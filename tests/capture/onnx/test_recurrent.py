"""RNN, GRU and LSTM from and to ONNX: equal to ONNX Runtime over their options, and one node each."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt import Program
from graphopt.capture import capture
from graphopt.errors import CaptureError, UsageError
from tests.capture.onnx.test_exporters import EXPORTERS
from tests.capture.test_recurrent import Classifier, operators

STEPS, ROWS, INPUTS, HIDDEN = 5, 3, 4, 6
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
FUNCTIONS = {"RNN": 1, "GRU": 2, "LSTM": 3}
NUMBERS = {"Affine": 2, "LeakyRelu": 1, "ThresholdedRelu": 1, "ScaledTanh": 2, "HardSigmoid": 2, "Elu": 1}
ACTIVATIONS = (*NUMBERS, "Sigmoid", "Tanh", "Relu", "Softsign", "Softplus")
Feed = dict[str, np.ndarray[Any, Any]]


def layer(
    kind: str, *, left_out: str = "P", lengths: list[int] | None = None, dtype: Any = np.float32, **attributes: Any
) -> tuple[onnx.ModelProto, Feed]:
    """A model of one node with everything but the inputs whose first letters are in `left_out`, and what to feed it."""
    rng = np.random.default_rng(0)
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    rows, state = GATES[kind] * HIDDEN, (directions, ROWS, HIDDEN)
    shapes: dict[str, tuple[int, ...]] = {
        "X": (STEPS, ROWS, INPUTS),
        "W": (directions, rows, INPUTS),
        "R": (directions, rows, HIDDEN),
        "B": (directions, 2 * rows),
        "lengths": (ROWS,),
        "h": state,
        "c": state,
        "P": (directions, 3 * HIDDEN),
    }
    names = list(shapes)[: 8 if kind == "LSTM" else 6]
    values = {name: (rng.standard_normal(shapes[name]) / 3).astype(dtype) for name in names}
    values["lengths"] = np.array(lengths or [], np.int32)
    given = ["" if name in left_out or (name == "lengths" and lengths is None) else name for name in names]
    outputs = ["Y", "Y_h", "Y_c"][: 3 if kind == "LSTM" else 2]
    node = helper.make_node(kind, given, outputs, hidden_size=HIDDEN, **attributes)
    kind_of = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    feed: Feed = {name: values[name] for name in ("X", "lengths", "h", "c") if name in given}
    graph = helper.make_graph(
        [node],
        "layer",
        [
            helper.make_tensor_value_info(name, TensorProto.INT32 if name == "lengths" else kind_of, value.shape)
            for name, value in feed.items()
        ],
        [helper.make_tensor_value_info(name, kind_of, None) for name in outputs],
        [numpy_helper.from_array(values[name], name) for name in given if name and name not in feed],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), feed


def results(program: Program, feed: Feed) -> list[np.ndarray[Any, Any]]:
    return [value.numpy() for value in program(*(torch.from_numpy(feed[spec.name]) for spec in program.inputs))]


def runtime(model: onnx.ModelProto | str, feed: Feed) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    source = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options).run(None, feed)


def agrees(kind: str, **options: Any) -> None:
    model, feed = layer(kind, **options)
    program = capture(model)
    assert sum(operators(program)[f"graphopt.{name}.default"] for name in ("rnn", "gru", "lstm")) == 1
    for found, want in zip(results(program, feed), runtime(model, feed), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", GATES)
def test_options_as_in_onnxruntime(kind: str, direction: str) -> None:
    own: dict[str, list[dict[str, Any]]] = {
        "RNN": [],
        "GRU": [{"linear_before_reset": 1}, {"linear_before_reset": 1, "clip": 0.2}],
        "LSTM": [{"left_out": ""}, {"left_out": "", "clip": 0.2}, {"input_forget": 1}, {"left_out": "hP"}],
    }
    common: list[dict[str, Any]] = [{}, {"lengths": [5, 0, 3]}, {"clip": 0.2}, {"left_out": "BhcP"}]
    for options in common + own[kind]:
        agrees(kind, direction=direction, **options)


@pytest.mark.parametrize("kind", GATES)
def test_activations_as_in_onnxruntime(kind: str) -> None:
    count = FUNCTIONS[kind]
    for name in ACTIVATIONS:
        numbers = {"activation_alpha": [0.3] * count} if NUMBERS.get(name, 0) > 0 else {}
        numbers |= {"activation_beta": [0.6] * count} if NUMBERS.get(name, 0) > 1 else {}
        names = ["Sigmoid", name, name][:count] if count > 1 else [name]
        agrees(kind, activations=names, **numbers)
    if kind != "RNN":  # of which ONNX Runtime takes names as they are spelt only
        agrees(kind, activations=["hardsigmoid", "TANH", "relu"][:count])


def test_the_batch_may_come_first() -> None:
    """ONNX Runtime does not have it."""
    model, feed = layer("LSTM", left_out="hcP", direction="bidirectional")
    first, turned = layer("LSTM", left_out="hcP", direction="bidirectional", layout=1)
    turned["X"] = np.ascontiguousarray(feed["X"].swapaxes(0, 1))
    first.graph.input[0].CopyFrom(helper.make_tensor_value_info("X", TensorProto.FLOAT, turned["X"].shape))
    y, y_h, y_c = results(capture(first), turned)
    want, want_h, want_c = results(capture(model), feed)
    np.testing.assert_allclose(y, want.transpose(2, 0, 1, 3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y_h, want_h.swapaxes(0, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y_c, want_c.swapaxes(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("RNN", {"activations": ["Sine"]}, "activation 'Sine'"),
        ("RNN", {"activations": ["Affine"]}, "activation Affine has no alpha or beta"),
        ("GRU", {"direction": "up"}, "direction 'up'"),
        ("GRU", {"activations": ["Tanh"]}, "takes 2 activations"),
        ("LSTM", {"sideways": 1}, "'sideways'"),
    ],
)
def test_what_has_no_form_is_refused(kind: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(CaptureError, match=reason):
        capture(layer(kind, **options)[0])


@pytest.mark.parametrize("kind", ["lstm", pytest.param("gru", marks=pytest.mark.slow)])
@pytest.mark.parametrize("exporter", ["torchscript", pytest.param("dynamo", marks=pytest.mark.slow)])
def test_both_exporters_give_the_form_of_pytorch(exporter: str, kind: str, tmp_path: Path) -> None:
    module, x = Classifier(kind).eval(), torch.randn(2, 5, 6)
    options = dict(EXPORTERS[exporter])
    options["dynamic_shapes" if options["dynamo"] else "dynamic_axes"] = {"x": {0: "rows", 1: "steps"}}
    path = str(tmp_path / "m.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), path, input_names=["x"], output_names=["out"], verbose=False, **options)
    program = capture(path)
    from_torch = capture(module, (x,), dynamic_shapes={"x": {0: "rows", 1: "steps"}})
    ours, theirs = operators(program), operators(from_torch)
    assert {name: ours[name] for name in theirs} == {
        **theirs,
        "aten.slice.Tensor": ours["aten.slice.Tensor"],  # of all rows, which PyTorch writes out
    }
    assert program.inputs[0].shape == ("rows", "steps", 6)
    for rows, steps in ((2, 5), (1, 1), (3, 13)):
        given = torch.randn(rows, steps, 6)
        torch.testing.assert_close(program(given)[0], module(given))


@pytest.mark.parametrize("kind", ["LSTM", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("RNN", "GRU"))])
def test_written_read_again_and_run(kind: str, tmp_path: Path) -> None:
    path, count = str(tmp_path / "m.onnx"), FUNCTIONS[kind]
    own: dict[str, dict[str, Any]] = {
        "LSTM": {"left_out": "", "input_forget": 1},
        "GRU": {"linear_before_reset": 1},
    }
    cases: list[dict[str, Any]] = [
        {"direction": "bidirectional", "lengths": [5, 2, 3]},
        {"left_out": "BhcP", "direction": "reverse", "clip": 0.3},
        {"activations": ["HardSigmoid", "LeakyRelu", "Tanh"][:count]},
        own.get(kind, {}),
    ]
    for options in cases:
        model, feed = layer(kind, **options)
        program = capture(model)
        program.to_onnx(path)
        written = onnx.load(path)
        onnx.checker.check_model(written, full_check=True)
        assert [node.op_type for node in written.graph.node].count(kind) == 1
        for form in (runtime(path, feed), results(capture(path), feed)):
            for found, want in zip(form, results(program, feed), strict=True):
                np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_a_network_is_written(tmp_path: Path) -> None:
    path, module = str(tmp_path / "m.onnx"), Classifier().eval()
    program = capture(module, (torch.randn(2, 5, 6),), dynamic_shapes={"x": {0: "rows", 1: "steps"}})
    program.to_onnx(path)
    x = torch.randn(3, 11, 6)
    (found,) = runtime(path, {"x": x.numpy()})
    np.testing.assert_allclose(found, module(x).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_a_type_that_onnx_lacks_is_refused(tmp_path: Path) -> None:
    program = capture(Classifier().eval().bfloat16(), (torch.randn(2, 5, 6).bfloat16(),))
    with pytest.raises(UsageError, match="bfloat16"):
        program.to_onnx(str(tmp_path / "m.onnx"))


@pytest.mark.slow
def test_compiles_from_onnx() -> None:
    for kind in GATES:
        model, feed = layer(kind, direction="bidirectional", lengths=[5, 2, 3])
        session = graphopt.compile(capture(model)).session()
        for found, want in zip(session.run(None, feed), runtime(model, feed), strict=True):
            np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
