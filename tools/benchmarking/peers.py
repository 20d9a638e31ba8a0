"""The runtimes that can stand beside graphopt, and the model as each takes it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.errors import GraphoptError, MissingExtraError, UnknownNameError, UsageError
from graphopt.tools.benchmarking.turns import Entrant, Failure
from graphopt.tools.model_argument import is_artifact

if TYPE_CHECKING:
    from graphopt.program import Program

ALL = "all"
ONNX, PT2 = ".onnx", ".pt2"


@dataclass(frozen=True)
class Peer:
    """The module that must be installed, the kind of file it opens, whether to call it as rarely as can be.

    `dtypes` are those that it can be told to multiply in; the first is its side's own.
    """

    module: str
    suffix: str
    sparing: bool = False
    dtypes: tuple[str, ...] = ("f32",)


PEERS = {
    "onnxruntime": Peer("onnxruntime", ONNX),
    "openvino": Peer("openvino", ONNX, dtypes=("f32", "bf16")),
    "inductor": Peer("torch", PT2),
    "tvm": Peer("tvm", PT2, sparing=True),
}


def check_peers(text: str, dtype: str = "f32") -> list[str]:
    """The names in "a,b", or every installed one that multiplies in `dtype` for "all".

    Raises UnknownNameError, MissingExtraError for a named one that is not installed, or UsageError for one that cannot
    multiply in `dtype`.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == [ALL]:
        return [name for name, peer in PEERS.items() if installed(name) and dtype in peer.dtypes]
    for name in names:
        if name not in PEERS:
            raise UnknownNameError("runtime", name, [*PEERS, ALL])
        if not installed(name):
            raise MissingExtraError(f'{name} is not installed; run pip install "graphopt[bench]"')
        if dtype not in PEERS[name].dtypes:
            able = ", ".join(other for other, peer in PEERS.items() if dtype in peer.dtypes)
            raise UsageError(f"{name} has no --dtype {dtype} here; compare with {able}")
    return list(dict.fromkeys(names))


def check_artifacts(text: str) -> tuple[list[Entrant], str]:
    """The artifacts in "a,b.gopt", by their names, and the rest of the text.

    Raises UsageError for a file that is not there.
    """
    names = [name.strip() for name in text.split(",")]
    paths = [name for name in names if is_artifact(name)]
    for path in paths:
        if not Path(path).exists():
            raise UsageError(f"--against {path}: there is no such file; graphopt compile writes one")
    rest = ",".join(name for name in names if name not in paths)
    return [Entrant("graphopt", path, name=Path(path).name) for path in paths], rest


def installed(name: str) -> bool:
    return importlib.util.find_spec(PEERS[name].module) is not None


def peer_entrants(
    program: Program, peers: list[str], folder: Path, dtype: str = "f32"
) -> tuple[list[Entrant], list[Failure]]:
    """Each peer with its file, or why there is none: not everything can be written as ONNX."""
    entrants, failures = [], []
    for name in peers:
        try:
            path = export_for_peer(program, PEERS[name].suffix, folder)
        except GraphoptError as e:
            failures.append(Failure(name, f"{name} cannot have this model: {e}"))
        else:
            side = name if dtype == PEERS[name].dtypes[0] else f"{name}-{dtype}"
            entrants.append(Entrant(side, path, PEERS[name].sparing, name))
    return entrants, failures


def export_for_peer(program: Program, suffix: str, folder: Path) -> str:
    """The captured, unoptimized model with the same dynamic sizes, each kind of file written once; returns its path."""
    path = folder / f"model{suffix}"
    if not path.exists():
        if suffix == ONNX:
            program.to_onnx(str(path))
        else:
            program.save(str(path))
    return str(path)
