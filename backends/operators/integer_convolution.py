"""graphopt::qconv: feature maps of codes stored channels last, as `convolution` has those of numbers.

1 x 1 filters are a matrix product over pixels, filters of one channel each run depthwise, the rest directly. Channels
that are no whole words are padded with some that no weight is multiplied by or, in groups, take the generic kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.choice import Choice, epilogue_parameters, size_parameter
from graphopt.backends.kernel import Code
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.integer_products import (
    FURTHEST,
    Call,
    ending,
    in_whole_words,
    packed_integer_product,
    stored_codes,
    to_words,
)
from graphopt.backends.operators.shifted_weights import missing_of_windows
from graphopt.backends.operators.tile_convolution import Placed, on_tiles
from graphopt.backends.operators.windows import load_at, quotient
from graphopt.backends.rules import amx_convolution, depthwise, depthwise_words
from graphopt.backends.rules import convolution as direct
from graphopt.backends.rules.generic import reduce_generic
from graphopt.backends.rules.integer_convolution import RULE, integer_convolution, pack_filter_words
from graphopt.backends.rules.integer_gemm import words_of
from graphopt.backends.rules.windows import Window
from graphopt.backends.sizes import Shape, shape_of
from graphopt.backends.tuner.record import Workload
from graphopt.backends.values import Index, Product, Value, View, inverse, permutation, permuted

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

ORDER = (0, 3, 1, 2)  # of the result's axes in what is stored, [N, OH, OW, O]
_EACH_BYTE = 0x01010101  # times a code: a word of four
_EXACT = 2**24  # below which whole numbers are exact in float32


def _convolution(lowering: Lowering, node: Node) -> Any:
    call, given = Call.of(lowering, node), arguments(node)
    strides, pads, dilations = (tuple(int(n) for n in given[name]) for name in ("stride", "padding", "dilation"))
    window = Window(tuple(call.weight.shape[2:]), strides, pads[:2], dilations)  # shapes say how far it goes on
    groups, inputs, words = int(given["groups"]), int(call.weight.shape[1]), words_of(lowering.target)
    if groups > 1 and inputs == 1 and groups == call.weight.shape[0] and exact_in_float(call.weight):
        return _depthwise(lowering, node, call, window)
    if groups > 1 and inputs % words.codes:
        return _generic(lowering, node, call, window, groups)
    return _direct(lowering, node, call, window, groups, any(pads))


def _depthwise(lowering: Lowering, node: Node, call: Call, window: Window) -> View:
    """In words of four rows of taps where they exist, else in float32, where these sums of whole numbers are exact."""
    target, words = lowering.target, words_of(lowering.target)
    narrow = call.weight.dtype == torch.int8
    if narrow and depthwise_words.fits(shape_of(call.x.meta["val"]), shape_of(node.meta["val"]), target):
        value, zero = stored_codes(lowering.tensor(call.x), call.zero, words)
        codes = channels_last(lowering, value, 1)
        outputs = int(node.meta["val"].shape[3])
        packing = lambda array: depthwise_words.pack_depthwise_words(array, outputs)  # noqa: E731
        held = lowering.weight(call.weight, f"depthwise-words-{outputs}", packing)
        title = f"qconv_{'x'.join(map(str, call.weight.shape))}"
        return lowering.anchored(
            node,
            lambda result, end: lowering.choose(
                depthwise_words.offer(codes, held, result, end, window, title, target, zero)
            ),
            ending(lowering, call, call.weight, zero, 1),
            ORDER,
            sums="int32",
        )
    x = channels_last(lowering, lowering.tensor(call.x), 1)
    packed = lowering.weight(call.weight, "depthwise", depthwise.pack_depthwise)
    name = f"qconv_{'x'.join(map(str, call.weight.shape))}"
    return lowering.anchored(
        node,
        lambda result, end: lowering.choose(
            depthwise.offer(x, packed, result, end, window, name, lowering.target, call.zero)
        ),
        ending(lowering, call, call.weight, 0, 1),
        ORDER,
        sums="float32",
    )


def exact_in_float(weight: torch.Tensor) -> bool:
    """Whether sums of products of codes less a zero point and these are, however they are added up."""
    largest = 128 if weight.dtype == torch.int8 else 255
    return int(np.prod(weight.shape[1:])) * FURTHEST * largest < _EXACT


def _direct(lowering: Lowering, node: Node, call: Call, window: Window, groups: int, padded: bool) -> View:
    words = words_of(lowering.target)
    value, zero = stored_codes(lowering.tensor(call.x), call.zero, words)
    x = channels_last(lowering, value, words.codes)
    filters, name = call.shifted.codes, f"qconv_{'x'.join(map(str, call.weight.shape))}"
    missing, shift, shape = None, call.shifted.shift, shape_of(node.meta["val"])
    if shift is not None:
        channels = int(call.weight.shape[1]) * groups
        missing = missing_of_windows(lowering, shift, x, zero, channels, groups, window, shape)
    begin = ending(lowering, call, filters, zero, 1, missing)
    return packed_convolution(lowering, node, x, filters, window, groups, padded, zero, begin, name)


def packed_convolution(
    lowering: Lowering,
    node: Node,
    x: View,
    filters: torch.Tensor,
    window: Window,
    groups: int,
    padded: bool,
    zero: int,
    begin: Callable[[Any], Any],
    name: str,
) -> View:
    """x [N, H, W, C] of stored codes, channels in whole words, by int8 filters [O, C / groups, KH, KW] with the node's
    epilogue; `zero` is outside of x."""
    target, words, shape = lowering.target, words_of(lowering.target), shape_of(node.meta["val"])
    if window.taps == (1, 1) == window.strides and groups == 1 and not padded and x.contiguous:
        return packed_integer_product(lowering, node, x, filters.flatten(1), begin, name, ORDER)
    whole = filters if groups > 1 else to_words(filters, words)  # channels beside each other in whole words
    outputs = tuple(shape[axis] for axis in inverse(ORDER))
    depth = (whole.shape[0], whole.shape[1] // words.codes, *whole.shape[2:])
    tiles = amx_convolution.offered(target, x, outputs, window, groups)

    def build(result: Product, end: Any) -> Code:
        def write(choice: direct.Configuration | amx_convolution.Configuration) -> Code:
            if isinstance(choice, amx_convolution.Configuration):
                placed = Placed(x, whole, outputs, window, zero * _EACH_BYTE)
                return on_tiles(lowering, placed, choice, result, end, name)
            columns = choice.tile.vectors * target.lanes
            packed = lowering.weight(
                whole,
                f"convwords{words.codes}x{columns}",
                lambda array: pack_filter_words(array, groups, columns, words),
            )
            plain = direct.Direct(x, packed, outputs, window, groups, padded, choice)
            return integer_convolution(plain, zero, result, end, name, target)

        given = (outputs, depth, groups, window, target)
        return lowering.choose(
            Choice(
                _workload(x, outputs, whole.shape, window, groups, padded, words.codes, end),
                tiles[0] if tiles else direct.configure(*given, words.temporaries),
                lambda: [*tiles, *direct.worth_timing(*given, True, words.temporaries)],
                write,
            )
        )

    return lowering.anchored(node, build, begin, ORDER, sums="int32")


def _workload(
    x: View, outputs: Shape, filters: Shape, window: Window, groups: int, padded: bool, codes: int, end: Any
) -> Workload:
    batch, height, width, channels = map(size_parameter, outputs)
    return Workload.of(
        RULE,
        {
            **{"batch": batch, "height": height, "width": width, "outputs": channels, "inputs": int(x.shape[3])},
            **{"groups": groups, "codes": codes, "padded": padded},
            **{name: "x".join(map(str, getattr(window, name))) for name in ("taps", "strides", "dilations")},
            **epilogue_parameters(end),
        },
    )


def channels_last(lowering: Lowering, value: Value, codes: int) -> View:
    """[N, C, H, W] in memory as [N, H, W, C], its channels padded to whole words of `codes`."""
    order = (0, 2, 3, 1)
    if isinstance(value, View):
        return in_whole_words(lowering, permuted(value, order), codes)
    if int(value.shape[1]) % codes == 0:
        return in_whole_words(lowering, permuted(lowering.store(value, order), order), codes)
    return in_whole_words(lowering, permutation(value, order), codes)


def _generic(lowering: Lowering, node: Node, call: Call, window: Window, groups: int) -> Any:
    """Small groups of channels that are no whole words: plain loops."""
    x, filters = lowering.view(call.x), lowering.weight(call.weight)
    sums = sums_by_loops(lowering, shape_of(node.meta["val"]), x, filters, call.zero, window, groups)
    return ending(lowering, call, call.weight, 0, 1)(sums)


def sums_by_loops(
    lowering: Lowering, shape: Shape, x: View, filters: View, zero: int, window: Window, groups: int
) -> View:
    """int32 sums [N, O, OH, OW] of x - zero, [N, C, H, W], by filters [O, C / groups, KH, KW]."""
    outputs_each, inputs_each = int(filters.shape[0]) // groups, int(filters.shape[1])

    def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        channel, *taps = reduced
        output, inside, at = index.axis(1), [], []
        for n, tap in enumerate(taps):
            place = index.axis(2 + n) * window.strides[n] + tap * window.dilations[n] - window.pads[n]
            last = kernel.size(x.shape[2 + n]) - 1
            inside += [place >= 0, place <= last]
            at.append(tirx.max(tirx.min(place, last), tirx.const(0, "int64")))
        first = quotient(output, outputs_each) * inputs_each
        code = load_at(kernel, x, (index.axis(0), channel + first, *at)).astype("int32")
        factor = load_at(kernel, filters, (output, channel, *taps)).astype("int32")
        product = (code - tirx.const(zero, "int32")) * factor
        return tirx.Select(tirx.all(*inside), product, tirx.const(0, "int32"))

    depth = tuple(int(size) for size in filters.shape[1:])
    return reduce_generic(lowering, "qconv", shape, "int32", depth, (x, filters), element, "sum")


TABLE: dict[Any, Callable[..., Any]] = {torch.ops.graphopt.qconv.default: _convolution}
