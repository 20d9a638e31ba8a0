"""A kernel being written: its buffers, and how a value is read at an index.

Every buffer is accessed through a one-dimensional alias, so reshapes cost nothing and one kernel serves all layouts of
the same memory. A buffer whose sizes are symbolic binds the variables it shows plainly; the rest are scalar arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy
import tvm
import tvm_ffi
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from graphopt.backends.bfloat16 import in_float32
from graphopt.backends.sizes import Shape, Size, Sizes, product, symbols_in
from graphopt.backends.target import Target
from graphopt.backends.traffic import elements_read, nodes_computed
from graphopt.backends.values import Index, Lazy, Product, Storage, Value, View, inverse, leaves, permuted

if TYPE_CHECKING:
    from graphopt.backends.choice import Made

Configuration = Mapping[str, bool | int | float | str]  # what a rule chose, flat, as JSON has it
BOUND = ("float32", "float64", "float16", "bfloat16")  # dtypes whose values are bound to variables in kernels


@dataclass(frozen=True)
class Code:
    """A finished kernel: call it with `inputs`, then the sizes named by `scalars`, then the outputs.

    `reads` is how many elements of each input one call touches, `flops` how many operations on floats it does, `nodes`
    the program's nodes whose values it computes on the way to its own, `made` what was chosen for it. `written` is how
    many elements of its output it writes where the others stay as they are.
    """

    name: str
    rule: str
    function: tirx.PrimFunc
    inputs: tuple[Storage, ...]
    outputs: tuple[tuple[Shape, str], ...]
    scalars: tuple[str, ...]
    configuration: Configuration
    flops: Size
    reads: tuple[Size, ...]
    nodes: tuple[str, ...]
    made: Made[Any] | None = None
    written: Size | None = None


@dataclass(frozen=True)
class Output:
    """A result of the kernel; `store` takes a linear position in elements."""

    shape: Shape
    dtype: str
    flat: Any

    def store(self, position: Any, value: Any) -> None:
        if str(value.ty.dtype) != self.dtype:
            value = value.astype(self.dtype)
        T.buffer_store(self.flat, value, [position])


class Kernel:
    """Open while its body is written; rules call `load`, `serial`, `parallel`, `vectorized`, `registers`."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.sizes = Sizes()
        self._flat: dict[int, Any] = {}
        self._arguments: dict[int, Any] = {}
        self._known: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._products: dict[int, Callable[[Index], Any]] = {}

    # Buffers ----------------------------------------------------------------------------------------------------------
    def parameter(self, shape: Shape, dtype: str, name: str) -> Any:
        """A buffer argument; all arguments come before the first alias."""
        return T.arg(name, T.buffer(self.sizes.shape(shape), dtype, layout=None))

    def alias(self, buffer: Any, shape: Shape, dtype: str) -> Any:
        """The same memory in one dimension."""
        return T.decl_buffer([self.size(product(shape))], dtype, data=buffer.data, layout=None)

    def add_input(self, storage: Storage, buffer: Any) -> None:
        self._flat[id(storage)] = self.alias(buffer, storage.shape, storage.dtype)
        self._arguments[id(storage)] = buffer

    def flat(self, storage: Storage) -> Any:
        """The one-dimensional buffer of an input."""
        return self._flat[id(storage)]

    def words(self, storage: Storage, dtype: str) -> Any:
        """The one-dimensional bits of an input of narrow numbers: "uint16" or, for several in a word, "uint32"."""
        count = self.size(product(storage.shape))
        each = 2 if storage.dtype == "bfloat16" else np.dtype(storage.dtype).itemsize
        together = np.dtype(dtype).itemsize // each
        elements = count if together == 1 else tirx.truncdiv(count, int64(together))
        return T.decl_buffer([elements], dtype, data=self._arguments[id(storage)].data, layout=None)

    def registers(self, *shape: int, dtype: str = "float32") -> Any:
        """A small buffer on the stack that the compiler keeps in registers."""
        return T.alloc_buffer(shape, dtype, scope="local", layout=None)

    def scratch(self, *shape: Any, dtype: str = "float32") -> Any:
        """Working memory of one task, from the runtime's workspace pool."""
        return T.alloc_buffer(list(shape), dtype, scope="global", layout=None)

    # Expressions ------------------------------------------------------------------------------------------------------
    def size(self, size: Size) -> Any:
        return self.sizes.expr(size)

    def index(self, shape: Shape, *, row: Any = None, column: Any = None, linear: Any = None) -> Index:
        return Index(shape, self.sizes, row=row, column=column, linear=linear)

    def define(self, product_value: Product, element: Callable[[Index], Any]) -> None:
        """What reading `product_value` means from here on."""
        self._products[id(product_value)] = element
        self._known.clear()

    def know(self, value: Value, index: Index, element: Any) -> None:
        """What reading `value` at exactly this index gives, until it is forgotten."""
        self._known[id(value), id(index)] = element, index

    def load(self, value: Any, index: Index) -> Any:
        """One element of `value`; `index` ranges over a shape that `value` broadcasts to."""
        index = index.broadcast(value.shape)
        key = (id(value), id(index))
        if key in self._known:  # the index is kept alive, so its id stays its own
            return self._known[key][0]
        if isinstance(value, View):
            return self._flat[id(value.storage)][self._position(value, index)]
        if isinstance(value, Product):
            return self._products[id(value)](index)
        # TVM's interval analysis fails on bound integer vectors.
        if not value.shared or value.dtype not in BOUND:
            return value.element(self, index)
        self._known[key] = (T.bind(value.element(self, index)), index)
        return self._known[key][0]

    def forget(self) -> None:
        """Drop bound values: variables are visible only inside the loop they were bound in."""
        self._known.clear()

    def _position(self, value: View, index: Index) -> Any:
        if index.base is not None:
            value, index = permuted(value, inverse(index.order)), index.base
        if value.contiguous:
            return index.flat()
        position = self.size(value.offset)
        for number, (size, stride) in enumerate(zip(value.shape, value.strides, strict=True)):
            if size != 1 and stride != 0:
                position = position + index.axis(number) * self.size(stride)
        return position

    # Loops ------------------------------------------------------------------------------------------------------------
    def serial(self, extent: Any) -> AbstractContextManager[Any]:
        return _loop(T.serial, extent)

    def parallel(self, extent: Any) -> AbstractContextManager[Any]:
        return _loop(T.parallel, extent)

    @contextmanager
    def vectorized(self, extent: int) -> Iterator[Any]:
        """Lanes of one vector; what was bound inside is forgotten after."""
        with _loop(T.vectorized, extent) as lane:
            yield lane
        self.forget()


def int64(value: Any) -> Any:
    return tirx.const(value, "int64") if isinstance(value, int) else value


def _loop(kind: Callable[..., Any], extent: Any) -> AbstractContextManager[Any]:
    frame: AbstractContextManager[Any] = kind(tirx.const(0, "int64"), int64(extent))
    return frame


def write_kernel(
    rule: str,
    name: str,
    target: Target,
    reads: Sequence[Any],
    outputs: Sequence[tuple[Shape, str]],
    body: Callable[[Kernel, list[Output]], None],
    *,
    configuration: Configuration,
    flops: Size,
    extra_shapes: Sequence[Shape] = (),
) -> Code:
    """Build the function whose body is written by `body`; `reads` are the values it loads."""
    kernel = Kernel(target)
    inputs = tuple(leaves(reads))
    shapes = [storage.shape for storage in inputs] + [shape for shape, _ in outputs]
    plain = {size.name for shape in shapes for size in shape if isinstance(size, sympy.Symbol)}
    used = symbols_in([*shapes, *extra_shapes, *_view_shapes(reads)])
    scalars = tuple(sorted(used - plain))
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"tirx.noalias": True})
            given = [kernel.parameter(s.shape, s.dtype, f"in{number}") for number, s in enumerate(inputs)]
            for symbol in scalars:
                T.arg(symbol, kernel.sizes.variable(symbol))
            made = [kernel.parameter(shape, dtype, f"out{n}") for n, (shape, dtype) in enumerate(outputs)]
            for storage, buffer in zip(inputs, given, strict=True):
                kernel.add_input(storage, buffer)
            results = [
                Output(shape, dtype, kernel.alias(buffer, shape, dtype))
                for buffer, (shape, dtype) in zip(made, outputs, strict=True)
            ]
            body(kernel, results)
        function = builder.get()
    function = without_vector_calls(in_float32(function.without_attr("global_symbol"), target.pairs))
    touched = elements_read(reads)
    counts = tuple(touched[storage] for storage in inputs)
    return Code(
        name, rule, function, inputs, tuple(outputs), scalars, configuration, flops, counts, nodes_computed(reads)
    )


_SCALAR_ONLY = frozenset({"tirx.call_pure_extern", "tirx.nearbyint"})


def without_vector_calls(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Vector loops that call the C library as plain loops: TVM would take them apart and lose their bound variables."""

    def plain(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.VECTORIZED or not _calls_library(loop.body):
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.For, plain)))


def _calls_library(body: Any) -> bool:
    found: list[str] = []

    def note(call: Any) -> None:
        if getattr(call.op, "name", "") in _SCALAR_ONLY:
            found.append(call.op.name)

    tvm_ffi.structural_walk(body, (tvm.ir.Call, note))
    return bool(found)


def _view_shapes(values: Sequence[Any]) -> list[Shape]:
    """Shapes, strides and offsets that reading `values` computes with."""
    shapes: list[Shape] = []
    seen: set[int] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        shapes.append(value.shape)
        if isinstance(value, View):
            shapes += [value.strides, (value.offset,)]
        elif isinstance(value, Lazy):
            shapes.append(value.sizes)
            stack.extend(value.operands)
        elif isinstance(value, Product):
            stack.extend(value.operands)
    return shapes
