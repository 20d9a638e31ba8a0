"""Check that this machine can run artifacts and, where the extra is installed, compile them."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.tools.table import add_json_option, format_table, wants_text, write_json

SUMMARY = "check what this machine has and lacks"
OPTIONAL = ("onnx", "onnxscript", "onnxruntime")
Finding = tuple[str, str, str]  # what, state ("ok", "problem", or "-" for a thing one can do without), detail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="also check that this target can be compiled for and run here")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.target is not None:
        from graphopt.registry import check_target as check_name

        check_name(arguments.target)
    findings = list(examine(arguments.target))
    rows: list[dict[str, Any]] = [dict(zip(("check", "state", "detail"), item, strict=True)) for item in findings]
    healthy = all(state != "problem" for _, state, _ in findings)
    write_json(arguments, {"healthy": healthy, "checks": rows})
    if wants_text(arguments):
        print(format_table(rows))
    return 0 if healthy else 1


def examine(target: str | None) -> Iterator[Finding]:
    yield "python", "ok", f"{platform.python_version()} at {sys.executable}"
    yield "graphopt", "ok", version("graphopt")
    yield finding("numpy", lambda: version("numpy"))
    yield finding("tvm runtime", check_runtime)
    yield finding("cpu", describe_cpu)
    yield "threads", "ok", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} CPUs may be used"
    if importlib.util.find_spec("torch") is None and target is None:
        yield "compile", "-", 'not installed; pip install "graphopt[compile]" to optimize and compile'
    else:
        yield from examine_compiler(target)
    for name in OPTIONAL:
        yield name, "ok" if installed(name) else "-", installed(name) or "not installed"


def examine_compiler(target: str | None) -> Iterator[Finding]:
    yield finding("torch", describe_torch)
    yield finding("apache-tvm", check_pair)
    yield finding("linker", check_linker)
    yield finding("cache folder", check_cache)
    if target is not None:
        yield finding(f"target {target}", lambda: check_target(target))


def finding(name: str, check: Callable[[], str]) -> Finding:
    """A check returns what it found or raises what is wrong."""
    try:
        return name, "ok", check()
    except PackageNotFoundError as e:
        return name, "problem", f"not installed; pip install {e.name}"
    except (GraphoptError, OSError) as e:
        return name, "problem", str(e)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_runtime() -> str:
    from graphopt.runtime.library import ffi, find_runtime

    ffi()
    return f"apache-tvm-ffi {version('apache-tvm-ffi')}, {find_runtime()}"


def check_pair() -> str:
    from graphopt.runtime.library import PINNED

    found = {name: version(name) for name in PINNED}
    if found != PINNED:
        wanted = " ".join(f"{name}=={value}" for name, value in PINNED.items())
        raise GraphoptError(f"{found['apache-tvm']} with ffi {found['apache-tvm-ffi']} crashes; pip install {wanted}")
    return f"{found['apache-tvm']} with ffi {found['apache-tvm-ffi']}, the pinned pair"


def describe_torch() -> str:
    """Which build pip took depends on its index."""
    version("torch")
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    return f"{torch.__version__}, a {build} build"


def describe_cpu() -> str:
    from graphopt.runtime.features import cpu_name, host_features

    notable = (
        *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512vbmi", "amx_tile"),
        *("asimd", "asimddp", "i8mm", "sve"),
    )
    return f"{cpu_name()}: {' '.join(name for name in notable if name in host_features()) or 'no vector extensions'}"


def check_linker() -> str:
    from graphopt.backends.linker import HINT, find_linker

    command = find_linker()
    if command is None:
        raise GraphoptError(f"none found; {HINT}")
    return " ".join(command)


def check_cache() -> str:
    from graphopt.backends.tuner.store import user_folder

    folder = user_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return str(folder)


def check_target(name: str) -> str:
    from graphopt.registry import find_backend
    from graphopt.runtime.features import missing

    backend = find_backend(name)
    target = backend.resolve_target(name)
    if lacking := missing(target.features):
        raise GraphoptError(f"can be compiled for, not run here: this CPU lacks {', '.join(lacking)}")
    if backend.runnable(target) is not target:
        raise GraphoptError("can be compiled for, not run here: Linux gives this process no AMX tiles")
    return f"{target.name}, {target.architecture}: can be compiled for and run here"


if __name__ == "__main__":
    from graphopt.tools.command_line import script

    script(__file__)
