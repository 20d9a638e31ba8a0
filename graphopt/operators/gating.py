"""graphopt::gated_convolution and graphopt::gated_linear: products that leave out whole blocks of channels.

The functions here are the specification. Channels are numbered in blocks of `block`, and each sample says which of
them take part: an input block that does not counts as zero, whatever it holds, and an output block that does not is
zero, bias included. Where every block is active the result is that of the plain product. A mask is left out where all
blocks always take part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import UsageError

LANES = 16  # a block is a multiple of so many channels: no target's vector is wider

aten = torch.ops.aten


@torch.library.custom_op(
    "graphopt::gated_convolution",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? active_inputs, Tensor? active_outputs, *, int[] stride, "
    "int[] padding, int[] dilation, int groups=1, int block=16) -> Tensor",
)
def gated_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    active_inputs: Tensor | None,
    active_outputs: Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    block: int = LANES,
) -> Tensor:
    """conv2d of x [N, C, H, W] by weight [O, C / groups, KH, KW], bias [O] or none.

    `active_inputs` [N, C / block] and `active_outputs` [N, O / block] are bool. With groups=C the convolution is
    depthwise, and only its outputs may be left out. Raises UsageError for masks and blocks that do not fit.
    """
    _check_convolution(x, weight, active_inputs, active_outputs, groups, block)
    given = _gated(x, active_inputs, 1, block)
    result = aten.conv2d.default(given, weight, bias, list(stride), list(padding), list(dilation), groups)
    return _gated(result, active_outputs, 1, block).contiguous()


@gated_convolution.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    active_inputs: Tensor | None,
    active_outputs: Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    block: int = LANES,
) -> Tensor:
    _check_convolution(x, weight, active_inputs, active_outputs, groups, block)
    result = aten.conv2d.default(x, weight, bias, list(stride), list(padding), list(dilation), groups)
    return x.new_empty(result.shape)


@torch.library.custom_op(
    "graphopt::gated_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? active_inputs, Tensor? active_outputs, *, int block=16) "
    "-> Tensor",
)
def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    active_inputs: Tensor | None,
    active_outputs: Tensor | None,
    *,
    block: int = LANES,
) -> Tensor:
    """linear of x [N, ..., K] by weight [O, K], bias [O] or none; all rows of a sample share its masks.

    `active_inputs` [N, K / block] and `active_outputs` [N, O / block] are bool. Raises UsageError as above.
    """
    _check(x, x.shape[-1], weight.shape[0], active_inputs, active_outputs, block)
    given = _gated(x, active_inputs, x.ndim - 1, block)
    result = aten.linear.default(given, weight, bias)
    return _gated(result, active_outputs, x.ndim - 1, block).contiguous()


@gated_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    active_inputs: Tensor | None,
    active_outputs: Tensor | None,
    *,
    block: int = LANES,
) -> Tensor:
    _check(x, x.shape[-1], weight.shape[0], active_inputs, active_outputs, block)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _gated(x: Tensor, active: Tensor | None, axis: int, block: int) -> Tensor:
    """x with zeros in the channels along `axis` whose block is not active."""
    if active is None:
        return x
    shape = [-1 if number == axis else 1 for number in range(x.ndim)]
    shape[0] = x.shape[0]
    return torch.where(active.repeat_interleave(block, 1).reshape(shape), x, 0)


def _check_convolution(
    x: Tensor, weight: Tensor, inputs: Tensor | None, outputs: Tensor | None, groups: int, block: int
) -> None:
    if x.ndim != 4 or weight.ndim != 4:
        raise UsageError(f"a gated convolution takes [N, C, H, W], not {list(x.shape)}; add the batch axis")
    if groups != 1 and (inputs is not None or not groups == weight.shape[0] == x.shape[1]):
        raise UsageError(f"a gated convolution of {groups} groups has to be depthwise, without active_inputs")
    _check(x, x.shape[1], weight.shape[0], inputs, outputs, block)


def _check(x: Tensor, channels: int, made: int, inputs: Tensor | None, outputs: Tensor | None, block: int) -> None:
    if block < 1 or block % LANES:
        raise UsageError(f"blocks of {block} channels must be a multiple of {LANES}")
    for what, active, count in (("active_inputs", inputs, channels), ("active_outputs", outputs, made)):
        if active is None:
            continue
        if active.dtype != torch.bool:
            raise UsageError(f"{what} is {active.dtype}; give bool, such as scores > 0")
        if count % block or active.ndim != 2 or active.shape[1] * block != count or active.shape[0] != x.shape[0]:
            raise UsageError(
                f"{what} is {list(active.shape)} where {count} channels of {x.shape[0]} samples in blocks of {block} "
                "need one entry a block"
            )


def _keep(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _gradients(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Those of the specification: what is left out has and passes none."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *given, inputs, outputs = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [
                None if tensor is None else tensor.detach().requires_grad_(needed)
                for tensor, needed in zip(given, ctx.needs_input_grad, strict=False)
            ]
            result = operator(*leaves, inputs, outputs, **ctx.options)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(result, wanted, grad))
        return (*(next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves), None, None)

    return backward


gated_convolution.register_autograd(_gradients(gated_convolution._init_fn), setup_context=_keep)
gated_linear.register_autograd(_gradients(gated_linear._init_fn), setup_context=_keep)
