"""Recurrent layers of PyTorch as graphopt:: operators: equal results, any length, one node a layer."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt import Program
from graphopt.capture import capture
from graphopt.errors import CaptureError
from graphopt.fitting.options import FitOptions
from tests.fitting.cases import perturbed

LAYERS: dict[str, tuple[Callable[..., nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "rnn": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
}
DYNAMIC = {"x": {0: "a", 1: "b"}}


class Layer(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer, own = LAYERS[kind]
        self.layer = layer(4, 5, **own, **options)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return self.layer(x, state) if state is not None else self.layer(x)


class Classifier(nn.Module):
    """Both directions, two layers, the batch first."""

    def __init__(self, kind: str = "lstm") -> None:
        super().__init__()
        torch.manual_seed(0)
        layer, own = LAYERS[kind]
        self.layer = layer(6, 20, 2, bidirectional=True, batch_first=True, **own)
        self.head = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.layer(x)[0][:, -1])
        return result


def operators(program: Program) -> Counter[str]:
    return Counter(str(node.target) for node in program.nodes() if node.op == "call_function")


def agrees(program: Program, module: nn.Module, *inputs: Any) -> None:
    wanted = pytree.tree_leaves(module(*inputs))
    for found, want in zip(program(*pytree.tree_leaves(inputs)), wanted, strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize(
    "kind", ["lstm", "rnn_relu", *(pytest.param(k, marks=pytest.mark.slow) for k in ("gru", "rnn"))]
)
def test_every_form_of_a_layer(kind: str) -> None:
    for layers, both, first in ((1, False, False), (2, True, True), (2, False, False), (1, True, True)):
        module = Layer(kind, num_layers=layers, bidirectional=both, batch_first=first, bias=both == first).eval()
        program = capture(module, (torch.randn(3, 7, 4),), dynamic_shapes=DYNAMIC)
        found = operators(program)
        assert found[f"graphopt.{kind[:4].rstrip('_')}.default"] == layers
        assert "aten.zeros.default" not in found and found["aten.cat.default"] == (layers > 1) * len(
            program.outputs[1:]
        )
        for shape in ((3, 7, 4), (1, 1, 4), (13, 2, 4)):
            agrees(program, module, torch.randn(shape))


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_all_options(kind: str) -> None:
    for layers, both, first, bias in product((1, 2), (False, True), (False, True), (False, True)):
        module = Layer(kind, num_layers=layers, bidirectional=both, batch_first=first, bias=bias).eval()
        agrees(capture(module, (torch.randn(3, 7, 4),), dynamic_shapes=DYNAMIC), module, torch.randn(5, 2, 4))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_states_are_inputs_and_outputs(kind: str) -> None:
    state: Any = torch.randn(4, 3, 5)
    inputs = torch.randn(7, 3, 4), (state, state + 1) if kind == "lstm" else state
    module = Layer(kind, num_layers=2, bidirectional=True).eval()
    agrees(capture(module, inputs), module, *inputs)


def test_weights_are_held_under_the_first_name() -> None:
    program = capture(Classifier().eval(), (torch.randn(2, 3, 6),), dynamic_shapes={"x": {1: "t"}})
    names = {name: tuple(value.shape) for name, value in program.graph_module.named_parameters()}
    assert names["layer.weight_ih_l0"] == (2, 80, 6) and names["layer.weight_hh_l1"] == (2, 80, 20)
    assert names["layer.bias_ih_l0"] == (2, 160) and len(names) == 8
    assert operators(program)["graphopt.lstm.default"] == 2 and operators(program)["aten.slice.Tensor"] <= 1


def test_programs_exported_elsewhere() -> None:
    """torch.export has fixed their length."""
    module, x = Classifier("gru").eval(), torch.randn(2, 3, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, (x,))
    program = capture(exported)
    assert operators(program)["graphopt.gru.default"] == 2 and "aten.gru.input" not in operators(program)
    agrees(program, module, x)


def test_saved_and_read_again(tmp_path: Path) -> None:
    module = Classifier().eval()
    program = capture(module, (torch.randn(2, 3, 6),), dynamic_shapes={"x": {0: "n", 1: "t"}})
    program.save(str(tmp_path / "m.pt2"))
    again = capture(tmp_path / "m.pt2")
    assert again.inputs == program.inputs and operators(again) == operators(program)
    agrees(again, module, torch.randn(4, 9, 6))


def test_levels_run_over_them() -> None:
    module = Classifier().eval()
    program = capture(module, (torch.randn(2, 3, 6),), dynamic_shapes={"x": {0: "n", 1: "t"}})
    result = graphopt.optimize(program, "O2")
    assert operators(result.program)["graphopt.lstm.default"] == 2
    agrees(result.program, module, torch.randn(4, 9, 6))


def test_weights_are_trained() -> None:
    """Towards the outputs of the same layer with other weights."""
    x = torch.randn(2, 3, 4)
    teacher = capture(Layer("gru").eval(), (x,))
    student = perturbed(teacher, "layer.weight_hh_l0")
    data = [{"x": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(n)).numpy()} for n in range(10)]
    options = FitOptions(epochs=4, learning_rate=2e-2)
    result = graphopt.fit(student, data, train=["layer.weight_hh_l0"], teacher=teacher, options=options)
    assert result.history[-1].held_out < result.history[0].held_out / 2


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 5)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0])[0]


def test_what_has_no_form_is_refused() -> None:
    with pytest.raises(CaptureError, match="pack_padded_sequence"):
        capture(Packed().eval(), (torch.randn(5, 2, 4), torch.tensor([5, 3])))
    with pytest.raises(CaptureError, match="proj_size"):
        capture(nn.LSTM(4, 5, proj_size=2).eval(), (torch.randn(5, 2, 4),))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 5, 2, dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(2, x.shape[1], 5)
        weights: Any = self.layer._flat_weights
        result: Tensor = torch.lstm(x, (zeros, zeros), weights, True, 2, 0.5, True, False, False)[0]
        return result


def test_dropout_that_eval_mode_leaves_on_is_refused() -> None:
    with pytest.raises(CaptureError, match="dropout"):
        capture(Dropping().eval(), (torch.randn(5, 2, 4),))
    agrees(
        capture(Layer("lstm", num_layers=2, dropout=0.5).eval(), (torch.randn(3, 2, 4),)),
        Layer("lstm", num_layers=2, dropout=0.5).eval(),
        torch.randn(3, 2, 4),
    )
