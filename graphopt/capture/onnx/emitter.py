"""Appends ATen calls to a graph, each with its fake value, without tracing.

Fake values are interned: two of the same type, sizes and strides are one object. A call whose operator and arguments
were seen before, up to identity of the fakes, takes the result of that call, so the layers of a model after the first
cost next to nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from graphopt.capture.onnx.binding import Binding
from graphopt.capture.onnx.values import SYMBOLIC, Known, Tensor
from graphopt.capture.onnx.weights import Weights
from graphopt.errors import CaptureError
from graphopt.program import PROVENANCE, get_attribute
from graphopt.propagate import fake_constant, size_key

aten = torch.ops.aten

# Their fake kernels choose a back end by the batch size: guards such as s0 < 16 say nothing about the result.
_CHOOSES_BACKEND = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
}  # fmt: skip

_EXPRESSIONS: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Pow": operator.pow,
    "PowByNatural": operator.pow,
}


MOST_TERMS = 1000  # of the expression of a size; sympy takes time exponential in its depth


class Emitter:
    """Builds one graph; `origin`, the ONNX node at hand, and `provenance` are written on every node."""

    def __init__(self, mode: FakeTensorMode, binding: Binding) -> None:
        self.mode = mode
        self.binding = binding
        self.graph = Graph()
        self.weights = Weights()
        self.origin = ""
        self.provenance: dict[str, Any] | None = None  # of the program that the file was written from
        self._interned: dict[Any, torch.Tensor] = {}
        self._results: dict[Any, Any] = {}
        self._sizes: dict[Any, Node] = {}
        self._terms: dict[Any, int] = {}  # of every expression seen
        self._attributes: dict[str, Tensor] = {}
        self._transposed: dict[str, str] = {}
        self._branches = 0

    def placeholder(self, name: str, fake: torch.Tensor) -> Tensor:
        node = self.graph.placeholder(name)
        node.meta["val"] = self._intern(fake)
        return Tensor(node, node.meta["val"])

    def name_size(self, size: torch.SymInt, source: Tensor, axis: int) -> None:
        """The node from which a symbolic size is read."""
        node = self.graph.call_function(aten.sym_size.int, (source.node, axis))
        node.meta["val"] = size
        self._sizes[size.node.expr] = node

    def attribute(self, target: str) -> Tensor:
        """The node that reads a held tensor, one for each."""
        if target not in self._attributes:
            node = self.graph.create_node("get_attr", target)
            node.meta["val"] = self._intern(fake_constant(self.mode, get_attribute(self.weights.root, target)))
            self._attributes[target] = Tensor(node, node.meta["val"])
        return self._attributes[target]

    def transposed(self, value: Tensor) -> Tensor | None:
        """The weight of a linear layer, [out, in], for one that the file holds as [in, out]; None for other values.

        Codes that are dequantized are turned, not the numbers; numbers that are turned behind them were [out, in].
        """
        node = value.node
        if node.target is aten.permute.default and node.args[1] == [1, 0]:
            source = node.args[0]
            assert isinstance(source, Node)
            return Tensor(source, source.meta["val"]) if _is_dequantized(source) else None
        if node.target is torch.ops.graphopt.dequantize.default and value.ndim == 2:
            return self._transposed_codes(node)
        return self._turned(node) if node.op == "get_attr" and value.dtype.is_floating_point else None

    def _transposed_codes(self, node: Node) -> Tensor | None:
        tensors: list[Tensor | None] = []
        for part in node.args:
            if not isinstance(part, Node):
                tensors.append(None)
            elif part.meta["val"].ndim < 2:
                tensors.append(Tensor(part, part.meta["val"]))
            elif (turned := self._turned(part)) is not None:
                tensors.append(turned)
            else:
                return None
        settings: dict[str, Any] = dict(node.kwargs)
        if settings.get("axis") is not None:
            settings["axis"] = 1 - settings["axis"]
        result: Tensor = self.call(node.target, *tensors, **settings)
        return result

    def _turned(self, node: Node) -> Tensor | None:
        """The transpose of a matrix that the file holds, held once."""
        if node.op != "get_attr" or node.meta["val"].ndim != 2:
            return None
        name = str(node.target)
        if name not in self._transposed:
            held = get_attribute(self.weights.root, name)
            turned = held.detach().t().contiguous()
            trainable = isinstance(held, torch.nn.Parameter)
            tied = self._embedded(turned)
            self._transposed[name] = tied or self.weights.add(f"{name}_transposed", turned, trainable=trainable)
        return self.attribute(self._transposed[name])

    def _embedded(self, weight: torch.Tensor) -> str | None:
        """The table of an embedding that a projection to the vocabulary shares, which exporters write out again."""
        for node in self.graph.find_nodes(op="call_function", target=aten.embedding.default):
            table = self.held(node.args[0])
            if table is None or table.shape != weight.shape or table.dtype != weight.dtype:
                continue
            if torch.equal(table[:1], weight[:1]) and torch.equal(table, weight):
                return str(node.args[0].target)
        return None

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Append one call; known arrays among its arguments become tensors. Returns a Tensor, or a tuple of them."""
        args, kwargs = pytree.tree_map_only(Known, self.tensor, (args, kwargs))
        key = (target, _key(args), _key(kwargs))
        if key not in self._results:
            self._results[key] = self._evaluate(target, args, kwargs)
        result = self._results[key]
        if isinstance(result, str):
            raise RuntimeError(result)
        return self._append(target, args, kwargs, result)

    def try_call(self, target: Any, *args: Any) -> Tensor | None:
        """Like `call`, None where the operator refuses its arguments."""
        key = (target, _key(args), ())
        if key not in self._results:
            try:
                self._results[key] = self._evaluate(target, args, {})
            except (RuntimeError, ValueError) as error:
                self._results[key] = str(error)
        return None if isinstance(self._results[key], str) else self.call(target, *args)

    def tensor(self, value: Known | Tensor) -> Tensor:
        """Any value as a tensor of the graph."""
        if isinstance(value, Tensor):
            return value
        if not isinstance(value, Known):
            raise CaptureError("a sequence stands where a tensor must; take it apart with SequenceAt in the model")
        if not value.symbolic:
            return self.attribute(self.weights.constant(value.tensor()))
        items: list[Tensor] = [self.call(aten.scalar_tensor.default, item, dtype=value.dtype) for item in value.items()]
        if value.ndim == 0:
            return items[0]
        stacked: Tensor = self.call(aten.stack.default, items)
        return stacked if value.ndim == 1 else self.reshape(stacked, list(value.shape))

    def reshape(self, value: Tensor, sizes: Sequence[Any]) -> Tensor:
        """A view, of a copy where the strides do not allow one: the normal form of a reshape."""
        view = self.try_call(aten.view.default, value, list(sizes))
        if view is not None:
            return view
        copy = self.call(aten.clone.default, value, memory_format=torch.contiguous_format)
        result: Tensor = self.call(aten.view.default, copy, list(sizes))
        return result

    def local(self, value: Tensor) -> Tensor:
        """A value of this graph, or of one around it, as a value of this graph."""
        return value

    def outside(self, node: Node) -> tuple[Emitter, Node] | None:
        """For a placeholder that stands for a value of the graph around this one: that graph's emitter and node."""
        return None

    def held(self, node: Node) -> torch.Tensor | None:
        """The tensor that a node reads from the model; None for nodes that compute."""
        return get_attribute(self.weights.root, str(node.target)) if node.op == "get_attr" else None

    def holder(self) -> torch.nn.Module:
        """The module that the graph's branches are attributes of."""
        return self.weights.root

    def cond(self, predicate: Tensor, branches: Sequence[GraphModule], operands: Sequence[Tensor]) -> list[Tensor]:
        """`torch.cond`, whose branches give values of the same types; operands are those of their placeholders."""
        graphs: list[Any] = []
        for side, branch in zip(("true", "false"), branches, strict=True):
            name = f"{side}_graph_{self._branches}"
            setattr(self.holder(), name, branch)
            graphs.append(self.graph.get_attr(name))
        self._branches += 1
        results = branches[0].graph.output_node().meta["val"]
        nodes: Any = (self.local(predicate).node, *graphs, tuple(self.local(value).node for value in operands))
        node = self.graph.call_function(torch.ops.higher_order.cond, nodes)
        self._describe(node, results)
        return self._items(node, results)

    def number(self, size: Any) -> Any:
        """A size as an argument of a node: a number, or the one node that computes its expression."""
        return self._expression(size.node.expr) if isinstance(size, SYMBOLIC) else size

    def _expression(self, expression: Any) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression.is_Float or expression.is_Rational:
            return float(expression)
        if expression not in self._sizes and expression.is_Symbol:
            self._sizes[expression] = self._outer_size(expression)
        if expression not in self._sizes:
            function = _EXPRESSIONS.get(type(expression).__name__)
            if function is None:
                raise CaptureError(f"a size depends on others as {expression}, which graphopt cannot express")
            parts = [self._expression(part) for part in expression.args]
            self._sizes[expression] = reduce(lambda left, right: self._combine(function, left, right), parts)
        return self._sizes[expression]

    def _outer_size(self, symbol: Any) -> Node:
        raise CaptureError(f"the size {symbol} belongs to no input")

    def _combine(self, function: Callable[..., Any], left: Any, right: Any) -> Node:
        node = self.graph.call_function(function, (left, right))
        node.meta["val"] = function(*(part.meta["val"] if isinstance(part, Node) else part for part in (left, right)))
        return node

    def _evaluate(self, target: Any, args: Any, kwargs: Any) -> Any:
        values, named = pytree.tree_map_only(Tensor, lambda tensor: tensor.fake, (args, kwargs))
        environment = self.mode.shape_env
        assert environment is not None
        quiet: AbstractContextManager[Any] = nullcontext()
        if target in _CHOOSES_BACKEND:
            quiet = environment.suppress_guards()
        # Without the Python dispatcher, pad asks for concrete sizes and so fixes them.
        with torch.no_grad(), self.mode, enable_python_dispatcher(), quiet:
            return pytree.tree_map_only(torch.Tensor, self._intern, target(*values, **named))

    def _append(self, target: Any, args: Any, kwargs: Any, result: Any) -> Any:
        nodes, named = pytree.tree_map(self._argument, (args, kwargs))
        node = self.graph.create_node("call_function", target, nodes, named)
        self._describe(node, result)
        return Tensor(node, result) if isinstance(result, torch.Tensor) else tuple(self._items(node, result))

    def _items(self, node: Node, values: Sequence[torch.Tensor]) -> list[Tensor]:
        items = []
        for index, value in enumerate(values):
            part = self.graph.create_node("call_function", operator.getitem, (node, index))
            self._describe(part, value)
            items.append(Tensor(part, value))
        return items

    def _argument(self, value: Any) -> Any:
        return self.local(value).node if isinstance(value, Tensor) else self.number(value)

    def _describe(self, node: Node, value: Any) -> None:
        node.meta["val"] = value
        node.meta["custom"] = {"onnx": self.origin}
        if self.provenance is not None:
            node.meta["custom"][PROVENANCE] = self.provenance

    def refuse_long(self, size: Any) -> None:
        """Raise CaptureError for a symbolic size whose expression takes too long to work with."""
        if isinstance(size, SYMBOLIC) and self._count_terms(size.node.expr) > MOST_TERMS:
            raise CaptureError(f"a size is computed from others in over {MOST_TERMS} steps; give its axes numbers")

    def _count_terms(self, expression: Any) -> int:
        if expression not in self._terms:
            self._terms[expression] = 1 + sum(self._count_terms(part) for part in expression.args)
        return self._terms[expression]

    def _intern(self, fake: torch.Tensor) -> torch.Tensor:
        sizes = tuple(map(size_key, fake.shape))
        for size in fake.shape:
            self.refuse_long(size)
        return self._interned.setdefault((fake.dtype, sizes, tuple(map(size_key, fake.stride()))), fake)


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value.fake)
    if isinstance(value, (list, tuple)):
        return (type(value), *map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return (type(value), size_key(value))


def _is_dequantized(node: Node) -> bool:
    """Whether it is numbers that codes of the file stand for."""
    return node.target is torch.ops.graphopt.dequantize.default and node.args[0].op == "get_attr"  # type: ignore[union-attr]
