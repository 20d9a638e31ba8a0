"""graphopt::dequantize_lookup and dynamic_quantize: the rules that the specifications state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import graphopt.operators  # noqa: F401
from graphopt.errors import UsageError

lookup, dynamic = torch.ops.graphopt.dequantize_lookup, torch.ops.graphopt.dynamic_quantize
dequantize = torch.ops.graphopt.dequantize
NUMBERS = {"qmin": 0, "qmax": 255, "dtype": torch.float32}


def test_a_code_stands_for_its_number_times_its_scale() -> None:
    codes, table = torch.tensor([[0, 1, 2, 1, 2]], dtype=torch.uint8), torch.tensor([-1.0, 0.5, 4.0])
    assert lookup(codes, table, torch.tensor(2.0)).tolist() == [[-2.0, 1.0, 8.0, 1.0, 8.0]]
    found = lookup(codes, table, torch.tensor([[1.0, 10.0, 100.0]]), axis=1, block=2)
    assert found.tolist() == [[-1.0, 0.5, 40.0, 5.0, 400.0]]


def test_gradients_of_table_and_scale_are_exact() -> None:
    codes = torch.randint(0, 4, (3, 5), dtype=torch.uint8)
    table, scale = torch.randn(4, requires_grad=True), torch.rand(3, requires_grad=True)
    grad = torch.randn(3, 5)
    lookup(codes, table, scale, axis=0).backward(grad)
    wanted = [float((grad * scale.detach()[:, None])[codes == code].sum()) for code in range(4)]
    torch.testing.assert_close(table.grad, torch.tensor(wanted))
    torch.testing.assert_close(scale.grad, (grad * table.detach()[codes.long()]).sum(1))


def test_what_does_not_fit_is_refused() -> None:
    codes, table = torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(4)
    with pytest.raises(UsageError, match="uint8 codes and a vector of float32"):
        lookup(codes.to(torch.int8), table, torch.tensor(1.0))
    with pytest.raises(UsageError, match="scale"):
        lookup(codes, table, torch.ones(4), axis=0)
    with pytest.raises(UsageError, match="takes float32"):
        dynamic(torch.zeros(3).half())
    with pytest.raises(UsageError, match="axis 2"):
        dynamic(torch.zeros(3), axis=2)
    with pytest.raises(UsageError, match="no gradient"):
        dynamic(torch.zeros(3, requires_grad=True))


@pytest.mark.parametrize("x", [torch.randn(4, 6) * 10, torch.rand(4, 6) + 3, torch.zeros(4, 6), -torch.rand(4, 6)])
def test_each_row_has_the_range_of_its_own_numbers(x: Tensor) -> None:
    codes, scale, zero = dynamic(x, axis=1)
    assert (scale.shape, zero.shape) == ((4, 1), (4, 1))
    back = dequantize(codes, scale, zero, axis=1, block=6, **NUMBERS)
    assert torch.all((back - x).abs() <= scale * 0.5001)
    for row in range(4):
        alone = dynamic(x[row])
        assert torch.equal(alone[0], codes[row]) and alone[1] == scale[row] and alone[2] == zero[row]
        static = torch.ops.graphopt.quantize(x[row], *alone[1:], qmin=0, qmax=255, dtype=torch.uint8)
        assert torch.equal(static, codes[row])


def test_shapes_and_types_are_those_of_the_fakes() -> None:
    for axis in (None, 0, 1):
        torch.library.opcheck(dynamic.default, (torch.randn(3, 5),), {"axis": axis}, test_utils=["test_faketensor"])
    arguments = torch.zeros(3, 5, dtype=torch.uint8), torch.ones(4), torch.ones(3)
    torch.library.opcheck(lookup.default, arguments, {"axis": 0}, test_utils=["test_faketensor"])
