"""Random small models: a seed gives the same module, inputs and source in every process."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.fuzz.expressions import EXPRESSIONS
from tests.fuzz.layers import LAYERS
from tests.fuzz.source import SCOPE, Settings, Source

Inputs = tuple[Tensor, ...]
AXES = {"batch": (3, 7, 1), "seq": (4, 5, 2)}  # the example's size, then others
WRITERS = {**EXPRESSIONS, **LAYERS}


@dataclass(frozen=True)
class Case:
    """A model, inputs at several sizes (the first are the examples), its dynamic axes, and what it is in words."""

    module: nn.Module
    inputs: tuple[Inputs, ...]
    dynamic: dict[str, dict[int, str]]
    text: str


def generate(seed: int) -> Case:
    """A random model of 3 to 25 operators."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    settings = Settings(wild=rng.random() < 0.06)
    shapes = _input_shapes(rng)
    dynamic = {
        name: {axis: size for axis, size in enumerate(shape) if isinstance(size, str)}
        for name, (shape, _) in shapes.items()
    }
    dynamic = {name: axes for name, axes in dynamic.items() if axes}
    source = Source(rng, generator, [{}], settings=settings)
    worlds = []
    for number in range(3 if dynamic else 2):
        sizes: dict[int | str, int] = {name: options[number] for name, options in AXES.items()}
        world = {}
        for name, (shape, dtype) in shapes.items():
            world[name] = source.random([n if isinstance(n, int) else sizes[n] for n in shape], dtype)
        worlds.append(world)
    source = Source(rng, generator, worlds, settings=settings)
    wanted = int(rng.triangular(3, 26, 8))
    tries = 0
    while len(source.lines) < wanted and tries < 200:
        tries += 1
        writer = rng.choices(list(WRITERS), list(WRITERS.values()))[0]
        writer(source)
    return _case(source, list(shapes), worlds, dynamic)


def _input_shapes(rng: random.Random) -> dict[str, tuple[list[int | str], torch.dtype]]:
    """One to three inputs; the first is float32 and of some width, others fit with it or hold ids."""
    batch: int | str = "batch" if rng.random() < 0.5 else rng.choice((1, 2, 3))
    width = rng.choice((1, 2, 4, 4, 8, 8, 16, 17))
    form = rng.choices(("rows", "sequence", "image", "heads", "vector", "empty"), (4, 5, 4, 2, 1, 0.3))[0]
    seq: int | str = "seq" if rng.random() < 0.4 else rng.choice((1, 3, 5, 6))
    forms: dict[str, list[int | str]] = {
        "rows": [batch, width],
        "sequence": [batch, seq, width],
        "image": [batch, rng.choice((1, 2, 3, 4)), rng.choice((4, 5, 6)), rng.choice((4, 6, 7))],
        "heads": [batch, 2, seq, rng.choice((4, 8))],
        "vector": [width],
        "empty": [batch, 0, width],
    }
    first = forms[form]
    main = torch.float16 if rng.random() < 0.06 else torch.float64 if rng.random() < 0.04 else torch.float32
    shapes: dict[str, tuple[list[int | str], torch.dtype]] = {"a": (first, main)}
    for name in "bc"[: rng.choices((0, 1, 2), (5, 4, 2))[0]]:
        kind = rng.choices(("alike", "ids", "mask", "row", "scalar"), (4, 3, 2, 2, 0.5))[0]
        if kind == "alike":
            shapes[name] = (first, rng.choice((torch.float32, main)))
        elif kind == "ids":
            shapes[name] = (first[:-1], rng.choice((torch.int64, torch.int64, torch.int32)))
        elif kind == "mask":
            shapes[name] = (first, rng.choice((torch.bool, torch.int64, torch.uint8)))
        else:
            shapes[name] = (first[-1:] if kind == "row" else [], torch.float32)
    return shapes


def _case(
    source: Source, names: list[str], worlds: list[dict[str, Tensor]], dynamic: dict[str, dict[int, str]]
) -> Case:
    rng = source.rng
    made = [name for name in source.names if name not in names]
    ends = [name for name in made if name not in source.used and rng.random() < 0.75]
    ends += rng.sample(made, min(len(made), rng.choice((0, 0, 1))))
    ends = list(dict.fromkeys(ends))[-5:] or made[-1:] or names[:1]
    if rng.random() < 0.05:
        ends.append(rng.choice(names))
    if rng.random() < 0.03:
        ends.append(ends[0])
    lines = [*source.lines, f"return ({', '.join(ends)},)"]
    text = "\n".join([f"def forward(self, {', '.join(names)}):", *(f"    {line}" for line in lines)])
    space: dict[str, object] = dict(SCOPE)
    exec(compile(text, "<fuzz>", "exec"), space)
    module = type("Fuzz", (nn.Module,), {"forward": space["forward"]})()
    for name, parameter in source.module._parameters.items():
        module.register_parameter(name, parameter)
    for name, buffer in source.module._buffers.items():
        module.register_buffer(name, buffer)
    inputs = tuple(tuple(world[name] for name in names) for world in worlds)
    return Case(module.eval(), inputs, dynamic, _described(module, text, worlds[0], dynamic))


def _described(module: nn.Module, text: str, inputs: dict[str, Tensor], dynamic: dict[str, dict[int, str]]) -> str:
    weights = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    lines = [f"# {name}: {_type(value)}" for name, value in {**inputs, **weights}.items()]
    return "\n".join([*lines, f"# dynamic: {dynamic}", text])


def _type(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
