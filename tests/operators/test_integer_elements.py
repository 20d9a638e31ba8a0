"""graphopt::qadd, qmul, qmatmul and table256 for every pair of codes, against float64 and brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.operators import integer_elements  # noqa: F401

ops = torch.ops.graphopt
UNSIGNED, SIGNED = torch.arange(256).to(torch.uint8), torch.arange(-128, 128).to(torch.int8)
A, B, INTO = torch.tensor(0.02), torch.tensor(0.03), torch.tensor(0.05)
ZEROS = torch.tensor(3, dtype=torch.uint8), torch.tensor(-7, dtype=torch.int8), torch.tensor(128, dtype=torch.uint8)
BYTE = {"dtype": torch.uint8}


def numbers() -> tuple[Tensor, Tensor]:
    return (UNSIGNED.double()[:, None] - 3) * A.double(), (SIGNED.double()[None] + 7) * B.double()


def pair(operator: object) -> Tensor:
    given = (UNSIGNED[:, None], A, ZEROS[0], SIGNED[None], B, ZEROS[1], INTO, ZEROS[2])
    result: Tensor = operator(*given, **BYTE)  # type: ignore[operator]
    return result


def check(found: Tensor, exact: Tensor) -> None:
    """Equal but where the number is within float32's error of a half, and one apart there."""
    steps = exact / INTO.double()
    wanted = (steps.round() + 128).clamp(0, 255)
    close = (steps - steps.floor() - 0.5).abs() < 1e-5 * steps.abs().clamp(min=1)
    assert torch.equal(found[~close].double(), wanted[~close])
    assert (found.double() - wanted).abs().max() <= 1 and close.float().mean() < 0.2


def test_every_sum() -> None:
    a, b = numbers()
    check(pair(ops.qadd), a + b)


def test_every_product() -> None:
    a, b = numbers()
    check(pair(ops.qmul), a * b)


def test_every_quotient() -> None:
    a, b = numbers()
    found, exact = pair(ops.qdiv), a / b
    by_zero = (b == 0).expand_as(exact)
    check(found[~by_zero], exact[~by_zero])
    assert found[:3, 121].unique().tolist() == [0] and found[4:, 121].unique().tolist() == [255]
    assert int(found[3, 121]) == 0  # 0 / 0


def test_matrix_products_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (2, 3, 5), generator=generator).to(torch.uint8)
    b = torch.randint(-128, 128, (5, 4), generator=generator).to(torch.int8)
    one = torch.tensor(1.0)
    found = ops.qmatmul(a, one, ZEROS[0], b, one, ZEROS[1], None, None, dtype=torch.float32)
    brute = [[[sum((int(m[i]) - 3) * (int(b[i, n]) + 7) for i in range(5)) for n in range(4)] for m in x] for x in a]
    assert torch.equal(found, torch.tensor(brute).float())


@pytest.mark.parametrize("codes", [UNSIGNED, SIGNED])
def test_a_table_has_one_element_for_each_code(codes: Tensor) -> None:
    table = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.table256(codes, table), table)
    with pytest.raises(UsageError, match="does not have one element for each 8-bit code"):
        ops.table256(codes, table[:255])


def test_only_bytes_are_taken() -> None:
    with pytest.raises(UsageError, match=r"take 8 bits, not torch\.int32"):
        ops.qadd(UNSIGNED.int(), A, None, SIGNED, B, None, INTO, None, **BYTE)
    with pytest.raises(UsageError, match="no gradient passes through functions of codes"):
        ops.qmul(UNSIGNED, A.clone().requires_grad_(), None, SIGNED, B, None, INTO, None, **BYTE)
