"""A choice between kernels of which some are broken in their own way; all write x + 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.choice import Choice, Made, Site
from graphopt.backends.kernel import Code, Kernel, Output, int64, write_kernel
from graphopt.backends.target import Target
from graphopt.backends.tuner.bench import Workpiece
from graphopt.backends.tuner.record import Workload
from graphopt.backends.values import Storage

SIZE = 4096


@dataclass(frozen=True)
class Kind:
    """A candidate, by what becomes of it."""

    name: str


def plus_one(kernel: Kernel, x: Storage, output: Output) -> None:
    with kernel.serial(SIZE) as at:
        output.store(at, kernel.flat(x)[at] + tirx.const(1, "float32"))


def plus_two(kernel: Kernel, x: Storage, output: Output) -> None:
    with kernel.serial(SIZE) as at:
        output.store(at, kernel.flat(x)[at] + tirx.const(2, "float32"))


def crash(kernel: Kernel, x: Storage, output: Output) -> None:
    plus_one(kernel, x, output)
    output.store(int64(1 << 40), tirx.const(0, "float32"))


def hang(kernel: Kernel, x: Storage, output: Output) -> None:
    with kernel.serial(int64(1 << 50)) as at:
        place = tirx.truncmod(at, int64(SIZE))
        output.store(place, output.flat[place] * tirx.const(0.5, "float32") + kernel.flat(x)[place])


def eat(kernel: Kernel, x: Storage, output: Output) -> None:
    memory = kernel.scratch(int64(1 << 42))
    with kernel.serial(SIZE) as at:
        T.buffer_store(memory, kernel.flat(x)[at], [at * int64(1 << 30)])
    plus_one(kernel, x, output)


def not_written(kernel: Kernel, x: Storage, output: Output) -> None:
    raise ValueError("no kernel for this one")


def not_compiled(kernel: Kernel, x: Storage, output: Output) -> None:
    plus_one(kernel, x, output)
    T.evaluate(tirx.call_llvm_intrin("float32", "llvm.no.such.intrinsic", tirx.const(0, "float32")))


BODIES: dict[str, Callable[[Kernel, Storage, Output], None]] = {
    "default": plus_one,
    "same": plus_one,
    **{body.__name__: body for body in (plus_two, crash, hang, eat, not_written, not_compiled)},
}


class Writing:
    """Stands for the lowering that the choice is in."""

    def trial(self, choice: Choice[Any], configuration: Any) -> tuple[Code, tuple[np.ndarray | None, ...]]:
        return choice.write(configuration), (None,)


def workpiece(target: Target, *names: str) -> Workpiece:
    """The default and these candidates."""
    x = Storage(relax.Var("x", relax.TensorType((SIZE,), "float32")), (SIZE,), "float32")

    def write(kind: Kind) -> Code:
        def body(kernel: Kernel, outputs: list[Output]) -> None:
            BODIES[kind.name](kernel, x, outputs[0])

        from graphopt.backends.values import whole

        reads, outputs = [whole(x)], [((SIZE,), "float32")]
        return write_kernel("fake", "fake", target, reads, outputs, body, configuration={}, flops=0)

    choice = Choice(Workload.of("fake", {"n": 1}), Kind("default"), lambda: map(Kind, names), write)
    return Workpiece(Site(Made(choice, choice.default), Writing(), "fake"), ({},))  # type: ignore[arg-type]
