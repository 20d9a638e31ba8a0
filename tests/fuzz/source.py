"""The source of a random `forward`, written line by line: every line is run on the spot, so that shapes are known."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 4096  # elements of a value
BOUND = {torch.float16: 1e2}  # largest magnitude of a value; integers stay far from what their dtypes hold
DTYPES = (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


def condition(predicate: Any, when_true: Any, when_false: Any, operands: Any) -> Any:
    """torch.cond under export; run by hand otherwise, where torch.cond would start its compiler."""
    if torch.compiler.is_compiling():
        return torch.cond(predicate, when_true, when_false, operands)
    return (when_true if bool(predicate) else when_false)(*operands)


SCOPE = {"torch": torch, "F": nn.functional, "cond": condition}


@dataclass(frozen=True)
class Settings:
    """`wild` lets NaN, infinities and large values live on."""

    wild: bool = False


class Source:
    """The lines so far, and in each world (one set of input sizes) the value of every name."""

    def __init__(
        self,
        rng: random.Random,
        generator: torch.Generator,
        worlds: Sequence[dict[str, Tensor]],
        module: nn.Module | None = None,
        settings: Settings = Settings(),
        depth: int = 0,
    ) -> None:
        self.rng, self.generator, self.settings, self.depth = rng, generator, settings, depth
        self.module = nn.Module() if module is None else module
        self.worlds: list[dict[str, Any]] = [dict(world) for world in worlds]
        self.names = list(worlds[0])
        self.lines: list[str] = []
        self.expressions: list[str] = []
        self.used: set[str] = set()
        self.fresh = 0

    # Choosing ---------------------------------------------------------------------------------------------------------
    def value(self, name: str) -> Tensor:
        found: Tensor = self.worlds[0][name]
        return found

    def sizes(self, name: str) -> tuple[int | None, ...]:
        """The sizes of a value; None where they differ between worlds."""
        shapes = [world[name].shape for world in self.worlds]
        return tuple(same[0] if len(set(same)) == 1 else None for same in zip(*shapes, strict=True))

    def size(self, name: str, axis: int) -> str:
        """A size as code."""
        known = self.sizes(name)[axis]
        return f"{name}.shape[{axis}]" if known is None else str(known)

    def pick(self, fits: Callable[[Tensor], bool] = lambda value: True) -> str | None:
        """A name whose value fits; recent ones are taken more often."""
        names = [name for name in self.names if fits(self.value(name))]
        if not names:
            return None
        weights = [1.0 + 3.0 * (name not in self.used) + 2.0 * number / len(names) for number, name in enumerate(names)]
        return self.rng.choices(names, weights)[0]

    def pick_float(self, ranks: Sequence[int] = range(6), *dtypes: torch.dtype) -> str | None:
        return self.pick(
            lambda value: value.is_floating_point() and value.dim() in ranks and (not dtypes or value.dtype in dtypes)
        )

    def like(self, name: str) -> str | None:
        """Another value that broadcasts with this one, of its kind, or a new weight that does."""
        value, sizes = self.value(name), self.sizes(name)

        def fits(other: Tensor) -> bool:
            if other.dtype != value.dtype:
                return False
            try:
                return torch.broadcast_shapes(other.shape, value.shape).numel() <= LARGEST
            except RuntimeError:
                return False

        if self.rng.random() < 0.65 and (other := self.pick(fits)) is not None:
            return other
        kept = sizes[self.rng.randint(0, len(sizes)) :]
        shape = [1 if size is None or self.rng.random() < 0.2 else size for size in kept]
        return self.weight(shape, value.dtype)

    # Weights ----------------------------------------------------------------------------------------------------------
    def weight(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, spread: float = 1.0) -> str:
        """A parameter or buffer of this shape; now and then one that exists, or a view of one that exists."""
        existing = [name for name, have in self._weights() if list(have.shape) == list(shape) and have.dtype == dtype]
        if existing and self.rng.random() < 0.35:
            return f"self.{self.rng.choice(existing)}"
        name = f"w{sum(1 for _ in self._weights())}"
        if shape and self.rng.random() < 0.15:
            for _, have in self._weights():
                alike = (have.dtype, have.dim(), have.shape[1:]) == (dtype, len(shape), torch.Size(shape[1:]))
                if alike and have.shape[0] > shape[0] and not isinstance(have, nn.Parameter):
                    self.module.register_buffer(name, have[have.shape[0] - shape[0] :])
                    return f"self.{name}"
        data = self.random(shape, dtype) * (spread if dtype.is_floating_point else 1)
        if dtype.is_floating_point and self.rng.random() < 0.5:
            self.module.register_parameter(name, nn.Parameter(data))
        else:
            self.module.register_buffer(name, data)
        return f"self.{name}"

    def _weights(self) -> list[tuple[str, Tensor]]:
        own = {**self.module._parameters, **self.module._buffers}
        return [(name, value) for name, value in own.items() if value is not None and name.startswith("w")]

    def positive(self, shape: Sequence[int]) -> str:
        """A buffer of positive numbers, such as a variance."""
        name = f"p{len(self.module._buffers)}"
        self.module.register_buffer(name, torch.rand(list(shape), generator=self.generator) + 0.5)
        return f"self.{name}"

    def finite(self, shape: Sequence[int]) -> str:
        """A buffer of ordinary numbers, such as a mean: what infinite statistics give is nobody's business."""
        name = f"m{len(self.module._buffers)}"
        self.module.register_buffer(name, torch.randn(list(shape), generator=self.generator))
        return f"self.{name}"

    def state(self, shape: Sequence[int], dtype: torch.dtype) -> str:
        """A buffer that forward writes to."""
        name = f"s{len(self.module._buffers)}"
        self.module.register_buffer(name, self.random(shape, dtype))
        return name

    def ids(self, shape: Sequence[int], rows: int) -> str:
        """A buffer of positions along an axis of `rows`."""
        name = f"i{len(self.module._buffers)}"
        low = -rows if self.rng.random() < 0.2 else 0
        self.module.register_buffer(name, torch.randint(low, rows, list(shape), generator=self.generator))
        return f"self.{name}"

    def random(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if dtype is torch.bool:
            return torch.rand(list(shape), generator=self.generator) < 0.5
        if not dtype.is_floating_point:
            low = 0 if dtype is torch.uint8 else -4
            return torch.randint(low, 6, list(shape), generator=self.generator).to(dtype)
        data = torch.randn(list(shape), generator=self.generator)
        if self.settings.wild and data.numel() and self.rng.random() < 0.5:
            special = self.rng.choice([float("inf"), float("-inf"), float("nan"), -0.0, 0.0, 1e30])
            data.view(-1)[self.rng.randrange(data.numel())] = special
        return data.to(dtype)

    # Writing ----------------------------------------------------------------------------------------------------------
    def add(self, expression: str, results: int = 1) -> list[str] | None:
        """Write `v = expression`; None where PyTorch does not run it, or where the result does not suit."""
        found = []
        for world in self.worlds:
            try:
                with torch.no_grad():
                    found.append(eval(expression, {**SCOPE, "self": self.module}, world))
            except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
                return None
        values = [list(item) if isinstance(item, (tuple, list)) else [item] for item in found]
        if any(len(item) != results or not all(map(self.suits, item)) for item in values):
            return None
        if any(
            {(v.dtype, v.dim()) for v in same} != {(same[0].dtype, same[0].dim())} for same in zip(*values, strict=True)
        ):
            return None
        names = [self.name() for _ in range(results)]
        for world, item in zip(self.worlds, values, strict=True):
            world.update(zip(names, item, strict=True))
        self.used |= {name for name in self.names if mentions(expression, name)}
        self.names += names
        self.expressions += [expression] if results == 1 else []
        self.lines.append(f"{', '.join(names)} = {expression}")
        return names

    def name(self) -> str:
        self.fresh += 1
        return f"{'v' * (self.depth + 1)}{self.fresh}"

    def suits(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.numel() > LARGEST or value.dim() > 5 or value.dtype not in DTYPES:
            return False
        if self.settings.wild or value.dtype is torch.bool or not value.numel():
            return True
        return bool(value.double().abs().max() <= BOUND.get(value.dtype, 1e3 if value.is_floating_point() else 100))


def mentions(expression: str, name: str) -> bool:
    """Whether an expression reads a name."""
    return re.search(rf"(?<![\w.]){name}(?!\w)", expression) is not None
