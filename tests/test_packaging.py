"""The wheel holds the tree, imports stay lean, and dependencies point one way."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = ("passes", "backends", "tools")
HEAVY = ("torch", "tvm", "onnx", "onnxruntime", "networkx", "transformers")


def package_files() -> set[str]:
    names = {f"graphopt/{path.relative_to(ROOT / 'graphopt')}" for path in (ROOT / "graphopt").rglob("*.py")}
    names |= {f"graphopt/{path.relative_to(ROOT)}" for link in LINKS for path in (ROOT / link).rglob("*.py")}
    data = [path for suffix in ("yaml", "html", "css", "js") for path in (ROOT / "graphopt").rglob(f"*.{suffix}")]
    data += [path for path in (ROOT / "graphopt" / "package" / "cpp").rglob("*") if path.is_file()]
    names |= {f"graphopt/{path.relative_to(ROOT / 'graphopt')}" for path in data}
    names |= {f"graphopt/backends/cuda/{name}" for name in ("nvrtc_standard.h", "prelude.cu")}
    return names | {"graphopt/py.typed", "graphopt/report.schema.json", "graphopt/backends/tuner/common.jsonl"}


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)


def test_wheel_holds_exactly_the_package_files(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("graphopt", *LINKS):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path)]
    done = run("-m", "pip", "wheel", *options, str(tree))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    built = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert built == package_files()


@pytest.mark.parametrize("module", ["graphopt", "graphopt.runtime", "graphopt.runtime.session", "graphopt.tools"])
def test_import_is_lean(module: str) -> None:
    done = run("-c", f"import sys, {module}; print([m for m in {HEAVY} if sys.modules.get(m)])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("name", LINKS)
def test_bare_name_is_refused(name: str) -> None:
    done = run("-c", f"import {name}")
    assert f"import graphopt.{name} instead of {name}" in done.stderr.splitlines()[-1]


def sources(folder: str) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole name of the module"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs when the module is imported: not function bodies, not `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from at_import_time(node)


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_runtime_needs_numpy_and_tvm_ffi_only() -> None:
    allowed = ("numpy", "tvm_ffi", "graphopt.errors", "graphopt.runtime", *sys.stdlib_module_names)
    wrong = [
        (path, name)
        for path, tree in sources("graphopt/runtime")
        for name in imported(ast.walk(tree))
        if not under(name, *allowed)
    ]
    assert not wrong


def test_passes_never_import_backends() -> None:
    wrong = [
        (path, name)
        for path, tree in sources("passes")
        for name in imported(ast.walk(tree))
        if under(name, "graphopt.backends", "tvm")
    ]
    assert not wrong


@pytest.mark.parametrize("folder", ["graphopt", "passes", "tools"])
def test_tvm_and_onnx_are_imported_inside_functions(folder: str) -> None:
    heavy = ("tvm", "onnx", "onnxruntime", "onnxscript")
    wrong = [
        (path, name) for path, tree in sources(folder) for name in imported(at_import_time(tree)) if under(name, *heavy)
    ]
    elsewhere = (*(f"graphopt/{link}/" for link in LINKS), "graphopt/capture/onnx/")  # the latter imports onnx
    assert not [(path, name) for path, name in wrong if not path.startswith(elsewhere)]


def test_scripts_do_not_bear_names_of_the_standard_library() -> None:
    assert not {path.stem for path in (ROOT / "tools").glob("*.py")} & set(sys.stdlib_module_names)
