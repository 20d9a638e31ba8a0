"""Convolution by a constant filter on feature maps stored channels last; others take the generic kernel.

1 x 1 filters are a matrix product over pixels, filters of one channel each run depthwise, the rest directly. Feature
maps of float16 and bfloat16 are widened to float32 as they are stored, their filters where they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from tvm import tirx

from graphopt.backends.bfloat16 import BFLOAT16
from graphopt.backends.choice import Choice, epilogue_parameters, size_parameter
from graphopt.backends.dtypes import DTYPES
from graphopt.backends.kernel import Code, int64
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import computed_in, convert, dtype_of, widened
from graphopt.backends.operators.linear import packed_product
from graphopt.backends.operators.tile_convolution import Placed, on_tiles
from graphopt.backends.operators.views import reshape
from graphopt.backends.operators.widening import as_stored
from graphopt.backends.operators.windows import each_axis, load_at, quotient, surrounded
from graphopt.backends.rules import amx_convolution, depthwise, winograd
from graphopt.backends.rules import convolution as direct
from graphopt.backends.rules.generic import reduce_generic
from graphopt.backends.rules.windows import Window
from graphopt.backends.sizes import Shape, shape_of
from graphopt.backends.tuner.record import Parameter, Workload
from graphopt.backends.values import Index, Lazy, Product, View, inverse, permuted

if TYPE_CHECKING:
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.lowering import Lowering

aten = torch.ops.aten
Lower = Callable[["Lowering", Node], Any]


def _padding(node: Node, argument: Any, taps: Sequence[int], dilations: Sequence[int]) -> tuple[list[int], list[int]]:
    """Elements before and after each spatial axis; "same" puts the odd one after."""
    if argument == "valid":
        return [0] * len(taps), [0] * len(taps)
    if argument == "same":
        totals = [d * (t - 1) for t, d in zip(taps, dilations, strict=True)]
        return [t // 2 for t in totals], [t - t // 2 for t in totals]
    each = each_axis(argument, len(taps))
    return each, each


@dataclass(frozen=True)
class _Call:
    """The arguments of a convolution: numbers for each spatial axis, zeros before and after the input."""

    x: Any
    weight: Any
    bias: Any
    strides: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int


def _call(lowering: Lowering, node: Node, spatial: int) -> _Call:
    given = arguments(node)
    x, weight, bias, groups = (given[name] for name in ("input", "weight", "bias", "groups"))
    stride, padding, dilation = (given[name] for name in ("stride", "padding", "dilation"))
    taps = [int(size) for size in weight.meta["val"].shape[2:]]
    strides, dilations = each_axis(stride, spatial), each_axis(dilation, spatial)
    before, after = _padding(node, padding, taps, dilations)
    x, more_before, more_after = _without_zeros(x, spatial)
    before = [a + b for a, b in zip(before, more_before, strict=True)]
    after = [a + b for a, b in zip(after, more_after, strict=True)]
    return _Call(x, weight, bias, tuple(strides), tuple(before), tuple(after), tuple(dilations), int(groups))


def _without_zeros(x: Node, spatial: int) -> tuple[Node, list[int], list[int]]:
    """What a node that only surrounds its operand with zeros for this one reader adds: (operand, before, after)."""
    nothing = [0] * spatial
    if x.target not in (aten.pad.default, aten.constant_pad_nd.default) or len(x.users) > 1:
        return x, nothing, nothing
    given = arguments(x)
    pairs = [int(pair) for pair in given["pad"]]
    zeros = given.get("mode", "constant") == "constant" and not given["value"]
    if not zeros or len(pairs) > 2 * spatial or min(pairs) < 0:
        return x, nothing, nothing
    pairs += [0] * (2 * spatial - len(pairs))
    return given["self"], pairs[::2][::-1], pairs[1::2][::-1]


def _convolution(spatial: int) -> Lower:
    """x [N, C, ...] or [C, ...], weight [O, C / groups, ...], bias [O] or none."""

    def lower(lowering: Lowering, node: Node) -> Any:
        call = _call(lowering, node, spatial)
        if spatial < 3 and _is_constant(lowering, node, call):
            return _scheduled(lowering, node, call, spatial)
        return _generic(lowering, node, call, spatial)

    return lower


def _is_constant(lowering: Lowering, node: Node, call: _Call) -> bool:
    """A fixed filter, computed with in float32, over a fixed number of channels."""
    weight = lowering.value(call.weight)
    channels = shape_of(call.x.meta["val"])[-len(weight.shape) + 1]
    computed = computed_in(DTYPES[node.meta["val"].dtype])
    return isinstance(weight, torch.Tensor) and computed == "float32" and isinstance(channels, int)


def _scheduled(lowering: Lowering, node: Node, call: _Call, spatial: int) -> Any:
    """Pixels as rows: [N, H, W, C] for images, [N, 1, W, C] for sequences; the result is stored in that order."""
    weight = lowering.value(call.weight)
    shape = shape_of(node.meta["val"])
    batched = len(shape) == spatial + 2
    x = channels_last(lowering, call.x, spatial, _multiplies_pairs(lowering, call, weight))
    order = (0, spatial + 1, *range(1, spatial + 1)) if batched else (spatial, *range(spatial))
    added = None if call.bias is None else lowering.contiguous(call.bias)

    def begin(result: Any) -> Any:
        return result if added is None else _plus_channels(result, added, 1 if batched else 0)

    name = f"conv{spatial}d_{'x'.join(str(int(size)) for size in weight.shape)}"
    if batched and call.groups == weight.shape[0] == x.shape[-1] > 1:
        x = x if x.strides[-1] == 1 else lowering.contiguous(x)
        packed = lowering.weight(weight, "depthwise", depthwise.pack_depthwise)
        each = Window(tuple(weight.shape[2:]), call.strides, call.before, call.dilations)
        target = lowering.target
        return lowering.anchored(
            node,
            lambda result, end: lowering.choose(depthwise.offer(x, packed, result, end, each, name, target)),
            begin,
            order,
        )
    x, filters = (x, weight) if spatial == 2 else (_with_height(x), weight.unsqueeze(2))
    window = Window(tuple(filters.shape[2:]), _both(call.strides, 1), _both(call.before, 0), _both(call.dilations, 1))
    padded = any(call.before) or any(call.after)
    if window.taps == (1, 1) == window.strides and call.groups == 1 and not padded and x.contiguous:
        return packed_product(lowering, node, x, weight.flatten(1), begin, order)
    outputs = tuple(shape[axis] for axis in inverse(order))
    outputs = (*(outputs[:1] if batched else (1,)), *((1,) if spatial == 1 else ()), *outputs[-1 - spatial :])
    scheduled = Scheduled(lowering, x, filters, outputs, window, call.groups, padded, not _becomes_integer(node), name)
    build = scheduled.build_pairs if x.dtype == BFLOAT16 else scheduled.build
    return lowering.anchored(node, build, begin, order)


def _multiplies_pairs(lowering: Lowering, call: _Call, weight: torch.Tensor) -> bool:
    """Whether the target multiplies pairs of bfloat16, and they make some: channels, or columns of a few planes."""
    stored = as_stored(lowering, call.x)
    channels = stored.shape[-weight.dim() + 1]
    if not isinstance(channels, int):
        return False
    planes = channels <= direct.FEW_CHANNELS
    neighbours = weight.shape[-1] > 1 == call.dilations[-1] if planes else weight.shape[1] % 2 == 0
    narrow = stored.dtype == BFLOAT16 and weight.dtype == torch.bfloat16
    return lowering.target.pairs and narrow and neighbours


def _becomes_integer(node: Node) -> bool:
    """Whether somebody casts the result: sums of integers, which minimal filtering would round off."""
    casts = [user.meta["val"].dtype for user in node.users if user.target is aten._to_copy.default]
    return any(not dtype.is_floating_point for dtype in casts)


@dataclass(frozen=True)
class Way:
    """A rule and what it chose."""

    rule: str
    configuration: direct.Configuration | winograd.Configuration


@dataclass(frozen=True, eq=False)
class Scheduled:
    """A convolution of x [N, H, W, C] by constant filters [O, C / groups, KH, KW], directly or by minimal filtering.

    `rounds`: sums may be rounded as minimal filtering does.
    """

    lowering: Lowering
    x: View
    filters: torch.Tensor
    outputs: Shape
    window: Window
    groups: int
    padded: bool
    rounds: bool
    name: str

    def build(self, result: Product, end: Any) -> Code:
        """The kernel of the way that is best as far as is known."""
        target, filters = self.lowering.target, tuple(self.filters.shape)
        shape = (self.outputs, filters, self.groups, self.window)
        possible = self.rounds and self.x.strides[3] == 1 and winograd.is_possible(*shape, target)
        minimal = [winograd.RULE] if possible else []
        default = direct.RULE
        if possible and winograd.suits(*shape, target):
            default = winograd.RULE

        def configure(rule: str) -> Way:
            if rule == winograd.RULE:
                return Way(rule, winograd.configure(self.outputs, int(filters[1]), target))
            return Way(rule, direct.configure(*shape, target))

        def candidates() -> Iterator[Way]:
            yield from map(configure, (direct.RULE, *minimal))
            plain = direct.worth_timing(*shape, target, direct.channels_inner(self.x))
            each = [[Way(direct.RULE, choice) for choice in plain]]
            if possible:
                ways = winograd.worth_timing(self.outputs, int(filters[1]), target)
                each.append([Way(winograd.RULE, choice) for choice in ways])
            yield from (way for ways in zip_longest(*each) for way in ways if way is not None)

        return self.lowering.choose(
            Choice(
                Workload.of("convolution", {**self.parameters(possible), **epilogue_parameters(end)}),
                configure(default),
                candidates,
                lambda way: self.write(way, result, end),
                winograd.TOLERANCE if possible else 0.0,
            )
        )

    def build_pairs(self, result: Product, end: Any) -> Code:
        """Bfloat16 directly, in half as many steps: minimal filtering would save no more products than pairs do.

        On tiles where the target has them.
        """
        target, (outputs, channels, height, width) = self.lowering.target, self.filters.shape
        inner = direct.channels_inner(self.x)
        steps = (channels // 2, height, width) if inner else (channels, height, -(-width // 2))
        shape = (self.outputs, (outputs, *steps), self.groups, self.window, target)
        tiles = amx_convolution.offered(target, self.x, self.outputs, self.window, self.groups)
        return self.lowering.choose(
            Choice(
                Workload.of("convolution", {**self.parameters(False), "products": "pairs", **epilogue_parameters(end)}),
                tiles[0] if tiles else direct.configure(*shape),
                lambda: [*tiles, *direct.worth_timing(*shape, inner)],
                lambda choice: self.write_pairs(choice, inner, result, end),
            )
        )

    def write_pairs(
        self, choice: direct.Configuration | amx_convolution.Configuration, inner: bool, result: Product, end: Any
    ) -> Code:
        """The kernel, its filters packed as it wants them."""
        target = self.lowering.target
        if isinstance(choice, amx_convolution.Configuration):
            placed = Placed(self.x, self.filters, self.outputs, self.window)
            return on_tiles(self.lowering, placed, choice, result, end, self.name)
        columns = choice.tile.vectors * target.lanes
        pack = direct.pack_filter_pairs if inner else direct.pack_planar_pairs
        name = f"{pack.__name__}{columns}"
        packed = self.lowering.weight(self.filters, name, lambda array: pack(array, self.groups, columns))
        padded = self.padded or (not inner and self.filters.shape[3] % 2 == 1)
        plain = direct.Direct(self.x, packed, self.outputs, self.window, self.groups, padded, choice)
        return direct.convolution(plain, result, end, self.name, target)

    def parameters(self, minimal: bool) -> dict[str, Parameter]:
        """What the workload has besides its epilogue."""
        window = self.window
        batch, height, width, outputs = map(size_parameter, self.outputs)
        return {
            **{"batch": batch, "height": height, "width": width, "outputs": outputs},
            **{"inputs": int(self.x.shape[3]), "groups": self.groups, "dtype": DTYPES[self.filters.dtype]},
            **{name: "x".join(map(str, getattr(window, name))) for name in ("taps", "strides", "dilations")},
            **{"padded": self.padded, "channels_inner": direct.channels_inner(self.x), "minimal": minimal},
        }

    def write(self, way: Way, result: Product, end: Any) -> Code:
        """The kernel, its filters packed as it wants them."""
        lowering, choice = self.lowering, way.configuration
        target = lowering.target
        columns = choice.tile.vectors * target.lanes
        if isinstance(choice, winograd.Configuration):
            packed = lowering.weight(
                self.filters, f"winograd{columns}", lambda array: winograd.transform_filters(array, columns)
            )
            call = winograd.Winograd(self.x, packed, self.outputs, self.window, choice)
            return winograd.winograd(call, result, end, self.name, target)
        inner = direct.channels_inner(self.x)
        packed = lowering.weight(
            self.filters,
            f"conv{columns}{'' if inner else 'planar'}",
            lambda array: direct.pack_filters(array, self.groups, columns, inner),
        )
        plain = direct.Direct(self.x, packed, self.outputs, self.window, self.groups, self.padded, choice)
        return direct.convolution(plain, result, end, self.name, target)


def channels_last(lowering: Lowering, argument: Any, spatial: int, narrow: bool = False) -> View:
    """[N, C, ...] in memory as [N, ..., C]: channels beside each other, or in planes where they are few.

    `narrow`: as bfloat16, not widened, planes without gaps.
    """
    value = as_stored(lowering, argument) if narrow else widened(lowering, argument)
    if len(value.shape) == spatial + 1:
        value = reshape(lowering, value, (1, *value.shape))
    order = (0, *range(2, spatial + 2), 1)
    few = int(value.shape[1]) <= direct.FEW_CHANNELS
    if few and narrow:
        value = lowering.contiguous(value)  # pairs are neighbours in memory
    if not isinstance(value, View):
        value = lowering.view(value) if few else lowering.store(value, order)
    view = permuted(value, order)
    if view.strides[-1] != 1 and not few:
        view = lowering.contiguous(view)
    return view


def _with_height(view: View) -> View:
    """[N, W, C] as [N, 1, W, C]."""
    (batch, *shape), (first, *strides) = view.shape, view.strides
    return View(view.storage, (batch, 1, *shape), (first, 0, *strides), view.offset)


def _both(numbers: tuple[int, ...], first: int) -> tuple[int, ...]:
    """The number of a sequence's one axis, with `first` for the height it lacks."""
    return numbers if len(numbers) == 2 else (first, *numbers)


def _plus_channels(value: Any, added: View, axis: int) -> Lazy:
    def element(kernel: Kernel, index: Index) -> Any:
        number = kernel.flat(added.storage)[index.axis(axis)]
        return kernel.load(value, index) + convert(number, value.dtype)

    return Lazy(value.shape, value.dtype, (value, added), element)


def _generic(lowering: Lowering, node: Node, call: _Call, spatial: int) -> Any:
    filters = lowering.view(call.weight)
    source = _batched(lowering, surrounded(lowering, call.x, call.before, call.after), spatial)
    meta = node.meta["val"]
    result, dtype = shape_of(meta), DTYPES[meta.dtype]
    shape = result if len(result) == spatial + 2 else (1, *result)
    outputs_each = int(filters.shape[0]) // call.groups

    def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
        channel, *taps = reduced
        batch, output = index.axis(0), index.axis(1)
        at = [index.axis(2 + n) * call.strides[n] + tap * call.dilations[n] for n, tap in enumerate(taps)]
        first = quotient(output, outputs_each) * int(filters.shape[1]) if call.groups != 1 else 0
        left = load_at(kernel, source, (batch, channel + first, *at))
        right = load_at(kernel, filters, (output, channel, *taps))
        return convert(left, computed_in(dtype)) * convert(right, computed_in(dtype))

    depth, reads = filters.shape[1:], (source, filters)
    stored = reduce_generic(lowering, f"conv{spatial}d", shape, dtype, depth, reads, element, "sum")
    if call.bias is None:
        return reshape(lowering, stored, result)
    return reshape(lowering, _plus_channels(stored, lowering.contiguous(call.bias), 1), result)


def _transposed(spatial: int) -> Lower:
    """conv_transpose: x [N, C, ...], weight [C, O / groups, ...]; each output gathers the taps that reach it."""

    def lower(lowering: Lowering, node: Node) -> Any:
        given = arguments(node)
        x, weight, bias, groups = (given[name] for name in ("input", "weight", "bias", "groups"))
        stride, padding, dilation = (given[name] for name in ("stride", "padding", "dilation"))
        filters = lowering.view(weight)
        source = _batched(lowering, lowering.view(x), spatial)
        strides, pads, dilations = (each_axis(v, spatial) for v in (stride, padding, dilation))
        meta = node.meta["val"]
        result, dtype = shape_of(meta), DTYPES[meta.dtype]
        shape = result if len(result) == spatial + 2 else (1, *result)
        inputs_each, outputs_each = int(filters.shape[0]) // int(groups), int(filters.shape[1])

        def element(kernel: Kernel, index: Index, reduced: tuple[Any, ...]) -> Any:
            channel, *taps = reduced
            output, at, reached = index.axis(1), [], []
            for n, tap in enumerate(taps):
                distance = index.axis(2 + n) + pads[n] - tap * dilations[n]
                position, last = (
                    quotient(tirx.max(distance, int64(0)), strides[n]),
                    kernel.size(source.shape[2 + n]) - 1,
                )
                reached += [distance >= 0, tirx.EQ(position * strides[n], distance), position <= last]
                at.append(tirx.min(position, last))
            group = quotient(output, outputs_each)
            left = load_at(kernel, source, (index.axis(0), group * inputs_each + channel, *at))
            right = load_at(kernel, filters, (group * inputs_each + channel, output - group * outputs_each, *taps))
            product = convert(left, computed_in(dtype)) * convert(right, computed_in(dtype))
            return tirx.Select(tirx.all(*reached), product, tirx.const(0, dtype_of(product)))

        depth, reads = (inputs_each, *filters.shape[2:]), (source, filters)
        stored = reduce_generic(lowering, f"conv_transpose{spatial}d", shape, dtype, depth, reads, element, "sum")
        total = stored if bias is None else _plus_channels(stored, lowering.contiguous(bias), 1)
        return reshape(lowering, total, result)

    return lower


def _batched(lowering: Lowering, view: View, spatial: int) -> View:
    """A batch axis of 1 where there is none."""
    return view if len(view.shape) == spatial + 2 else lowering.view(reshape(lowering, view, (1, *view.shape)))


def _either(lowering: Lowering, node: Node) -> Any:
    """The form that all convolutions have after decomposition."""
    given = arguments(node)
    spatial = len(given["weight"].meta["val"].shape) - 2
    return (_transposed if given["transposed"] else _convolution)(spatial)(lowering, node)


TABLE: dict[Any, Callable[..., Any]] = {
    **{getattr(aten, f"conv{n}d").default: _convolution(n) for n in (1, 2, 3)},
    **{getattr(aten, f"conv{n}d").padding: _convolution(n) for n in (1, 2, 3)},
    aten.conv_transpose1d.default: _transposed(1),
    aten.conv_transpose2d.input: _transposed(2),
    aten.conv_transpose3d.input: _transposed(3),
    aten.convolution.default: _either,
}
