"""Fills `common.jsonl`, the records that ship: `python -m graphopt.tools.tuning.common_shapes --seconds 600`.

Layers of shapes that many models have, tuned on this machine for one thread and for each core, and what gained written
beside what is there already: run it on each kind of machine. The models that graphopt's speed is measured on have no
workload in it, so that what they gain is their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from graphopt.backends.tuner.record import Record
from graphopt.backends.tuner.record_file import write_whole
from graphopt.backends.tuner.store import SHIPPED, Store, best_of, parse

GAIN = 0.97  # of the default's time: what gains less may be chance, and is not worth a line
SHARE = 4  # one in so many seconds goes to kernels of one thread: servers run many sessions of one


@dataclass(frozen=True)
class Layers:
    """A module of common layers with its example inputs and the axes that are open."""

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    dynamic: dict[str, dict[int, str]] | None = None


class Encoder(nn.Module):
    """A transformer layer as BERT has it: x [batch, length, width]."""

    def __init__(self, width: int, inner: int, head: int = 64) -> None:
        super().__init__()
        self.head = head
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.into(x).unflatten(-1, (3, -1, self.head)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        x = self.first(x + self.out(mixed.transpose(1, 2).flatten(2)))
        result: Tensor = self.second(x + self.down(nn.functional.gelu(self.up(x))))
        return result


class Stages(nn.Module):
    """Two residual blocks of 3 x 3 convolutions at each width, halving the image, as ResNet-18 and -34 have them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for before, width in pairwise((widths[0], *widths)):
            self.blocks.append(Residual(before, width, 1 if before == width else 2))
            self.blocks.append(Residual(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Residual(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride, 1)
        self.second = nn.Conv2d(width, width, 3, 1, 1)
        self.shortcut = nn.Conv2d(before, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


OPEN = {"x": {0: "batch", 1: "length"}}
LAYERS = (
    Layers("BERT-base, any length", lambda: Encoder(768, 3072), (torch.zeros(2, 100, 768),), OPEN),
    Layers("BERT-large, any length", lambda: Encoder(1024, 4096), (torch.zeros(2, 100, 1024),), OPEN),
    Layers("ViT-B/16", lambda: Encoder(768, 3072), (torch.zeros(1, 197, 768),)),
    Layers("BERT-small", lambda: Encoder(512, 2048), (torch.zeros(1, 128, 512),)),
    Layers("ResNet-18", lambda: Stages(64, 128, 256, 512), (torch.zeros(1, 64, 56, 56),)),
)


def benchmark_workloads(target: str, threads: int) -> set[str]:
    """Keys of the workloads of the models of `graphopt benchmark --suite e2e`, as O2 leaves them."""
    import graphopt
    from graphopt.compile import prepare
    from graphopt.database import hardware_of
    from graphopt.tools.benchmarking.models import MODELS

    keys = set()
    for name, model in MODELS.items():
        print(f"reading the workloads of {name}", flush=True)
        module, examples = model.build()
        program = graphopt.optimize(graphopt.capture(module, examples), "O2", verify="off").program
        compilation = prepare(program, target, threads)
        sites = compilation.lower(Store.empty(), hardware_of(compilation.target)).choices.sites
        keys |= {site.made.choice.workload.key for site in sites}
    return keys


def tuned(seconds: float, target: str, threads: int) -> Iterator[Record]:
    """What was found for all layers in `seconds` seconds."""
    import graphopt
    from graphopt.tuning import tune

    for layers in LAYERS:
        print(f"{layers.name}, {threads} threads", flush=True)
        torch.manual_seed(0)
        program = graphopt.capture(layers.build().eval(), layers.inputs, dynamic_shapes=layers.dynamic)
        program = graphopt.optimize(program, "O2", verify="off").program
        store = Store.empty()
        tune(program, target, seconds=seconds / len(LAYERS), database=store, threads=threads)
        yield from store.records()


def fill(seconds: float, target: str, threads: int) -> int:
    """Tune, and write what gained and belongs to no model of the benchmark; returns how many records are new."""
    found = [*tuned(seconds / SHARE, target, 1), *tuned(seconds * (SHARE - 1) / SHARE, target, threads)]
    excluded = benchmark_workloads(target, threads)
    own = [record for record in found if record.ratio < GAIN and record.workload.key not in excluded]
    present = parse(SHIPPED.read_bytes()).records
    kept = best_of((record.hardware, record) for record in (*present, *own)).values()
    lines = sorted(record.to_line() for record in kept)
    write_whole(SHIPPED, b"".join(lines))
    return len(lines) - len(present)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of tuning (default 600)")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: one a core)")
    arguments = parser.parse_args()
    print(f"{fill(arguments.seconds, arguments.target, arguments.threads)} new records in {SHIPPED}")


if __name__ == "__main__":
    main()
