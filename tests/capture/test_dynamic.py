"""Dynamic sizes: what may vary, and the line of the model that says otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from graphopt.capture import capture
from graphopt.errors import CaptureError, UnknownNameError
from graphopt.program import SizeRange

X = torch.ones(4, 3)


class SpecialCase(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 4:
            return x + 1
        return x * 2


class FixedView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 2, 3)


class EvenView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1).sum(-1)


class FreeView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 1)


class AsNumber(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + int(x.shape[0])


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Apart(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(1), y.sum(1)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows[: x.shape[0]]


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[0]).unsqueeze(0) + 2)[0]


class Joined(nn.Module):
    def forward(self, past: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([past, x]) * mask


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (SpecialCase(), r"axis 0 of input 'x' .*'batch'.* to 4 at .*test_dynamic\.py:\d+: `if x.shape\[0\] == 4:`"),
        (FixedView(), r"fixed it to 4 at .*test_dynamic\.py:\d+: `return x.reshape\(2, 2, 3\)`"),
        (EvenView(), r"3\*batch is a multiple of 2 at .*test_dynamic\.py:\d+: `return x.reshape\(2, -1\)"),
        (AsNumber(), r"fixed it to 4 at .*`return x \+ int\(x.shape\[0\]\)`"),
    ],
)  # fmt: skip
def test_size_that_the_model_fixes_names_axis_and_line(module: nn.Module, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(module, (X,), dynamic_shapes={"x": {0: "batch"}})


def test_special_case_is_found_with_any_example() -> None:
    with pytest.raises(CaptureError, match=r"works only where batch != 4 at .*`if x.shape\[0\] == 4:`"):
        capture(SpecialCase(), (X[:1],), dynamic_shapes={"x": {0: "batch"}})


def test_the_same_code_is_fine_for_a_fixed_size() -> None:
    assert capture(SpecialCase(), (X,)).inputs[0].shape == (4, 3)


def test_reshape_without_constants_is_fine() -> None:
    program = capture(FreeView(), (X,), dynamic_shapes={"x": {0: "batch"}})
    assert program.outputs[0].shape == ("3*batch", 1)


def test_example_of_size_one_is_widened() -> None:
    program = capture(Sum(), (X[:1], X[:1]), dynamic_shapes={"x": {0: "batch"}, "y": {0: "batch"}})
    assert program.inputs[0].shape == ("batch", 3)
    assert program.examples[0].shape == (1, 3)
    assert program(X, X)[0].shape == (4, 3)


def test_independent_sizes_stay_apart_for_equal_examples() -> None:
    program = capture(Apart(), (X, X), dynamic_shapes={"x": {0: "a"}, "y": {0: "b"}})
    assert [out.shape for out in program.outputs] == [("a",), ("b",)]
    assert set(program.sizes) == {"a", "b"}


def test_one_name_is_one_size_even_where_the_model_does_not_care() -> None:
    program = capture(Apart(), (X, X), dynamic_shapes={"x": {0: "a"}, "y": {0: "a"}})
    assert [out.shape for out in program.outputs] == [("a",), ("a",)]


@pytest.mark.parametrize("rows", [4, 1])
def test_sizes_that_the_model_ties_need_one_name(rows: int) -> None:
    with pytest.raises(CaptureError, match=r"'a' .* and 'b' .* must be equal in this model at .*`return x \+ y`"):
        capture(Sum(), (X, X[:rows]), dynamic_shapes={"x": {0: "a"}, "y": {0: "b"}})


def test_bound_of_the_model_is_found() -> None:
    assert capture(Table(), (X,), dynamic_shapes={"x": {0: "n"}}).sizes == {"n": SizeRange(1, 16)}
    assert capture(Positions(), (X,), dynamic_shapes={"x": {0: "n"}}).sizes == {"n": SizeRange(1, 10)}


def test_dim_gives_bounds() -> None:
    program = capture(Table(), (X,), dynamic_shapes={"x": {0: Dim("n", min=2, max=8)}})
    assert program.sizes == {"n": SizeRange(2, 8)}


def test_dim_wider_than_the_model_allows() -> None:
    with pytest.raises(CaptureError, match=r"may be 64 by its Dim, but the model takes at most 16 at .*self\.rows\["):
        capture(Table(), (X,), dynamic_shapes={"x": {0: Dim("n", max=64)}})


def test_size_given_by_an_expression() -> None:
    shapes = {"past": {0: "past"}, "x": {0: "new"}, "mask": {0: "past + new"}}
    program = capture(Joined(), (X, X[:1], torch.ones(5, 3)), dynamic_shapes=shapes)
    assert sorted(program.sizes) == ["new", "past"]
    assert program(X[:2], X, torch.ones(6, 3))[0].shape == (6, 3)


def test_size_that_depends_on_others_says_how() -> None:
    shapes = {"past": {0: "past"}, "x": {0: "new"}, "mask": {0: "total"}}
    with pytest.raises(CaptureError, match=r"it must be new \+ past at .*torch\.cat.*write 'new \+ past'"):
        capture(Joined(), (X, X[:1], torch.ones(5, 3)), dynamic_shapes=shapes)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": {5: "b"}}, "no axis 5"),
        ({"x": {0: Dim.AUTO}}, "must be a name"),
        ({"x": "b"}, "must map axes to sizes"),
        ({"x": {0: "2 * ("}}, "neither a name nor an expression"),
        ({"x": {0: "__import__('os')"}}, "neither a name nor an expression"),
        ([1], "must be a dict"),
        ({"x": {0: "n", 1: "n"}}, r"both called 'n' but the examples have 4 and 3"),
    ],
)
def test_unusable_requests(shapes: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(SpecialCase(), (X,), dynamic_shapes=shapes)


def test_unknown_input() -> None:
    with pytest.raises(UnknownNameError):
        capture(SpecialCase(), (X,), dynamic_shapes={"z": {0: "n"}})


def test_negative_axes_and_lists() -> None:
    program = capture(Apart(), (X, X), dynamic_shapes={"x": {-1: "width"}, "y": ("rows", None)})
    assert [spec.shape for spec in program.inputs] == [(4, "width"), ("rows", 3)]


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (8, 16, r"axis 0 of input 'x' is 4 in the example, but its Dim 'b' allows 8 to 16"),
        (1, 3, r"axis 0 of input 'x' is 4 in the example, but its Dim 'b' allows 1 to 3"),
        (1, 2**62, r"must be from 0 to 2\*\*62 - 1"),
        (-5, 8, r"must be from 0 to 2\*\*62 - 1"),
    ],
)
def test_bounds_that_cannot_be_met_are_refused(low: int, high: int, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(Doubled(), (torch.ones(4, 3),), dynamic_shapes={"x": {0: Dim("b", min=low, max=high)}})


def test_bounds_that_exclude_each_other_are_refused() -> None:
    wanted = Dim("b", min=1, max=9)
    wanted.min = 20
    with pytest.raises(CaptureError, match="min=20 over max=9"):
        capture(Doubled(), (torch.ones(4, 3),), dynamic_shapes={"x": {0: wanted}})


class AnyNumber(nn.Module):
    def forward(self, first: torch.Tensor, *rest: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return sum((*rest, *more.values()), first)


def test_sizes_of_positional_arguments_of_any_number_are_dynamic() -> None:
    x = torch.ones(4, 3)
    axes = {name: {0: "rows"} for name in ("first", "rest.0", "rest.1")}
    program = capture(AnyNumber(), (x, x, x), dynamic_shapes=axes)
    assert [spec.shape for spec in program.inputs] == [("rows", 3)] * 3
    assert torch.equal(program(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3))[0], torch.full((2, 3), 3.0))


def test_sizes_of_named_arguments_of_any_number_are_refused() -> None:
    inputs = {"first": torch.ones(4, 3), "other": torch.ones(4, 3)}
    assert [spec.name for spec in capture(AnyNumber(), inputs).inputs] == ["first", "other"]
    with pytest.raises(CaptureError, match=r"passed through \*\*more; name them in forward"):
        capture(AnyNumber(), inputs, dynamic_shapes={"first": {0: "rows"}, "other": {0: "rows"}})
