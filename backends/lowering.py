"""From a program's graph to a Relax module of hand-scheduled kernels.

Nodes are visited in order. Each operator's lowering returns a `View` of stored memory or a `Lazy` function of the
index; lazy values are stored only when something needs them in memory. Weights become arguments of the Relax function,
packed as the kernel that reads them wants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node
from tvm import relax

from graphopt.backends.choice import Choice, Choices, Site
from graphopt.backends.dtypes import DTYPES
from graphopt.backends.fusion import Kinds, Place, epilogue, in_order, row_epilogue
from graphopt.backends.kernel import BOUND, Code
from graphopt.backends.kernel_report import Kernels
from graphopt.backends.operators import OPERATORS, fits_epilogue, is_branching
from graphopt.backends.operators.attention import TABLE as ATTENTION
from graphopt.backends.operators.element_wise import cast, computed_in, constant
from graphopt.backends.operators.reduction import EXPANSIONS
from graphopt.backends.operators.views import RESHAPES, permutation_of
from graphopt.backends.packed_weights import Weights
from graphopt.backends.rules.transpose import stored as element_wise_kernel
from graphopt.backends.sizes import Shape, Sizes, product, shape_of, size_of
from graphopt.backends.target import Target
from graphopt.backends.values import (
    Lazy,
    Product,
    Storage,
    Value,
    View,
    fused_name,
    inverse,
    permutation,
    permuted,
    preferred_order,
    whole,
)
from graphopt.errors import CompileError, GraphoptError
from graphopt.in_place import writes
from graphopt.program import Program, get_attribute
from graphopt.runtime.dtypes import name_of
from graphopt.runtime.manifest import KernelInfo

WEIGHT_COUNT = "graphopt.weights"  # how many of a function's parameters, the last ones, are weights
_DEEPEST = 16  # element-wise nodes that one kernel computes in a chain
_DEEPEST_UNBOUND = 8  # the same where values cannot be bound, so that every reading writes them out again
Operators = Mapping[Any, Callable[..., Any]]  # how a node of each operator is lowered
_KINDS = Kinds(
    fits_epilogue,
    is_branching,
    permutation_of,
    lambda node: node.target in RESHAPES,
    lambda node: node.target in EXPANSIONS,
)


@dataclass(frozen=True)
class Lowered:
    """One entry: its function takes inputs, state, then the weights of these names."""

    weights: tuple[str, ...]
    kernels: Mapping[str, KernelInfo]  # nodes are under this entry only


class Lowering:
    """State of lowering one graph; a branch of a `cond` has its own, sharing weights and kernels with its parent."""

    def __init__(
        self,
        target: Target,
        module: GraphModule,
        weights: Weights,
        builder: relax.BlockBuilder,
        kernels: Kernels,
        choices: Choices,
        parent: Lowering | None = None,
        path: str = "",
        in_place: frozenset[Node] = frozenset(),
        operators: Operators | None = None,
    ) -> None:
        self.target, self.module, self.weights, self.builder = target, module, weights, builder
        self.kernels, self.choices, self._path = kernels, choices, path
        self.operators = OPERATORS if operators is None else operators
        self.in_place = in_place  # nodes that write into the state that they replace
        self.sizes: Sizes = parent.sizes if parent else Sizes()
        self.constants: dict[str, Storage] = parent.constants if parent else {}  # name -> argument of the function
        self._labels: dict[int, str] = dict(parent._labels) if parent else {}  # address of a weight -> its name
        self.bindings: list[relax.Binding] = []
        self.env: dict[Node, Any] = {}
        nodes = in_order(module.graph, lambda node: node.target in ATTENTION, _KINDS)
        self.order: dict[Node, int] = {node: number for number, node in enumerate(nodes)}
        self._stored: dict[tuple[int, tuple[int, ...]], tuple[Lazy | View, View]] = {}
        self._covered: set[Node] = set()
        self._current: tuple[str, ...] = ()  # the node being lowered
        self._views: dict[int, tuple[str, ...]] = {}  # id of a view -> the node whose value it is

    # Walking ----------------------------------------------------------------------------------------------------------
    def run(self, arguments: list[Any]) -> Any:
        """Lower every node; returns what the output node holds, as values."""
        pending = iter(arguments)
        for node in self.order:
            if node.op == "placeholder":
                self.env[node] = next(pending)
            elif node.op == "get_attr":
                self.env[node] = value = get_attribute(self.module, str(node.target))
                if isinstance(value, torch.Tensor):
                    self._labels[value.untyped_storage().data_ptr()] = str(node.target)
            elif node.op == "output":
                return torch.fx.node.map_arg(node.args[0], self.value)
            elif node not in self._covered:
                self.env[node] = self.lower(node)
        raise CompileError(f"graph {type(self.module).__name__} has no output node")

    def lower(self, node: Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int, float, torch.SymFloat, torch.SymBool)) and not isinstance(
            value, torch.Tensor
        ):
            return size_of(value)
        _check_dtypes(node, value)
        lower = self.operators.get(node.target)
        if lower is None:
            return self._of_weights(node)
        if isinstance(value, torch.Tensor) and 0 in (shape := shape_of(value)):  # nothing to compute, nothing to divide
            dtype = DTYPES[value.dtype]
            return Lazy(shape, dtype, (), lambda kernel, index: constant(0, dtype))
        self._current = name = (self._path + node.name,)
        try:
            result = lower(self, node)
        except GraphoptError:
            raise
        except Exception as e:
            reason = f"{type(e).__name__}: {e}".splitlines()[0]
            raise CompileError(
                f"{node.target} at {node.name} cannot be lowered for {self.target.name}: {reason}"
            ) from e
        finally:
            self._current = ()
        if isinstance(result, Lazy):
            return self._share(node, named(node, result, name))
        if isinstance(result, View):
            self._views[id(result)] = name
        if isinstance(result, tuple):
            return tuple(replace(x, nodes=(*x.nodes, *name)) if isinstance(x, Lazy) else x for x in result)
        return result

    def _of_weights(self, node: Node) -> torch.Tensor:
        """What an operator without a lowering computes from weights alone is a weight, computed now."""
        read = [self.env[argument] for argument in node.all_input_nodes]
        result: Any = None
        if read and all(isinstance(value, torch.Tensor) for value in read):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.env.__getitem__)
            with torch.no_grad():
                result = node.target(*args, **kwargs)  # type: ignore[operator]
        if not isinstance(result, torch.Tensor):
            raise CompileError(f"{node.target} at {node.name} has no lowering for {self.target.name}")
        return result

    def _share(self, node: Node, value: Lazy) -> Any:
        """A lazy value read several times is computed once: in one kernel with all readers, or stored.

        Integers cannot be bound to a variable in a kernel, so they are stored; so is what has grown deep, and what
        compares where the next node does too.
        """
        bound = value.dtype in BOUND
        if value.branches and any(map(is_branching, node.users)):
            return self.view(value)
        if value.depth > (_DEEPEST if bound else _DEEPEST_UNBOUND):
            return self.view(value)
        if count_reads(node) < 2 or not value.operands or value.narrow is not None:
            return value
        together, _ = epilogue(node, Place(value.shape), self.order, _KINDS)
        inside = {node, *together}
        if bound and together and all(user in inside for user in node.users):
            return replace(value, shared=True)
        return self.view(value)

    # Values -----------------------------------------------------------------------------------------------------------
    def value(self, argument: Any) -> Any:
        """A node argument as a value, a number or a size; weights stay torch tensors until a kernel packs them."""
        return self.env[argument] if isinstance(argument, Node) else argument

    def tensor(self, argument: Any) -> Value:
        """The value of a node argument as a tensor in memory or a function; a weight becomes an argument as it is."""
        value = self.value(argument)
        return self.weight(value) if isinstance(value, torch.Tensor) else value

    def weight(
        self, tensor: torch.Tensor, key: str = "", pack: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> View:
        """A weight as an argument of the function; `key` names the packing, equal keys share one copy."""
        label = self._labels.get(tensor.untyped_storage().data_ptr(), "constant")
        name = self.weights.add(tensor, label, key, pack)
        if name not in self.constants:
            array = self.weights.arrays[name]
            shape, dtype = tuple(int(d) for d in array.shape), name_of(array.dtype)
            variable = relax.Var(f"weight{len(self.constants)}", relax.TensorType(self.sizes.shape(shape), dtype))
            self.constants[name] = Storage(variable, shape, dtype)
        return whole(self.constants[name])

    def view(self, argument: Any) -> View:
        """The argument in memory, with whatever strides: a lazy value in the order of what it reads."""
        value = self.tensor(argument) if not isinstance(argument, (View, Lazy)) else argument
        return value if isinstance(value, View) else self.store(value, preferred_order(value))

    def contiguous(self, argument: Any) -> View:
        """The argument in memory, row-major from the start of its storage."""
        value = self.tensor(argument) if not isinstance(argument, (View, Lazy)) else argument
        return value if isinstance(value, View) and value.contiguous else self.store(value)

    def store(self, value: Lazy | View, order: tuple[int, ...] = ()) -> View:
        """Write the value to memory with an element-wise kernel, once; `order` names its axes from the outermost in."""
        plain = tuple(range(len(value.shape)))
        order = order or plain
        key = (id(value), order)
        if key not in self._stored:
            arranged = value if order == plain else _arranged(value, order)
            code = element_wise_kernel(arranged, fused_name("", value), self.target)
            alone = () if code.nodes else self._current  # made for the node being lowered, such as padding
            (stored,) = self.call(code, self.owners(value) or alone)
            self._stored[key] = (value, permuted(stored, inverse(order)))
        return self._stored[key][1]

    # Kernels ----------------------------------------------------------------------------------------------------------
    def anchored(
        self,
        node: Node,
        build: Callable[[Product, Any], Code],
        begin: Callable[[Any], Any] = lambda result: result,
        order: tuple[int, ...] = (),
        joins: bool = False,
        ends: Callable[[Node], bool] = lambda node: True,
        sums: str = "",
    ) -> View:
        """Lower `node` with its epilogue: `build` gets the bare result and the end of the element-wise tree over it.

        `begin` adds to the bare result what belongs to the node itself, such as a bias. `order`: axis n of the node is
        axis order[n] of what the kernel writes, where they differ. `joins` as in `Place`, `ends` as in `epilogue`. The
        bare result of float16 and bfloat16 is float32, which is rounded once `begin` has been added; `sums` names
        another dtype of it.
        """
        shape = shape_of(node.meta["val"])
        start = Place(tuple(shape[axis] for axis in inverse(order)) if order else shape, order, joins)
        together, place = epilogue(node, start, self.order, _KINDS, ends)
        dtype = DTYPES[node.meta["val"].dtype]
        result = Product(start.shape, sums or computed_in(dtype))
        end: Any
        self.env[node] = end = cast(begin(permutation(result, order) if order else result), dtype)
        for follower in together:
            end = self.follow(follower, together)
        arranged = permutation(end, inverse(place.order)) if place.order else end
        return self.conclude(node, together, build(result, arranged), place.order)

    def row_epilogue(self, node: Node, wide: Shape) -> list[Node]:
        """What one kernel over the rows of `wide` can compute after `node`, which reduces them."""
        return row_epilogue(node, wide, self.order, _KINDS)

    def follow(self, follower: Node, together: list[Node]) -> Any:
        """Lower one node of an epilogue."""
        value = self.operators[follower.target](self, follower)
        if isinstance(value, Lazy):
            shared = count_reads(follower) > 1 and follower is not together[-1]
            value = replace(named(follower, value), shared=shared)
        self.env[follower] = value
        return value

    def conclude(self, node: Node, together: list[Node], code: Code, order: tuple[int, ...] = ()) -> View:
        """Call the kernel of `node` and its epilogue; axis n of the result is axis order[n] of what it writes."""
        names = dict.fromkeys((*self._current, *(self._path + each.name for each in (node, *together))))
        (stored,) = self.call(code, tuple(names))
        stored = permuted(stored, order) if order else stored
        if together:
            self.env[together[-1]] = stored
            self._covered.update(together)
        return stored

    def cover(self, node: Node, view: View) -> None:
        """`node` was lowered ahead of its turn; `view` is its value, or that of the end of its epilogue."""
        if not self._covered.intersection(node.users):
            self.env[node] = view
        self._covered.add(node)

    def choose(self, choice: Choice[Any]) -> Code:
        """The kernel of the configuration that is best as far as is known."""
        made = self.choices.make(choice)
        return replace(choice.write(made.configuration), made=made)

    def trial(self, choice: Choice[Any], configuration: Any) -> tuple[Code, tuple[np.ndarray | None, ...]]:
        """The kernel of another configuration, and the values of those of its inputs that are weights.

        To be measured, once the graph is lowered: nothing of it stays here.
        """
        constants, arrays = set(self.constants), set(self.weights.arrays)
        code = choice.write(configuration)
        names = {storage: name for name, storage in self.constants.items()}
        values = tuple(self.weights.arrays[names[each]] if each in names else None for each in code.inputs)
        for name in self.constants.keys() - constants:
            del self.constants[name]
        for name in self.weights.arrays.keys() - arrays:
            self.weights.forget(name)
        return code, values

    def call(self, code: Code, nodes: tuple[str, ...] | None = None, into: Storage | None = None) -> list[View]:
        """Bind a call of the kernel; the builder keeps equal kernels that do equal work once.

        `nodes` are those whose value it stores (default: the one being lowered), besides those computed on the way.
        `into` is what it writes to in place of a new tensor: state that nothing reads before.
        """
        info = self.kernels.describe(code, self.constants.values())
        work = code.function.with_attr("graphopt.work", f"{info.flops} {info.bytes}")
        function = self.builder.add_func(work, code.name)  # the builder's own name where this one is taken
        if code.made is not None:
            self.choices.sites.append(Site(code.made, self, function.name_hint))
        self.kernels.add(function.name_hint, info, (*code.nodes, *(self._current if nodes is None else nodes)))
        types = [relax.TensorType(self.sizes.shape(shape), dtype) for shape, dtype in code.outputs]
        arguments = [storage.variable for storage in code.inputs]
        arguments += [self.sizes.variable(name) for name in code.scalars]
        if into is not None:
            self.bind(relax.Call(function, [*arguments, into.variable]), relax.TupleType([]))
            return [whole(into)]
        called = relax.call_tir(function, relax.Tuple(arguments), types)
        result = self.bind(called, relax.TupleType(types) if len(types) > 1 else types[0])
        variables = [result]
        if len(types) > 1:
            variables = [self.bind(relax.TupleGetItem(result, number), kind) for number, kind in enumerate(types)]
        return [whole(Storage(v, shape, dtype)) for v, (shape, dtype) in zip(variables, code.outputs, strict=True)]

    def owners(self, value: Lazy | View) -> tuple[str, ...]:
        """The nodes whose value this is: a kernel that stores it works for them."""
        return value.nodes if isinstance(value, Lazy) else self._views.get(id(value), ())

    def bind(self, expression: Any, kind: Any) -> relax.Var:
        variable = relax.Var(f"v{len(self.bindings)}", kind)
        self.bindings.append(relax.VarBinding(variable, expression))
        return variable

    # Branches ---------------------------------------------------------------------------------------------------------
    def branch_argument(self, operand: Any) -> Any:
        """Stored before the `If`, so that both branches see it; sizes and weights pass as they are."""
        value = self.value(operand)
        return self.store(value) if isinstance(value, Lazy) else value

    def branch(self, graph: Node, arguments: list[Any], kind: Any) -> relax.SeqExpr:
        """The sub-graph that the node `graph` reads as one side of an `If`, closing over weights and operands."""
        module, path = self.value(graph), f"{self._path}{graph.target}."
        inner = Lowering(
            self.target,
            module,
            self.weights,
            self.builder,
            self.kernels,
            self.choices,
            self,
            path,
            operators=self.operators,
        )
        results = [inner.contiguous(value) for value in inner.run(arguments)]
        variables = [inner.own(view) for view in results]
        result = variables[0] if len(variables) == 1 else inner.bind(relax.Tuple(variables), kind)
        return relax.SeqExpr([relax.BindingBlock(inner.bindings)], result)

    def own(self, view: View) -> relax.Var:
        """A variable with exactly the view's shape: what leaves a graph is typed by the graph's own signature."""
        if view.shape == view.storage.shape:
            return view.storage.variable
        if product(view.shape) != product(view.storage.shape):  # the first part of a larger tensor
            view = self.call(element_wise_kernel(view, "copy", self.target), self.owners(view))[0]
            return view.storage.variable
        shape = self.sizes.shape(view.shape)
        kind = relax.TensorType(shape, view.dtype)
        return self.bind(relax.op.reshape(view.storage.variable, relax.ShapeExpr(shape)), kind)


def _arranged(value: Lazy | View, order: tuple[int, ...]) -> Lazy | View:
    return permuted(value, order) if isinstance(value, View) else permutation(value, order)


def _check_dtypes(node: Node, value: Any) -> None:
    for tensor in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(tensor, torch.Tensor) and tensor.dtype not in DTYPES:
            raise CompileError(f"{node.name} is {tensor.dtype}, which has no lowering; make it float32")


def count_reads(node: Node) -> int:
    """How often other nodes name it among their arguments: x * x reads x twice."""
    reads = 0
    for user in node.users:
        found: list[Node] = []
        torch.fx.node.map_arg((user.args, user.kwargs), found.append)
        reads += found.count(node)
    return reads


def named(node: Node, value: Lazy, nodes: tuple[str, ...] = ()) -> Lazy:
    """The value with its operator's name, unless it has one: `aten.add.Tensor` is "add", and whether it branches.

    `nodes` are added to those it is the value of.
    """
    value = replace(value, nodes=(*value.nodes, *nodes)) if nodes else value
    if value.name or not isinstance(node.target, torch._ops.OpOverload):
        return value
    return replace(value, name=str(node.target).split(".")[1].strip("_"), branching=is_branching(node))


def reserve(name: str, builder: relax.BlockBuilder) -> None:
    """Keep a function's name from kernels that are added before it."""
    nothing = relax.Function([], relax.ShapeExpr([]), relax.ShapeType(ndim=0))
    builder.add_func(nothing.with_attr("global_symbol", name), name)  # equal functions would be one


def lower_program(
    program: Program,
    target: Target,
    name: str,
    weights: Weights,
    builder: relax.BlockBuilder,
    choices: Choices,
    written: frozenset[str] = frozenset(),
    operators: Operators | None = None,
) -> Lowered:
    """The program as Relax function `name` of `builder`'s module; its constants are added to `weights`.

    It takes the place of what `reserve` put there. State whose name is in `written` is written into and not returned.
    Raises CompileError naming the first node that has no lowering.
    """
    module = program.graph_module
    in_place = frozenset(node for state, node in writes(program) if state in written)
    kernels = Kernels(name, program.symbols)
    lowering = Lowering(target, module, weights, builder, kernels, choices, in_place=in_place, operators=operators)
    parameters, arguments = [], []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if node.meta["val"].dtype not in DTYPES:
                raise CompileError(f"{node.name} is {node.meta['val'].dtype}, which has no lowering; make it float32")
            shape, dtype = shape_of(node.meta["val"]), DTYPES[node.meta["val"].dtype]
            variable = relax.Var(node.name, relax.TensorType(lowering.sizes.shape(shape), dtype))
            parameters.append(variable)
            arguments.append(whole(Storage(variable, shape, dtype)))
    values = lowering.run(arguments)
    kept = [number for number, item in enumerate(program.state, len(program.outputs)) if item.spec.name in written]
    results = [lowering.contiguous(value) for number, value in enumerate(values) if number not in kept]
    variables = [lowering.own(view) for view in _fresh(lowering, results, parameters)]
    kind = [variable.ty for variable in variables]
    result = variables[0] if len(variables) == 1 else lowering.bind(relax.Tuple(variables), relax.TupleType(kind))
    constants = [storage.variable for storage in lowering.constants.values()]
    body = relax.SeqExpr([relax.BindingBlock(lowering.bindings)], result)
    function = relax.Function([*parameters, *constants], body, result.ty)
    function = function.with_attr("global_symbol", name).with_attr(WEIGHT_COUNT, len(constants))
    limits = {
        symbol: program.sizes[user].high
        for symbol, user in program.symbols.items()
        if program.sizes[user].high is not None
    }
    if limits:
        function = function.with_attr("tir_var_upper_bound", limits)
    builder.update_func(builder.get().get_global_var(name), function)
    return Lowered(tuple(lowering.constants), lowering.kernels.found)


def _fresh(lowering: Lowering, results: list[View], parameters: list[relax.Var]) -> list[View]:
    """Outputs in memory of their own: never an argument's, a weight's or another output's."""
    taken = {id(variable) for variable in parameters}
    taken |= {id(storage.variable) for storage in lowering.constants.values()}
    fresh = []
    for view in results:
        if id(view.storage.variable) in taken:
            view = lowering.call(element_wise_kernel(view, "copy", lowering.target), lowering.owners(view))[0]
        taken.add(id(view.storage.variable))
        fresh.append(view)
    return fresh
