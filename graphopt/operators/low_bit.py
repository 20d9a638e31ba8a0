"""graphopt::lut_build, lut_gemv and wq_gemm: products of activations with weights of 1 to 8 bits.

The functions here are the specification. A weight is uint8 codes q [N, K], one a byte, each below 2^bits, in groups of
`group` along K, of which the last may be short; group g = k // group of output n stands for

    w[n, k] = weight_scale[n, g] * (value(q[n, k]) - weight_zero[n, g])

where value(q) is q, codebook[q] of int8 [2^bits], or codebook[tag[n, g], q] of int8 [C, 2^bits] with a uint8 tag
[N, G]. Activations are 8-bit codes with a scale of their own for each group, so that sums inside of a group are int32
and exact: every kernel gives the same ones. Groups are added in float32, from the first to the last:

    y[n] = sum over g of (float(sum over k of value(q) codes[k]) - weight_zero[n, g] float(sums[g]))
           * (weight_scale[n, g] * scale[g]),  + bias[n]

Groups have so few numbers that no sum of 8-bit codes passes int32.

With `table="int8"` activations are tables of sums of four of them in place of codes, after T-MAC (arXiv 2407.00088):
entry c of a table is the sum of x_j with the sign of bit j of c, rounded to int8. With q = sum over i of 2^i b_i

    sum over k of q x = (sum over i, tables of 2^i entry[bits b_i of four k] * scale + (2^bits - 1) sum over k of x) / 2

which is exact but for the entries' rounding. No gradient passes through: the operators refuse it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.errors import UsageError

TABLES = ("exact", "int8")
KERNELS = ("auto", "unpack", "lut", "amx")
TABLE_CODES = 4  # activations that one table sums
MOST_LOOKED_UP = 3  # bits of codes whose exact sums are looked up: with four an entry would be one activation's
_LARGEST = 127
MOST_GROUP = (2**31 - 1) // (255 * _LARGEST)  # numbers of a group
_OPERANDS = (
    "Tensor codes, Tensor scale, Tensor sums, Tensor weight, Tensor weight_scale, Tensor? weight_zero, "
    "Tensor? codebook, Tensor? bias, int bits, int group, str table='exact', str kernel='auto', Tensor? tag=None"
)


@torch.library.custom_op(
    "graphopt::lut_build",
    mutates_args=(),
    schema="(Tensor x, int group, str table='exact') -> (Tensor codes, Tensor scale, Tensor sums)",
)
def lut_build(x: Tensor, group: int, table: str = "exact") -> tuple[Tensor, Tensor, Tensor]:
    """x [..., K] in groups of `group`: codes, scale float32 [..., G], sums [..., G].

    "exact": codes int8 [..., K] = clamp(round(x / scale), -127, 127), halves to even; scale = max|x| / 127 of the
    group, 0 with codes 0 where all are 0; sums int32 of the codes.
    "int8": codes int8 [..., ceil(K / 4), 16] = round(entry * (1 / scale)) of tables; scale = the largest entry / 127;
    sums float32 of x.

    float16 and bfloat16 are taken as float32. NaN and infinities give their group a scale of NaN and codes of no
    meaning. Raises UsageError for what is no float, a group of fewer than one, an unknown table and, for tables, a
    group of parts of them.
    """
    _check_table(x, group, table)
    padded = _in_groups(x.detach().to(torch.float32), group)
    if table == "exact":
        scale = _scale(padded.abs())
        codes = _rounded(padded / _step(scale))
        sums = codes.to(torch.int32).sum(-1, dtype=torch.int32)
        return codes.flatten(-2)[..., : x.shape[-1]].contiguous(), scale, sums
    a, b, c, d = F.pad(padded, (0, -padded.shape[-1] % TABLE_CODES)).unflatten(-1, (-1, TABLE_CODES)).unbind(-1)
    signs = 2.0 * _bits(torch.arange(16), TABLE_CODES) - 1.0
    entries = a[..., None] * signs[:, 0] + b[..., None] * signs[:, 1]
    entries = (entries + c[..., None] * signs[:, 2]) + d[..., None] * signs[:, 3]
    scale = _scale(((a.abs() + b.abs()) + c.abs()) + d.abs())
    inverse = (1.0 / _step(scale)).clamp(max=torch.finfo(torch.float32).max)
    tables = _rounded(entries.flatten(-2) * inverse).unflatten(-1, (-1, 16)).flatten(-3, -2)
    return tables[..., : -(-x.shape[-1] // TABLE_CODES), :].contiguous(), scale, padded.sum(-1)


@lut_build.register_fake
def _(x: Tensor, group: int, table: str = "exact") -> tuple[Tensor, Tensor, Tensor]:
    _check_table(x, group, table)
    *outer, k = x.shape
    groups = -(-k // group)
    shape = [*outer, k] if table == "exact" else [*outer, -(-k // TABLE_CODES), 16]
    kind = torch.int32 if table == "exact" else torch.float32
    return (
        x.new_empty(shape, dtype=torch.int8),
        x.new_empty([*outer, groups], dtype=torch.float32),
        x.new_empty([*outer, groups], dtype=kind),
    )


@torch.library.custom_op("graphopt::lut_gemv", mutates_args=(), schema=f"({_OPERANDS}) -> Tensor")
def lut_gemv(
    codes: Tensor,
    scale: Tensor,
    sums: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    table: str = "exact",
    kernel: str = "auto",
    tag: Tensor | None = None,
) -> Tensor:
    """What lut_build gives of x [..., K], times a weight [N, K]: float32 [..., N].

    `kernel` asks for one of several that give the same: "unpack" takes bits apart and multiplies them, "lut" looks sums
    of up to four rows up, "amx" multiplies tiles; "auto" is whichever is fastest. Tables are looked up; exact sums are
    for codes of up to three bits without a codebook. Raises UsageError for operands that do not fit.
    """
    _check_product(
        codes, scale, sums, weight, weight_scale, weight_zero, codebook, bias, bits, group, table, kernel, tag
    )
    if table == "int8":
        return _of_tables(codes, scale, sums, weight, weight_scale, weight_zero, bias, bits, group)
    return _of_codes(codes, scale, sums, weight, weight_scale, weight_zero, codebook, bias, group, tag)


@torch.library.custom_op("graphopt::wq_gemm", mutates_args=(), schema=f"({_OPERANDS}) -> Tensor")
def wq_gemm(
    codes: Tensor,
    scale: Tensor,
    sums: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    table: str = "exact",
    kernel: str = "auto",
    tag: Tensor | None = None,
) -> Tensor:
    """`lut_gemv` for many rows, without tables."""
    _check_product(
        codes, scale, sums, weight, weight_scale, weight_zero, codebook, bias, bits, group, table, kernel, tag
    )
    _check_exact(table, kernel)
    return _of_codes(codes, scale, sums, weight, weight_scale, weight_zero, codebook, bias, group, tag)


@lut_gemv.register_fake
def _(
    codes: Tensor, scale: Tensor, sums: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero: Tensor | None,
    codebook: Tensor | None, bias: Tensor | None, bits: int, group: int, table: str = "exact", kernel: str = "auto",
    tag: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check_product(
        codes, scale, sums, weight, weight_scale, weight_zero, codebook, bias, bits, group, table, kernel, tag
    )
    return scale.new_empty([*scale.shape[:-1], weight.shape[0]])


@wq_gemm.register_fake
def _(
    codes: Tensor, scale: Tensor, sums: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero: Tensor | None,
    codebook: Tensor | None, bias: Tensor | None, bits: int, group: int, table: str = "exact", kernel: str = "auto",
    tag: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check_product(
        codes, scale, sums, weight, weight_scale, weight_zero, codebook, bias, bits, group, table, kernel, tag
    )
    _check_exact(table, kernel)
    return scale.new_empty([*scale.shape[:-1], weight.shape[0]])


def values_of(weight: Tensor, codebook: Tensor | None, tag: Tensor | None, group: int) -> Tensor:
    """What codes [N, K] stand for, as int16."""
    if codebook is None:
        return weight.to(torch.int16)
    if tag is None:
        return codebook.to(torch.int16)[weight.long()]
    which = tag.long().repeat_interleave(group, 1)[:, : weight.shape[1]]
    return codebook.to(torch.int16)[which, weight.long()]


def _of_codes(
    codes: Tensor, scale: Tensor, sums: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero: Tensor | None,
    codebook: Tensor | None, bias: Tensor | None, group: int, tag: Tensor | None,
) -> Tensor:  # fmt: skip
    values = values_of(weight, codebook, tag, group).double()
    total = scale.new_zeros([*scale.shape[:-1], weight.shape[0]])
    for g in range(scale.shape[-1]):
        part = slice(g * group, (g + 1) * group)
        number = (codes[..., part].double() @ values[:, part].t()).to(torch.float32)  # float64 holds the sums exactly
        if weight_zero is not None:
            number = number - weight_zero[:, g] * sums[..., g : g + 1].to(torch.float32)
        total = total + number * (weight_scale[:, g] * scale[..., g : g + 1])
    return total if bias is None else total + bias


def _of_tables(
    codes: Tensor, scale: Tensor, sums: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero: Tensor | None,
    bias: Tensor | None, bits: int, group: int,
) -> Tensor:  # fmt: skip
    n, k = weight.shape
    quads = F.pad(weight, (0, -k % TABLE_CODES)).unflatten(1, (-1, TABLE_CODES))
    total = scale.new_zeros([*scale.shape[:-1], n])
    middle = (2**bits - 1) / 2
    largest = _LARGEST * 2**bits * (min(group, k) // TABLE_CODES + 1)
    exact = torch.float32 if largest < 1 << 24 else torch.float64  # holds the sums
    for g in range(scale.shape[-1]):
        part = slice(g * group // TABLE_CODES, (g + 1) * group // TABLE_CODES)
        entries = codes[..., part, :].flatten(-2).to(exact)
        looked_up = entries @ _times_chosen(quads[:, part], bits, exact).flatten(1).t()
        number = looked_up.to(torch.float32) * (scale[..., g : g + 1] * 0.5)
        offset = middle if weight_zero is None else middle - weight_zero[:, g]
        total = total + weight_scale[:, g] * (number + offset * sums[..., g : g + 1])
    return total if bias is None else total + bias


def _times_chosen(quads: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """How much each entry of the tables counts for codes [N, tables, 4]: [N, tables, 16]."""
    found = torch.zeros(*quads.shape[:2], 16, dtype=dtype)
    for bit in range(bits):
        chosen = sum((quads[..., j] >> bit & 1).long() << j for j in range(TABLE_CODES))
        found.scatter_add_(
            2, torch.as_tensor(chosen)[..., None], torch.full((*quads.shape[:2], 1), 2.0**bit, dtype=dtype)
        )
    return found


def _in_groups(x: Tensor, group: int) -> Tensor:
    """[..., G, group], zeros where the last one ends."""
    k = x.shape[-1]
    size = min(group, k)
    groups: Tensor = F.pad(x, (0, -k % size)).unflatten(-1, (-1, size))
    return groups


def _scale(magnitudes: Tensor) -> Tensor:
    """Of groups [..., G, numbers]; NaN where one is infinite, so that results of the group are NaN."""
    largest = magnitudes.amax(-1)
    return torch.where(largest.isinf(), torch.nan, largest) / _LARGEST


def _step(scale: Tensor) -> Tensor:
    step: Tensor = torch.where(scale > 0, scale, 1.0)[..., None]
    return step


def _rounded(x: Tensor) -> Tensor:
    codes: Tensor = x.round().clamp(-_LARGEST, _LARGEST).nan_to_num(0.0).to(torch.int8)
    return codes


def _bits(numbers: Tensor, count: int) -> Tensor:
    """The lowest `count` bits, along a new last axis."""
    found: Tensor = (numbers.long()[..., None] >> torch.arange(count)) & 1
    return found


def _check_table(x: Tensor, group: int, table: str) -> None:
    if not x.is_floating_point() or x.dim() < 1:
        raise UsageError(f"graphopt::lut_build takes floats with at least one axis, not {x.dtype}{list(x.shape)}")
    _check_choices(group, table, "auto")


def _check_choices(group: int, table: str, kernel: str) -> None:
    if table not in TABLES:
        raise UsageError(f"table is {table!r}; give one of {', '.join(TABLES)}")
    if kernel not in KERNELS:
        raise UsageError(f"kernel is {kernel!r}; give one of {', '.join(KERNELS)}")
    if group < 1:
        raise UsageError(f"group is {group}; give at least 1")
    if table == "int8" and group % TABLE_CODES:
        raise UsageError(f"group is {group}, which tables of {TABLE_CODES} activations do not divide; give a multiple")


def _check_exact(table: str, kernel: str) -> None:
    if table != "exact" or kernel == "lut":
        raise UsageError("graphopt::wq_gemm has no tables; use graphopt::lut_gemv, or table='exact' and kernel='auto'")


def _check_kernel(codebook: Tensor | None, bits: int, table: str, kernel: str) -> None:
    if table == "int8" and kernel not in ("auto", "lut"):
        raise UsageError(f"kernel={kernel!r} multiplies codes, and table='int8' is looked up; use 'auto' or 'lut'")
    if table == "exact" and kernel == "lut" and (bits > MOST_LOOKED_UP or codebook is not None):
        raise UsageError(
            f"kernel='lut' looks exact sums up for codes of up to {MOST_LOOKED_UP} bits without a codebook; use "
            "kernel='auto', or table='int8' for more bits"
        )


def _check_sums(group: int) -> None:
    if group > MOST_GROUP:
        raise UsageError(f"sums of a group of {group} may not fit int32; give a group of at most {MOST_GROUP}")


def _check_product(
    codes: Tensor, scale: Tensor, sums: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero: Tensor | None,
    codebook: Tensor | None, bias: Tensor | None, bits: int, group: int, table: str, kernel: str, tag: Tensor | None,
) -> None:  # fmt: skip
    _check_choices(group, table, kernel)
    if not 1 <= bits <= 8:
        raise UsageError(f"bits is {bits}; give 1 to 8")
    if weight.dtype != torch.uint8 or weight.dim() != 2 or codes.dtype != torch.int8:
        raise UsageError(
            f"low-bit products take uint8 codes [N, K] and int8 activations, not {weight.dtype}{list(weight.shape)} "
            f"and {codes.dtype}"
        )
    _check_kernel(codebook, bits, table, kernel)
    n, k = weight.shape
    _check_sums(min(group, k))
    depth = [k] if table == "exact" else [-(-k // TABLE_CODES), 16]
    rows, groups = list(scale.shape[:-1]), -(-k // group)
    if list(codes.shape) != [*rows, *depth] or any(list(each.shape) != [*rows, groups] for each in (scale, sums)):
        raise UsageError(
            f"activations {list(codes.shape)} with scales {list(scale.shape)} and sums {list(sums.shape)} do not fit a "
            f"weight {[n, k]} in groups of {group}; build them with the same group and table"
        )
    for each in (weight_scale, weight_zero, tag):
        if each is not None and list(each.shape) != [n, groups]:
            raise UsageError(f"{list(each.shape)} does not fit {n} outputs of {groups} groups; give {[n, groups]}")
    if bias is not None and list(bias.shape) != [n]:
        raise UsageError(f"a bias of {list(bias.shape)} does not fit {n} outputs; give {[n]}")
    if codebook is not None and table == "int8":
        raise UsageError("tables of activations serve numbers made of bits, not codebooks; use table='exact'")
    shape = [2**bits] if tag is None else [codebook.shape[0] if codebook is not None else 0, 2**bits]
    if codebook is not None and (codebook.dtype != torch.int8 or list(codebook.shape) != shape):
        raise UsageError(f"a codebook of {bits} bits is int8 {shape}, not {codebook.dtype}{list(codebook.shape)}")
    if tag is not None and codebook is None:
        raise UsageError("a tag chooses between codebooks; give them too")


def _refuse_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    if any(ctx.needs_input_grad):
        raise UsageError(
            "no gradient passes through low-bit products; train before lut-matmul, or run under torch.no_grad()"
        )


def _no_gradient(ctx: Any, *grads: Any) -> tuple[None, ...]:
    return (None,) * 13


for _operator in (lut_build, lut_gemv, wq_gemm):
    _operator.register_autograd(_no_gradient, setup_context=_refuse_gradient)
