"""What happens to codes between products: moves, functions of one code, sums and products of two.

- move: view(dequantize(x)) = dequantize(view(x)), for everything that only moves, repeats or picks the largest element,
  or pads with a number that has a code.
- early: quantize(view(x)) = view(quantize(x)), for what neither repeats nor drops elements.
- pair: quantize(dequantize(x)) with the same parameters is x.
- table: quantize(f(dequantize(x))), f element by element, is a table of 256 codes, f of each code computed now, or x
  itself where every code stays.
- guard: no code stands for NaN, so that what would replace it is not needed.
- constant: quantize of a constant is a constant.
- choice: quantize(where(c, dequantize(x), dequantize(y))) is where(c, x, y), each in the result's parameters.
- sum, product, quotient, matmul: quantize(dequantize(a) + dequantize(b)) on the codes; a clip before the quantize
  narrows its bounds.

All but the last are exact.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from graphopt.edit import Builder, GraphEditor
from graphopt.matcher import argument
from graphopt.operators import integer_elements  # noqa: F401
from graphopt.passes.qdq_fusion.codes import (
    DEQUANTIZE,
    QUANTIZE,
    Codes,
    Constants,
    Into,
    codes_of,
    constant_number,
    into_of,
    only_user,
)
from graphopt.passes.qdq_fusion.padding import is_constant_padding, padding_code
from graphopt.passes.qdq_fusion.products import clip_of
from graphopt.propagate import shape_key

aten, graphopt = torch.ops.aten, torch.ops.graphopt
MOVES = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
        *(aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default),
        *(aten.transpose.int, aten.permute.default, aten.t.default, aten.slice.Tensor, aten.select.int),
        *(aten.contiguous.default, aten.clone.default, aten.index_select.default, aten.gather.default),
        *(aten.pixel_shuffle.default, aten.channel_shuffle.default, aten.roll.default, aten.flip.default),
        *(aten.repeat.default, aten.max_pool2d.default, aten.amax.default, aten.amin.default),
        *(aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default, aten.pad.default, aten.constant_pad_nd.default),
        *(getattr(aten, f"{kind}_pad{n}d").default for kind in ("reflection", "replication") for n in (1, 2)),
    }
)
REARRANGEMENTS = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
        *(aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.transpose.int),
        *(aten.permute.default, aten.t.default, aten.contiguous.default, aten.clone.default),
    }
)
"""Moves whose result has every element of their operand once."""
SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int})
_PAIRS = {
    aten.add.Tensor: graphopt.qadd.default,
    aten.sub.Tensor: graphopt.qadd.default,
    aten.mul.Tensor: graphopt.qmul.default,
    aten.div.Tensor: graphopt.qdiv.default,
}
_MATRICES = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})
_CHOICES: Mapping[Any, tuple[str, str, str]] = {  # the condition, what is taken where it holds and where it does not
    aten.where.self: ("condition", "self", "other"),
    aten.masked_fill.Scalar: ("mask", "value", "self"),
    aten.masked_fill.Tensor: ("mask", "value", "self"),
}
_CHAIN = 32  # element-wise nodes that one table is made of
_MOST = 2**31 - 1  # of a sum in int32


def move(editor: GraphEditor, node: Node, rule: str, constants: Constants) -> bool:
    """dequantize(move(x)) in the place of move(dequantize(x))."""
    if node.target is aten.cat.default:
        return _move_parts(editor, node, rule, constants)
    if node.target is aten.embedding.default:
        source = argument(node, "weight")
        codes = constant_codes(editor, source)
        way = [node]
    elif node.target is operator.getitem and isinstance(node.args[0], Node) and node.args[0].target in SPLITS:
        way = [node.args[0], node]
        source = node.args[0].args[0]
        codes = codes_of(editor, source)
    elif node.target in MOVES:
        way, source = [node], node.args[0]
        codes = codes_of(editor, source)
    else:
        return False
    code = None if codes is None or not is_constant_padding(node) else padding_code(editor, node, codes)
    if codes is None or (is_constant_padding(node) and code is None):
        return False

    def build(builder: Builder) -> list[Node]:
        return [dequantized(builder, _moved_all(builder, way, {source: codes.node}, code), codes, constants)]

    return editor.replace(rule, [node], build)


def quantize_early(editor: GraphEditor, node: Node, rule: str) -> bool:
    """move(quantize(x)) in the place of quantize(move(x)), where nothing else reads what is between."""
    into, (source, way) = into_of(editor, node), _before_moves(node.args[0])
    if into is None or not way:
        return False

    def build(builder: Builder) -> list[Node]:
        codes = builder.call(QUANTIZE, source, *node.args[1:], **node.kwargs)
        return [_moved_all(builder, way, {source: codes})]

    return editor.replace(rule, [node], build, inner=way)


def _before_moves(node: Any) -> tuple[Node, list[Node]]:
    """Where the elements of `node`, which has one reader, come from; and the moves from there, up to `node`."""
    way: list[Node] = []
    while node.target in REARRANGEMENTS and only_user(node) is not None:
        way.insert(0, node)
        node = node.args[0]
    return node, way


def _moved_all(builder: Builder, way: list[Node], values: dict[Node, Node], code: int | None = None) -> Node:
    """The last of these moves, of other values."""
    for node in way:
        values[node] = _moved(builder, node, values, code)
    return values[way[-1]]


def _moved(builder: Builder, node: Node, values: dict[Node, Node], code: int | None) -> Node:
    """The same move of other values, padded with `code`: what may be viewed as numbers may have to be copied as codes,
    and less of it."""
    if code is not None:
        return builder.call(aten.constant_pad_nd.default, values[node.args[0]], argument(node, "pad"), code)  # type: ignore[index]
    if node.target in (aten.view.default, aten._unsafe_view.default):
        return builder.call(aten.reshape.default, values[node.args[0]], node.args[1])  # type: ignore[index]
    return builder.repeat(node, values)


def constant_codes(editor: GraphEditor, source: Any) -> Codes | None:
    """Codes of a constant with one scale."""
    if not isinstance(source, Node) or source.target is not DEQUANTIZE or argument(source, "axis") is not None:
        return None
    codes, scale = (editor.constant_value(argument(source, name)) for name in ("x", "scale"))
    zero = argument(source, "zero_point")
    held = None if zero is None else editor.constant_value(zero)
    if (
        codes is None
        or codes.dtype not in (torch.uint8, torch.int8)
        or scale is None
        or (zero is not None) > (held is not None)
    ):
        return None
    if argument(source, "dtype") != torch.float32 or scale.dtype != torch.float32:
        return None
    return Codes(source.args[0], scale.detach(), 0 if held is None else int(held))  # type: ignore[arg-type]


def _move_parts(editor: GraphEditor, node: Node, rule: str, constants: Constants) -> bool:
    """Parts of equal parameters, or of any where a quantize of the whole says which: each then has its own table, or
    codes made now where it is constant."""
    sources = argument(node, "tensors")
    parts = [codes_of(editor, each) or constant_codes(editor, each) for each in sources]
    numbers = [constant_number(editor, each) for each in sources]
    whole = only_user(node, lambda user: into_of(editor, user) is not None)
    given = [part for part in parts if part is not None]
    if not given or any(part is None and number is None for part, number in zip(parts, numbers, strict=True)):
        return False
    alike = len(given) == len(parts) and all(_alike(part, given[0]) for part in given)
    into = None if whole is None else into_of(editor, whole)
    if not alike and into is None:
        return False

    def build(builder: Builder) -> list[Node]:
        if alike:
            joined = builder.call(aten.cat.default, [part.node for part in given], argument(node, "dim"))
            return [dequantized(builder, joined, given[0], constants)]
        assert into is not None
        found = [
            requantized(editor, builder, part, into)
            if number is None and part is not None
            else builder.constant(into.of(number.detach()))  # type: ignore[union-attr]
            for part, number in zip(parts, numbers, strict=True)
        ]
        return [builder.call(aten.cat.default, found, argument(node, "dim"))]

    return editor.replace(rule, [node if alike or whole is None else whole], build, inner=[] if alike else [node])


def _alike(a: Codes, b: Codes) -> bool:
    return a.dtype == b.dtype and a.zero == b.zero and bool(a.scale == b.scale)


def _same(a: Codes, b: Codes) -> bool:
    return a.node is b.node and _alike(a, b)


def requantized(editor: GraphEditor, builder: Builder, codes: Codes, into: Into) -> Node:
    """Codes with other parameters, by a table where they differ; those of a constant are computed now."""
    if into.equals(codes):
        return codes.node
    table = into.of(numbers_of(codes))
    if (held := editor.constant_value(codes.node)) is not None:
        return builder.constant(graphopt.table256.default(held, table))
    return builder.call(graphopt.table256.default, codes.node, builder.constant(table))


def numbers_of(codes: Codes) -> Tensor:
    """What each code stands for, from the lowest."""
    return (_every_code(codes.dtype).to(torch.int32) - codes.zero).float() * codes.scale


def dequantized(builder: Builder, node: Node, codes: Codes, constants: Constants) -> Node:
    low, high = codes.bounds
    scale, zero = constants.scale(builder, codes.scale), constants.zero(builder, codes.zero, codes.dtype)
    return builder.call(DEQUANTIZE, node, scale, zero, qmin=low, qmax=high, dtype=torch.float32)


# Constants ------------------------------------------------------------------------------------------------------------
def fold_constant(editor: GraphEditor, node: Node, rule: str) -> bool:
    """The codes of a constant, computed now."""
    number = constant_number(editor, node.args[0])
    names = ("scale", "zero_point")
    given = [None if argument(node, name) is None else editor.constant_value(argument(node, name)) for name in names]
    if number is None or given[0] is None or (argument(node, "zero_point") is not None and given[1] is None):
        return False
    with torch.no_grad():
        codes = QUANTIZE(number, *given, **node.kwargs)
    return editor.replace(rule, [node], lambda builder: [builder.constant(codes)])


# Functions of one code ------------------------------------------------------------------------------------------------
def fuse_function(editor: GraphEditor, node: Node, rule: str) -> bool:
    """The quantize `node` of a function of one tensor of codes: the codes themselves, or a table."""
    into = into_of(editor, node)
    found = None if into is None else _chain(editor, node)
    if into is None or found is None:
        return False
    codes, chain, numbers = found
    table = into.of(_values(codes, chain, numbers, node.args[0]))
    if table.dtype == codes.dtype and torch.equal(table, _every_code(codes.dtype)):
        return editor.replace(f"{rule}/pair", [node], lambda builder: [codes.node], inner=chain)
    source, way = _before_moves(codes.node) if only_user(codes.node) else (codes.node, [])

    def build(builder: Builder) -> list[Node]:
        found = builder.call(graphopt.table256.default, source, builder.constant(table))
        return [_moved_all(builder, way, {source: found}) if way else found]

    return editor.replace(f"{rule}/table", [node], build, inner=[*way, *chain])


def _chain(editor: GraphEditor, node: Node) -> tuple[Codes, list[Node], dict[Node, Tensor]] | None:
    """The element-wise nodes between one dequantize and `node`, in order, and the single numbers that they read."""
    shape, pending = shape_key(node.meta["val"]), [node.args[0]]
    chain: dict[Node, None] = {}
    numbers: dict[Node, Tensor] = {}
    found: Codes | None = None
    while pending:
        each = pending.pop()
        assert isinstance(each, Node)
        if each in chain or each in numbers:
            continue
        if (codes := codes_of(editor, each)) is not None and (found is None or _same(codes, found)):
            found = codes
            numbers[each] = numbers_of(codes)
        elif codes is None and (number := constant_number(editor, each)) is not None and number.numel() == 1:
            numbers[each] = number.detach().reshape(())
        elif _is_element_wise(each) and shape_key(each.meta["val"]) == shape and len(chain) < _CHAIN:
            chain[each] = None
            pending += each.all_input_nodes
        else:
            return None
    if found is None or shape_key(found.node.meta["val"]) != shape:
        return None
    inside = {*chain, node}
    if any(user not in inside for each in chain for user in each.users):
        return None
    order = {each: number for number, each in enumerate(editor.graph.nodes)}
    return found, sorted(chain, key=order.__getitem__), numbers


def _is_element_wise(node: Node) -> bool:
    value = node.meta.get("val")
    return is_pointwise(node) and isinstance(value, Tensor) and value.dtype in (torch.float32, torch.bool)


def is_pointwise(node: Node) -> bool:
    """Whether the operator is a function of elements; hardswish lacks the tag."""
    tagged = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
    return tagged or node.target is aten.hardswish.default


def _values(codes: Codes, chain: list[Node], numbers: dict[Node, Tensor], last: Any) -> Tensor:
    """The value of the chain for every code."""
    held = dict(numbers)
    for node in chain:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), held.__getitem__)
        with torch.no_grad():
            held[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return held[last]


def _every_code(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.int32).to(dtype) if dtype == torch.uint8 else torch.arange(-128, 128).to(dtype)


def drop_guard(editor: GraphEditor, node: Node, rule: str) -> bool:
    """x in the place of masked_fill(x, isnan(x), value): no code of a finite scale stands for NaN."""
    if node.target not in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return False
    x, mask = node.args[:2]
    guards = isinstance(mask, Node) and mask.target is aten.isnan.default and mask.args[0] is x
    codes = codes_of(editor, x) if guards else None
    if codes is None or not bool(torch.isfinite(numbers_of(codes)).all()):
        return False
    assert isinstance(mask, Node)
    return editor.replace(rule, [node], lambda builder: [x], inner=[mask])


# Choices --------------------------------------------------------------------------------------------------------------
def fuse_choice(editor: GraphEditor, node: Node, rule: str) -> bool:
    """The quantize `node` of one of two tensors, element by element, each of them codes or a constant."""
    into, source = into_of(editor, node), node.args[0]
    names = _CHOICES.get(source.target) if isinstance(source, Node) else None
    if into is None or names is None or not isinstance(source, Node) or only_user(source) is None:
        return False
    condition, *branches = (argument(source, name) for name in names)
    codes = [codes_of(editor, each) or constant_codes(editor, each) for each in branches]
    numbers = [each if isinstance(each, (int, float)) else constant_number(editor, each) for each in branches]
    if condition.meta["val"].dtype != torch.bool:
        return False
    if any(code is None and number is None for code, number in zip(codes, numbers, strict=True)):
        return False

    def build(builder: Builder) -> list[Node]:
        chosen = []
        for code, number in zip(codes, numbers, strict=True):
            if code is not None:
                chosen.append(requantized(editor, builder, code, into))
            else:
                assert number is not None
                chosen.append(builder.constant(into.of(torch.as_tensor(number, dtype=torch.float32))))
        return [builder.call(aten.where.self, condition, *chosen)]

    return editor.replace(rule, [node], build, inner=[source])


# Functions of two -----------------------------------------------------------------------------------------------------
def fuse_pair(editor: GraphEditor, node: Node, rule: str, constants: Constants) -> str | None:
    """The quantize `node` of a sum, product or matrix product of codes; a reason where it stays for one."""
    into = into_of(editor, node)
    inner: list[Node] = []
    source = node.args[0]
    while into is not None and isinstance(source, Node) and (bounds := clip_of(source)) is not None:
        if only_user(source) is None:
            return None
        into = into.clipped(*bounds)
        inner.append(source)
        source = source.args[0]
    if into is None or not isinstance(source, Node) or source.target not in {*_PAIRS, *_MATRICES}:
        return None
    if only_user(source) is None:
        return f"its numbers are read by {len(source.users)} nodes"
    operands = [codes_of(editor, each) or constant_codes(editor, each) for each in source.args[:2]]
    if operands[0] is None or operands[1] is None:
        return None
    if source.target is aten.div.Tensor and inner:
        return "its quotients may be 0 / 0, which no clip makes a number"
    if source.target in _MATRICES and (reason := _too_deep(operands[0], operands[1])):
        return reason
    if _PAIRS.get(source.target) is graphopt.qadd.default:
        operands[1] = _term(source, operands[1])
    target = _PAIRS.get(source.target, graphopt.qmatmul.default)

    def build(builder: Builder) -> list[Node]:
        given = [part for codes in operands for part in constants.of(builder, codes)]  # type: ignore[arg-type]
        given += constants.parameters(builder, into)
        return [builder.call(target, *given, qmin=into.low, qmax=into.high, dtype=into.dtype)]

    editor.replace(rule, [node], build, inner=[*inner, source])
    return None


def _term(node: Node, codes: Codes) -> Codes:
    """What a sum or difference adds: the second operand times alpha, which its scale takes."""
    factor = float(argument(node, "alpha")) * (-1 if node.target is aten.sub.Tensor else 1)
    return Codes(codes.node, codes.scale * factor, codes.zero)


def fuse_matrices(editor: GraphEditor, node: Node, rule: str, constants: Constants) -> bool:
    """A matrix product of codes that no quantize follows, as numbers."""
    if node.target not in _MATRICES:
        return False
    rounded = only_user(node, lambda user: user.target is QUANTIZE or clip_of(user) is not None)
    operands = [codes_of(editor, each) for each in node.args[:2]]
    a, b = operands
    if rounded is not None or a is None or b is None or _too_deep(a, b):
        return False

    def build(builder: Builder) -> list[Node]:
        given = [part for codes in (a, b) for part in constants.of(builder, codes)]
        return [builder.call(graphopt.qmatmul.default, *given, None, None, dtype=torch.float32)]

    return editor.replace(rule, [node], build)


def _too_deep(a: Codes, b: Codes) -> str | None:
    depth = shape_key(a.node.meta["val"])[-1]
    if isinstance(depth, int) and depth * a.largest * b.largest <= _MOST:
        return None
    return f"sums of {depth} products of two activations may not fit int32"


# Signs ----------------------------------------------------------------------------------------------------------------
def make_unsigned(editor: GraphEditor, node: Node, rule: str, constants: Constants) -> bool:
    """int8 codes, which x86 has no product of with int8 weights, as uint8 with a zero point 128 higher."""
    into = into_of(editor, node)
    readers = sorted(node.users, key=list(editor.graph.nodes).index)
    read = [codes_of(editor, user) for user in readers]
    if into is None or into.dtype != torch.int8 or not readers or any(codes is None for codes in read):
        return False
    moved = Into(into.scale, into.zero + 128, into.low + 128, into.high + 128, torch.uint8, into.reciprocal)

    def build(builder: Builder) -> list[Node]:
        options = {"qmin": moved.low, "qmax": moved.high, "dtype": moved.dtype, "reciprocal": moved.reciprocal}
        codes = builder.call(QUANTIZE, node.args[0], *constants.parameters(builder, moved), **options)
        found = []
        for each in read:
            assert each is not None
            found.append(dequantized(builder, codes, Codes(codes, each.scale, each.zero + 128), constants))
        return found

    return editor.replace(rule, readers, build, inner=[node])
