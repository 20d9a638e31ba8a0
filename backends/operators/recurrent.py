"""Recurrent layers: the product of all inputs with their weights, then one kernel over all steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.fx import Node
from torch.fx.node import map_arg
from tvm import tirx

from graphopt.backends.dtypes import DTYPES
from graphopt.backends.operators import activations
from graphopt.backends.operators.arguments import arguments
from graphopt.backends.operators.element_wise import cast, computed_in, constant, library, like
from graphopt.backends.rules.gemm import Configuration, gemm, offer, pack_weight
from graphopt.backends.rules.recurrence import (
    Operands,
    Plan,
    choose_plan,
    in_panels,
    pack_biases,
    pack_matrix,
    pack_own_bias,
    projection,
    recurrence,
)
from graphopt.backends.rules.recurrent_cells import Function, Layer
from graphopt.backends.sizes import shape_of
from graphopt.backends.values import Index, Lazy, Product, View, permuted
from graphopt.errors import CompileError
from graphopt.operators.recurrent import Options, read_options

if TYPE_CHECKING:
    from graphopt.backends.kernel import Code, Kernel
    from graphopt.backends.lowering import Lowering

# name -> (x, alpha, beta) -> value
_FUNCTIONS: dict[str, Callable[[Any, float, float], Any]] = {
    "Sigmoid": lambda x, alpha, beta: activations.sigmoid(x),
    "Tanh": lambda x, alpha, beta: activations.tanh(x),
    "Relu": lambda x, alpha, beta: activations.relu(x),
    "Affine": lambda x, alpha, beta: x * like(x, alpha) + like(x, beta),
    "LeakyRelu": lambda x, alpha, beta: tirx.Select(x < like(x, 0), x * like(x, alpha), x),
    "ThresholdedRelu": lambda x, alpha, beta: activations.threshold(x, alpha, 0),
    "ScaledTanh": lambda x, alpha, beta: activations.tanh(x * like(x, beta)) * like(x, alpha),
    "HardSigmoid": lambda x, alpha, beta: activations.bounded(x * like(x, alpha) + like(x, beta), 0, 1),
    "Elu": lambda x, alpha, beta: tirx.Select(x < like(x, 0), library("expm1")(x) * like(x, alpha), x),
    "Softsign": lambda x, alpha, beta: x / (like(x, 1) + tirx.abs(x)),
    "Softplus": lambda x, alpha, beta: activations.softplus(x, 1, 20),
}


def _recurrent(kind: str) -> Callable[[Lowering, Node], Any]:
    def lower(lowering: Lowering, node: Node) -> Any:
        return _Lowered(lowering, node, kind).results()

    return lower


class _Lowered:
    def __init__(self, lowering: Lowering, node: Node, kind: str) -> None:
        self.lowering, self.node = lowering, node
        given = arguments(node)
        self.tensors = {name: value for name, value in given.items() if isinstance(value, Node)}
        names = [argument.name for argument in node.target._schema.arguments if argument.kwarg_only]  # type: ignore[union-attr]
        options = read_options(kind, **{name: given[name] for name in names})
        value = self.tensors["x"].meta["val"]
        self.dtype = DTYPES[value.dtype]
        self.steps, self.batch, self.width = shape_of(value)
        hidden = int(self.tensors["r"].meta["val"].shape[2])
        compute = computed_in(self.dtype)
        self.layer = Layer(kind, hidden, options.reverse, _activations(options), options.flag, compute)
        self.plan = choose_plan(self.layer, self.batch or 1, lowering.target)

    def results(self) -> Any:
        layer, name = self.layer, f"{self.layer.kind}_{self.width}x{self.layer.hidden}"
        if 0 in (self.steps, self.batch):
            return self.nothing()
        r, sizes = self.constant("r"), (self.steps, self.batch)
        assert r is not None
        weights = tuple(self.recurrent(r, stage) for stage in range(len(layer.stages)))
        lengths, states = self.tensors.get("sequence_lens"), ("initial_h", "initial_c")[: layer.states]
        peepholes = self.constant("p")
        own = self.biases("own", pack_own_bias) if layer.keeps_bias else None
        operands = Operands(
            self.inputs(),
            weights,
            own,
            None if peepholes is None else self.weight(peepholes, "p", lambda array: in_panels(array, 3, self.plan)),
            None if lengths is None else self.lowering.view(lengths),
            tuple(self.lowering.view(self.tensors[state]) if state in self.tensors else None for state in states),
        )
        y, *last = self.lowering.call(
            recurrence(layer, operands, self.plan, *sizes, self.dtype, name, self.lowering.target)
        )
        return permuted(y, (0, 2, 1, 3)), *last

    def nothing(self) -> Any:
        """Where there is no step to compute: the states as they were."""
        values = self.node.meta["val"]
        zeros = [Lazy(shape_of(v), self.dtype, (), lambda kernel, index: constant(0, self.dtype)) for v in values]
        if "sequence_lens" in self.tensors or self.batch == 0:
            return tuple(zeros)
        states = ("initial_h", "initial_c")[: self.layer.states]
        given = [self.lowering.tensor(self.tensors[s]) if s in self.tensors else None for s in states]
        return zeros[0], *(zero if value is None else value for zero, value in zip(zeros[1:], given, strict=True))

    # Weights ----------------------------------------------------------------------------------------------------------
    def constant(self, name: str) -> torch.Tensor | None:
        """A weight, which is a tensor of the program or computed from some; None where it is left out."""
        node = self.tensors.get(name)
        value = None if node is None else _constant(self.lowering, node)
        if node is not None and value is None:
            raise CompileError(
                f"{node.name}, which {self.node.name} takes as {name}, is computed when the program runs; recurrent "
                "layers are compiled with constant weights only"
            )
        return value

    def weight(self, tensor: torch.Tensor, key: str, pack: Callable[[np.ndarray], np.ndarray]) -> View:
        """Packed in the type that the layer is computed in; the key says everything that packing depends on."""
        layer, plan = self.layer, self.plan
        key = f"{layer.kind}-{key}-{plan.units}{'-kept' * layer.keeps_bias}"
        return self.lowering.weight(tensor, key, lambda array: pack(array.astype(layer.dtype)))

    def recurrent(self, r: torch.Tensor, stage: int) -> View:
        layer, plan = self.layer, self.plan
        key = f"r{stage if len(layer.stages) > 1 else ''}"
        return self.weight(r, key, lambda array: pack_matrix(array, layer, layer.stages[stage], plan))

    def biases(self, key: str, pack: Callable[[np.ndarray, Layer, Plan], np.ndarray]) -> View | None:
        b = self.constant("b")
        return None if b is None else self.weight(b, key, lambda array: pack(array, self.layer, self.plan))

    # Inputs -----------------------------------------------------------------------------------------------------------
    def inputs(self) -> View:
        """The product of all inputs with their weights, [T, B, D, panels, gates, units], as one matrix product."""
        w, x = self.constant("w"), self.lowering.tensor(self.tensors["x"])
        biases = self.biases("b", pack_biases)
        assert w is not None
        if self.layer.dtype == "float32":
            a = self.lowering.view(cast(x, "float32"))
            return self.projected(a if a.strides[-1] == 1 else self.lowering.contiguous(a), w, biases)
        layer, plan = self.layer, self.plan
        packed = self.weight(w, "w", lambda array: pack_matrix(array, layer, range(layer.gates), plan))
        name = f"gemm_{layer.gates * layer.hidden}x{self.width}"
        (stored,) = self.lowering.call(
            projection(layer, self.lowering.contiguous(x), packed, biases, plan, name, self.lowering.target)
        )
        return stored

    def projected(self, a: View, w: torch.Tensor, biases: View | None) -> View:
        """In float32, with weights packed as every linear layer has them."""
        layer, plan, target = self.layer, self.plan, self.lowering.target
        n, k = len(layer.reverse) * layer.gates * plan.width, int(w.shape[2])
        result = Product((*a.shape[:-1], n), "float32")
        end: Any = result if biases is None else _plus(result, biases)

        def write(choice: Configuration) -> Code:
            columns = choice.tile.vectors * target.lanes

            def pack(array: np.ndarray) -> np.ndarray:
                return pack_weight(in_panels(array, layer.gates, plan).reshape(n, k), columns)

            return gemm(a, self.weight(w, f"w{columns}", pack), result, end, f"gemm_{n}x{k}", target, choice)

        code = self.lowering.choose(offer(target, a, n, DTYPES[w.dtype], end, write))
        own = self.steps * self.batch * len(layer.reverse) * layer.gates * layer.hidden  # without what fills panels
        (stored,) = self.lowering.call(replace(code, flops=own * (2 * k + (biases is not None))))
        return stored


def _plus(result: Product, biases: View) -> Lazy:
    """The product with the biases, flat, added to each row."""
    row = View(biases.storage, (result.shape[-1],), (1,))

    def element(kernel: Kernel, index: Index) -> Any:
        return kernel.load(result, index) + kernel.load(row, index)

    return Lazy(result.shape, result.dtype, (result, row), element, name="add")


def _constant(lowering: Lowering, node: Node) -> torch.Tensor | None:
    """The value of a node that is computed from weights alone, in whatever graph they are."""
    held = lowering.env.get(node)
    if isinstance(held, torch.Tensor):
        return held
    value = _value(lowering, node)
    return value if isinstance(value, torch.Tensor) else None


def _value(lowering: Lowering, node: Node) -> Any:
    held = lowering.env.get(node)
    if isinstance(held, torch.Tensor) or node.op != "call_function" or not node.all_input_nodes:
        return held if isinstance(held, torch.Tensor) else None
    values = {source: _value(lowering, source) for source in node.all_input_nodes}
    if any(value is None for value in values.values()):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _activations(options: Options) -> tuple[tuple[Function, ...], ...]:
    """Those of each direction; two directions that have the same have them in one object."""

    def make(place: int, name: str, alpha: float, beta: float) -> Function:
        def function(x: Any) -> Any:
            return _FUNCTIONS[name](x, alpha, beta)

        bound = options.clip
        if bound is None or place == 2:
            return (function,)
        return (lambda x: activations.bounded(x, -bound, bound), function)

    made: dict[Any, tuple[Function, ...]] = {}
    for each in zip(options.activations, options.alpha, options.beta, strict=True):
        made.setdefault(each, tuple(make(place, *one) for place, one in enumerate(zip(*each, strict=True))))
    return tuple(made[each] for each in zip(options.activations, options.alpha, options.beta, strict=True))


TABLE: dict[Any, Callable[..., Any]] = {
    getattr(torch.ops.graphopt, kind).default: _recurrent(kind) for kind in ("rnn", "gru", "lstm")
}
