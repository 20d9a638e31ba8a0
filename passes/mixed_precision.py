"""Products of bfloat16 or float16 numbers with float32 sums; norms, softmax and everything else stay in float32.

Before: y = linear(x, w, b)
After:  y = linear(x.to(bfloat16).to(float32), w16.to(float32), b)      w16 is stored as bfloat16

Operands of linear, matrix product, convolution and attention are rounded to 16 bits and cast back, so the program in
PyTorch multiplies 16-bit numbers exactly and sums in float32, with no rounding of sums in between: the meaning of the
instructions that multiply bfloat16 (Intel SDM, VDPBF16PS and TDPBF16PS). Compiled code keeps what is rounded in 16
bits in memory and casts nothing back: half the bytes, and twice the multiply-adds an instruction or more.

Attention takes and gives 16 bits, and its weights are rounded to them before they are multiplied by the values, as in
PyTorch; its scores and softmax are float32.

A value is rounded once, where it is made, and all its readers get the rounded number: views of it are taken of the 16
bits. What no product reads, such as the residual stream before each norm of GPT-2, stays float32. Rows of embeddings
are stored in 16 bits too. Inputs and outputs keep their types.

Where the target multiplies no numbers of this dtype, only weights and tables are stored in it: half the memory and, as
they are read, half the traffic, with products in float32; a note says so. No CPU target multiplies float16: AVX512-FP16
and FMLA of Armv8.2 round every sum to float16, and FMLAL, which sums in float32, multiplies no more numbers than FMLA
does in float32.

bfloat16 has float32's range. float16 has more precision but ends at 65504: what the examples show above 1/16 of that
stays float32, and so do weights beyond it. Declines convolutions of an odd number of channels a group, such as
depthwise ones, which memory bounds, other than images of up to four planes; and products with an operand of one axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.fx import Node

from graphopt.contract import Pass, PassContext, PassResult
from graphopt.edit import Builder, Edit, GraphEditor
from graphopt.matcher import argument
from graphopt.program import Program
from graphopt.registry import find_backend

aten = torch.ops.aten

_CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding})
_ATTENTION = aten.scaled_dot_product_attention.default
OPERANDS: Mapping[Any, tuple[str, ...]] = {
    aten.linear.default: ("input", "weight"),
    aten.addmm.default: ("mat1", "mat2"),
    aten.mm.default: ("self", "mat2"),
    aten.bmm.default: ("self", "mat2"),
    aten.matmul.default: ("self", "other"),
    **dict.fromkeys(_CONVOLUTIONS, ("input", "weight")),
    _ATTENTION: ("query", "key", "value"),
}
_SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int})
VIEWS = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
        *(aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default),
        *(aten.transpose.int, aten.permute.default, aten.t.default, aten.slice.Tensor, aten.select.int),
        *(aten.contiguous.default, aten.clone.default),
    }
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FEW_CHANNELS = 4  # images of so many planes are multiplied by neighbouring columns
_HEADROOM = 16  # how far below the largest float16 a value has to stay on the examples


@dataclass(frozen=True)
class MixedPrecision(Pass):
    """Multiply bfloat16 or float16 numbers, sum in float32, and keep norms, softmax and the rest in float32."""

    name = "mixed-precision"
    preserves = "quantized"
    dtype: Literal["bf16", "fp16"] = "bf16"

    def starts_at(self) -> frozenset[Any]:
        return frozenset({*OPERANDS, aten.embedding.default})

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Edit(program, context, self.name)
        multiplied = multiplies(context.target, self.dtype)
        if not multiplied:
            edit.notes.append(
                f"{context.target} multiplies no {self.dtype}, so only weights are stored in it: half the memory, and "
                "products in float32"
            )
        largest = _largest_values(program) if multiplied and self.dtype == "fp16" else {}
        narrow = _Narrow(DTYPES[self.dtype])
        for editor in edit.graphs():
            self._narrow_tables(editor, narrow)
            products = [node for node in editor.nodes() if self._is_product(editor, node)]
            self._narrow_weights(editor, products, narrow)
            if not multiplied:
                continue
            attentions = [node for node in products if node.target is _ATTENTION]
            self._round_operands(editor, attentions, largest)
            for node in attentions:
                self._narrow_attention(editor, node)
            self._round_operands(editor, [node for node in products if node.target is not _ATTENTION], largest)
        result = edit.finish()
        if result.rewrites:
            result = replace(result, notes=(*result.notes, _accuracy(program, result.program)))
        return result

    def _is_product(self, editor: GraphEditor, node: Node) -> bool:
        """Whether its operands become 16 bits; says why not."""
        if node.target not in OPERANDS:
            return False
        if not isinstance(value := node.meta.get("val"), torch.Tensor) or value.dtype is not torch.float32:
            return False
        reason = None
        if node.target in _CONVOLUTIONS and not _makes_pairs(node):
            groups, channels = argument(node, "groups"), argument(node, "weight").meta["val"].shape[1]
            reason = f"its channels make no pairs: {channels} in each of {groups} groups"
        elif any(operand.meta["val"].dim() < 2 for operand in _operands(node)):
            reason = "an operand has one axis"
        if reason is not None:
            editor.decline(self.name, node, reason)
        return reason is None

    # Weights ----------------------------------------------------------------------------------------------------------
    def _narrow_weights(self, editor: GraphEditor, products: list[Node], narrow: _Narrow) -> None:
        """Constants that products read, each once for all its readers."""
        for weight in dict.fromkeys(operand for node in products for operand in _operands(node)):
            value = editor.constant_value(weight)
            if value is not None and all(user.target in OPERANDS for user in weight.users):
                self._narrow(editor, weight, value, narrow)

    def _narrow_tables(self, editor: GraphEditor, narrow: _Narrow) -> None:
        """Rows of embeddings in 16 bits."""
        for node in editor.nodes():
            if node.target is not aten.embedding.default:
                continue
            table = argument(node, "weight")
            value = editor.constant_value(table)
            if value is None or value.dtype is not torch.float32:
                continue

            def build(builder: Builder, node: Node = node, table: Node = table, value: Any = value) -> list[Node]:
                rows = builder.repeat(node, {table: builder.constant(narrow.of(value))})
                return [builder.call(aten._to_copy.default, rows, dtype=torch.float32)]

            if self._fits(editor, node, value, narrow):
                editor.replace(f"{self.name}/table", [node], build)

    def _narrow(self, editor: GraphEditor, weight: Node, value: torch.Tensor, narrow: _Narrow) -> None:
        if not self._fits(editor, weight, value, narrow):
            return

        def build(builder: Builder) -> list[Node]:
            return [builder.call(aten._to_copy.default, builder.constant(narrow.of(value)), dtype=torch.float32)]

        editor.replace(f"{self.name}/weight", [weight], build)

    def _fits(self, editor: GraphEditor, node: Node, value: torch.Tensor, narrow: _Narrow) -> bool:
        """Whether the weight is float32 and finite in 16 bits wherever it was."""
        if value.dtype is not torch.float32:
            return False
        if bool((narrow.of(value).isfinite() == value.isfinite()).all()):
            return True
        editor.decline(self.name, node, f"its largest value is not finite in {self.dtype}")
        return False

    # Attention --------------------------------------------------------------------------------------------------------
    def _narrow_attention(self, editor: GraphEditor, node: Node) -> None:
        """Once its operands are 16 bits, so are its weights and its result, as PyTorch has it."""
        operands = _operands(node)
        if not all(_is_widened(operand) for operand in operands):
            return
        sources = {operand: operand.all_input_nodes[0] for operand in operands}

        def build(builder: Builder) -> list[Node]:
            return [builder.call(aten._to_copy.default, builder.repeat(node, sources), dtype=torch.float32)]

        editor.replace(f"{self.name}/attention", [node], build)

    # Activations ------------------------------------------------------------------------------------------------------
    def _round_operands(self, editor: GraphEditor, products: list[Node], largest: Mapping[str, float]) -> None:
        for origin, ways in origins(editor, products).items():
            limit = largest.get(editor.full_name(origin), 0.0)
            if limit * _HEADROOM > torch.finfo(DTYPES[self.dtype]).max:
                reason = f"it reaches {limit:g} on the examples, too near to the largest {self.dtype}"
                editor.decline(self.name, origin, reason)
            else:
                self._round(editor, origin, ways)

    def _round(self, editor: GraphEditor, origin: Node, ways: list[Node]) -> None:
        """Round `origin`; `ways` are views between it and products, and are taken of the rounded value."""
        inside = {origin, *ways}
        known = origin.all_input_nodes[0] if _is_widened(origin) else None
        candidates = ways if known is not None else [origin, *ways]
        ends = [node for node in candidates if _is_tensor(node) and any(user not in inside for user in node.users)]

        def build(builder: Builder) -> list[Node]:
            at = following(origin)
            with builder.graph.inserting_before(at):
                narrow = known or builder.call(aten._to_copy.default, origin, dtype=DTYPES[self.dtype])
                values, wide = {origin: narrow}, {}
                if origin in ends:
                    wide[origin] = builder.call(aten._to_copy.default, narrow, dtype=torch.float32)
            for node in ways:
                with builder.graph.inserting_before(node):
                    values[node] = builder.repeat(node, values)
                    if node in ends:
                        wide[node] = builder.call(aten._to_copy.default, values[node], dtype=torch.float32)
            return [wide[node] for node in ends]

        editor.replace(self.name, ends, build, inner=[node for node in ways if node not in ends])


class _Narrow:
    """Weights in 16 bits, each once however often it is read."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the weight, so that its id stays its own

    def of(self, value: torch.Tensor) -> torch.Tensor:
        if id(value) not in self._made:
            self._made[id(value)] = value, value.detach().to(self.dtype).contiguous()
        return self._made[id(value)][1]


def origins(editor: GraphEditor, products: list[Node]) -> dict[Node, list[Node]]:
    """What makes the operands of products, with the views between, in order of execution."""
    found: dict[Node, dict[Node, None]] = {}
    for product in products:
        for operand in _operands(product):
            way: list[Node] = []
            node = operand
            while _is_view(node) and node.args and isinstance(node.args[0], Node):
                way.append(node)
                node = node.args[0]
            if node.op == "get_attr" or not _is_tensor(node) or node.meta["val"].dtype is not torch.float32:
                continue
            if _is_widened(node) and not way:
                continue  # rounded already
            found.setdefault(node, {}).update(dict.fromkeys(way))
    order = {node: number for number, node in enumerate(editor.graph.nodes)}
    return {origin: sorted(ways, key=order.__getitem__) for origin, ways in found.items()}


def _makes_pairs(convolution: Node) -> bool:
    """Whether a kernel finds neighbours to multiply: channels of a group, or columns of an image of few planes."""
    _, channels, *taps = argument(convolution, "weight").meta["val"].shape
    if channels * argument(convolution, "groups") > _FEW_CHANNELS:
        return bool(channels % 2 == 0)
    dilation = argument(convolution, "dilation")
    return bool(taps[-1] > 1) and (dilation if isinstance(dilation, int) else dilation[-1]) == 1


def _operands(product: Node) -> list[Node]:
    found = [argument(product, name) for name in OPERANDS[product.target]]
    return [operand for operand in found if isinstance(operand, Node)]


def _is_view(node: Node) -> bool:
    return node.target in VIEWS or node.target in _SPLITS or getattr(node.target, "__name__", "") == "getitem"


def _is_widened(node: Node) -> bool:
    """Whether it is 16 bits in float32."""
    return node.target is aten._to_copy.default and node.all_input_nodes[0].meta["val"].dtype in DTYPES.values()


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def following(node: Node) -> Node:
    """The first node behind `node` that is no input of the graph."""
    found = node.next
    while found.op == "placeholder":
        found = found.next
    return found


def multiplies(target: str, dtype: str) -> bool:
    """Whether kernels for the target multiply numbers of this dtype as such."""
    if not target.startswith("cpu"):
        return True
    return dtype == "bf16" and bool(find_backend(target).resolve_target(target).pairs)


def _largest_values(program: Program) -> dict[str, float]:
    """The largest magnitude of every float32 value of the main graph on the examples, by name."""
    found: dict[str, float] = {}

    class Watching(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor) and value.dtype is torch.float32 and value.numel():
                found[n.name] = float(value.detach().abs().nan_to_num().max())
            return value

    state = tuple(item.initial for item in program.state)
    with torch.no_grad():
        Watching(program.graph_module).run(*program.examples, *state)
    return found


def _accuracy(before: Program, after: Program) -> str:
    """The largest difference of each output on the examples, relative to its largest value."""
    parts = []
    for spec, old, new in zip(before.outputs, before(*before.examples), after(*after.examples), strict=True):
        if old.is_floating_point() and old.numel():
            scale = float(old.abs().max()) or 1.0
            parts.append(f"{spec.name} {float((new - old).abs().max()) / scale:.2g}")
    return f"largest difference on the examples, relative to the largest value: {', '.join(parts) or 'none'}"
