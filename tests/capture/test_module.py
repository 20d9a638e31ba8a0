"""Capture of modules: values, names, eval semantics, state, and the module left alone."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from graphopt.capture import Limits, capture
from graphopt.capture.inputs import check_sizes, draw_inputs
from graphopt.errors import CaptureError, UnknownNameError
from graphopt.program import Program
from tests import models


def eager(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        results = copy.deepcopy(module)(*inputs)
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


def assert_same(program: Program, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(program(*inputs), eager(module, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", models.ALL)
def test_program_computes_what_the_module_does(name: str) -> None:
    module, examples, _ = models.ALL[name]()
    program = models.program(name)
    assert_same(program, module, examples)
    for sizes in check_sizes(program):
        assert_same(program, module, draw_inputs(program, sizes, seed=0))


@pytest.mark.parametrize("name", ["branching", "tied", "counter"])
def test_graph_is_in_normal_form(name: str) -> None:
    program = models.program(name)
    modes = set()
    for node in program.nodes():
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        assert "_assert" not in str(node.target)
        if node.op == "call_function":
            assert not getattr(node.target, "_schema", None) or not node.target._schema.is_mutable  # type: ignore[union-attr]
        values = pytree.tree_leaves(node.meta.get("val"))
        modes |= {value.fake_mode for value in values if isinstance(value, FakeTensor)}
    assert len(modes) == 1
    placeholders = [str(node.target) for node in program.graph_module.graph.find_nodes(op="placeholder")]
    assert placeholders == [spec.name for spec in program.inputs] + [state.spec.name for state in program.state]


def test_shared_weights_become_one_attribute_and_are_not_copied() -> None:
    module, examples, dynamic = models.tied()
    program = capture(module, examples, dynamic_shapes=dynamic)
    targets = {node.target for node in program.nodes() if node.op == "get_attr"}
    assert targets == {"embed.weight", "rows", "last_row"}
    weight = program.graph_module.get_parameter("embed.weight")
    assert weight.data_ptr() == module.get_parameter("embed.weight").data_ptr()
    assert not weight.requires_grad


def test_buffer_mutation_becomes_state() -> None:
    module, (x,), dynamic = models.counter()
    program = capture(module, (x,), dynamic_shapes=dynamic)
    assert [state.spec.name for state in program.state] == ["total", "calls"]
    assert torch.equal(program(x)[0], program(x)[0])
    reference = copy.deepcopy(module)
    state = None
    for _ in range(3):
        outputs, state = program.step((x,), state)
        torch.testing.assert_close(outputs[0], reference(x))
    assert int(state[1]) == 3  # type: ignore[index]
    assert int(program.state[1].initial) == 0
    assert int(module.get_buffer("calls")) == 0


def test_views_of_a_mutated_buffer_are_refused() -> None:
    class Sliding(nn.Module):
        total: Tensor
        first: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(4, 4))
            self.register_buffer("first", self.total[0])

        def forward(self, x: Tensor) -> Tensor:
            self.total.add_(1)
            return x + self.first

    with pytest.raises(CaptureError, match="'total' and 'first' share memory"):
        capture(Sliding(), (torch.zeros(4),))


def test_writing_into_an_input_is_refused() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y.add_(x)

    with pytest.raises(CaptureError, match=r"writes into its input 'y'.*y\.clone\(\)"):
        capture(InPlace(), (torch.zeros(2), torch.zeros(2)))


def test_writing_into_a_temporary_is_fine() -> None:
    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 1).add_(x)

    assert torch.equal(capture(Local(), (torch.ones(2),))(torch.ones(2))[0], torch.full((2,), 3.0))


def test_module_is_left_as_it_was() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            random.random()
            np.random.rand()
            return self.drop(self.norm(x))

    module = Mixed().train()
    module.norm.eval()
    before = {name: set(vars(child)) for name, child in module.named_modules()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    generators = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    program = capture(module, (torch.randn(3, 4, generator=torch.Generator()),), dynamic_shapes={"x": {0: "batch"}})
    assert [child.training for child in module.modules()] == [True, True, False]
    assert {name: set(vars(child)) for name, child in module.named_modules()} == before
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert repr(np.random.get_state()) == generators[2]
    assert torch.is_grad_enabled()
    assert_same(program, copy.deepcopy(module).eval(), (torch.ones(2, 4),))


class Nested(nn.Module):
    def forward(self, x: Tensor, cache: dict[str, Any], flag: bool = True, factor: int = 3, unused: None = None) -> Any:
        y = x + cache["k"][0] * factor if flag else x
        return {"r": y}, cache["v"], x.shape[0], 3, None


def test_names_of_nested_inputs_and_outputs() -> None:
    x = torch.ones(4, 3)
    examples = {"cache": {"k": [x], "v": np.ones((4, 3), np.float32)}, "x": x}
    program = capture(Nested(), examples, dynamic_shapes={"x": {0: "n"}, "cache.k.0": {0: "n"}})
    assert [spec.name for spec in program.inputs] == ["x", "cache.k.0", "cache.v"]
    assert program.inputs[0].shape == ("n", 3)
    assert [spec.name for spec in program.outputs] == ["output_0.r", "output_1", "output_2", "output_3"]
    outputs = program(torch.ones(5, 3), torch.ones(5, 3), torch.ones(4, 3))
    assert torch.equal(outputs[0], torch.full((5, 3), 4.0))
    assert (int(outputs[2]), int(outputs[3])) == (5, 3)
    assert outputs[2].dtype == torch.int64


def test_values_that_are_no_tensors_are_baked_in() -> None:
    x = torch.ones(2, 3)
    program = capture(Nested(), (x, {"k": [x], "v": x}, True, 10))
    assert len(program.inputs) == 3
    assert torch.equal(program(x, x, x)[0], torch.full((2, 3), 11.0))


def test_output_names_of_dicts_and_dataclasses() -> None:
    module, examples, _ = models.dict_output()
    program = capture(module, examples)
    assert [spec.name for spec in program.outputs] == ["logits", "pair.0", "found.score", "found.index"]
    assert [spec.name for spec in capture(nn.Linear(2, 2), (torch.ones(1, 2),)).outputs] == ["output"]


def test_graph_module_can_be_captured() -> None:
    module = torch.fx.symbolic_trace(models.Mlp().eval())
    assert_same(capture(module, (torch.ones(2, 16),)), module, (torch.ones(2, 16),))


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


@pytest.mark.parametrize(
    ("module", "examples", "message"),
    [
        (nn.Linear(2, 2), None, "needs example_inputs"),
        (nn.Linear(2, 2), (torch.ones(1, 2), 1), "do not fit forward"),
        (nn.Linear(2, 2), {}, "do not fit forward"),
        (nn.Linear(2, 2), 3, "must be a tuple or a dict"),
        (nn.Linear(2, 2), (torch.ones(1, 3),), "cannot be exported"),
        (Branch(), (torch.ones(2),), r"cannot be exported.*`return x if x\.sum\(\) > 0 else -x`"),
        (Positive(), (torch.ones(2),), r"depends on the values of a tensor.*`return x\[x > 0\]`"),
        (Noisy(), (torch.ones(2),), "draws random numbers"),
    ],
)
def test_what_cannot_be_captured_is_one_clear_sentence(module: nn.Module, examples: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message) as caught:
        capture(module, examples)
    assert "\n" not in str(caught.value)


def test_unknown_input_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'input'"):
        capture(nn.Linear(2, 2), {"inputs": torch.ones(1, 2)})


def test_node_limit() -> None:
    with pytest.raises(CaptureError, match=r"Limits\.max_nodes"):
        capture(nn.Linear(2, 2), (torch.ones(1, 2),), limits=Limits(max_nodes=2))


@pytest.mark.parametrize("source", [3, None, [nn.Linear(2, 2)]])
def test_other_sources_are_refused(source: Any) -> None:
    with pytest.raises(CaptureError, match="give a torch module"):
        capture(source)


def test_capture_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    capture(nn.Linear(2, 2), (torch.ones(1, 2),))
    with pytest.raises(CaptureError):
        capture(Branch(), (torch.ones(2),))
    assert capfd.readouterr() == ("", "")
