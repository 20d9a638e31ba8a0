"""How native code gets into the process; most of it needs a process that has imported nothing yet."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graphopt.errors import FeedError, MissingExtraError, UsageError
from graphopt.runtime import InferenceSession, library
from graphopt.runtime.library import find_function

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
"""
RUN = """
import numpy as np
from graphopt.runtime import InferenceSession
session = InferenceSession(sys.argv[1])
x = np.ones((2, 8), np.float32)
assert np.array_equal(session.run(None, {"x": x})[0], x * np.arange(8) + 1)
"""


def fresh(code: str, *arguments: str | Path, **environment: str) -> str:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_session_runs_where_torch_onnx_and_tvm_cannot_be_imported(artifact: Path) -> None:
    blocked = "BLOCKED = {'torch', 'onnx', 'onnxruntime', 'tvm', 'ml_dtypes'}"
    check = "print(sorted({'torch', 'onnx', 'onnxruntime', 'tvm'} & set(sys.modules)))"
    assert fresh(f"{blocked}{BLOCK}{RUN}{check}", artifact) == "[]"


def test_a_session_imports_neither_torch_nor_tvm_where_they_are_installed(artifact: Path) -> None:
    check = "print(sorted({'torch', 'onnx', 'onnxruntime', 'tvm'} & set(sys.modules)))"
    assert fresh(f"import sys{RUN}{check}", artifact) == "[]"


def test_importing_the_runtime_is_lean() -> None:
    code = "import sys, graphopt.runtime; print(sorted({'numpy', 'tvm_ffi', 'torch', 'tvm'} & set(sys.modules)))"
    assert fresh(code) == "[]"


def test_only_the_standard_library_numpy_and_tvm_ffi_are_imported() -> None:
    imported = set()
    for path in Path(library.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None
                own = node.module.startswith(("graphopt.runtime", "graphopt.errors"))
                imported.add("own" if own else node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"own", "numpy", "tvm_ffi"}


def test_torch_can_be_imported_afterwards_and_by_others_meanwhile() -> None:
    code = (
        "import sys, threading\n"
        "from graphopt.runtime.library import hidden\n"
        "before = list(sys.meta_path)\n"
        "seen = []\n"
        "def other():\n"
        "    import json.tool\n"
        "    seen.append('json.tool' in sys.modules)\n"
        "with hidden('json.tool'):\n"
        "    try:\n"
        "        import json.tool\n"
        "    except ModuleNotFoundError as e:\n"
        "        seen.append(e.name)\n"
        "    thread = threading.Thread(target=other); thread.start(); thread.join()\n"
        "    import json.tool\n"
        "print(seen, sys.meta_path == before)\n"
    )
    assert fresh(code) == "['json.tool', True] True"


@pytest.mark.parametrize("order", ["import tvm{run}", "{run}import tvm"])
def test_sessions_live_beside_tvm_and_the_torch_it_imports(artifact: Path, order: str) -> None:
    quiet = "import sys, warnings; warnings.simplefilter('ignore')\n"
    check = "\ny = session.run(None, {'x': x})[0]; print(y[0, 3])"
    assert fresh(quiet + order.format(run=RUN) + check, artifact) == "4.0"


def test_the_runtime_may_lie_anywhere(artifact: Path) -> None:
    path = library.find_runtime()
    blocked = "BLOCKED = {'tvm'}"
    assert fresh(f"{blocked}{BLOCK}{RUN}print('ran')", artifact, GRAPHOPT_TVM_RUNTIME=path) == "ran"


def test_a_runtime_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_TVM_RUNTIME", "/nowhere/libtvm_runtime.so")
    with pytest.raises(UsageError, match=r"GRAPHOPT_TVM_RUNTIME is /nowhere/libtvm_runtime\.so, and there is no such"):
        library.find_runtime()
    monkeypatch.delenv("GRAPHOPT_TVM_RUNTIME")
    monkeypatch.setattr(library, "_package_folders", lambda name: ())
    with pytest.raises(MissingExtraError, match=r"needs libtvm_runtime\.so; pip install apache-tvm==[0-9]"):
        library.find_runtime()


def test_a_runtime_that_is_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_TVM_RUNTIME", "/tmp")
    with pytest.raises(UsageError, match=r"is the folder /tmp; name the file libtvm_runtime\.so"):
        library.find_runtime()


def test_a_runtime_that_is_another_library() -> None:
    other = str(importlib.import_module("numpy._core._multiarray_umath").__file__)
    code = "from graphopt.runtime import library\ntry:\n    library.ffi()\nexcept Exception as e:\n    print(e)"
    assert fresh(code, GRAPHOPT_TVM_RUNTIME=other).startswith(f"{other} is another library than TVM's runtime")


def test_another_version_of_the_pair_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import tvm_ffi

    monkeypatch.setattr(tvm_ffi, "__version__", "0.1.15")
    with pytest.raises(UsageError, match=r"apache-tvm-ffi 0\.1\.15 is installed, .*; pip install apache-tvm-ffi==0\.1"):
        library._load()
    monkeypatch.undo()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.28")
    with pytest.raises(UsageError, match=r"apache-tvm 0\.28 is installed, .*; pip install apache-tvm-ffi==0\.1"):
        library.find_runtime()


def test_the_pair_is_the_one_the_package_pins() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name, version in library.PINNED.items():
        assert f'"{name}=={version}"' in text


def test_a_library_is_opened_once_and_two_libraries_never_mix(parts: Any, tmp_path: Path) -> None:
    """Two memory files get the same descriptor number; the dynamic linker must not take one for the other."""
    first = InferenceSession(parts.write(tmp_path / "a.gopt"))
    again = InferenceSession(parts.write(tmp_path / "b.gopt"))
    assert again._model.library is first._model.library
    code = parts.libraries["lib/cpu.so"]
    other = InferenceSession(parts.write(tmp_path / "c.gopt", libraries={"lib/cpu.so": code + b"\0"}))
    assert other._model.library is not first._model.library
    inodes = {line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:graphopt" in line}
    assert len(inodes) >= 2


def test_no_descriptor_is_left_open(parts: Any, tmp_path: Path) -> None:
    code = parts.libraries["lib/cpu.so"]
    before = len(os.listdir("/proc/self/fd"))
    for index in range(3):
        InferenceSession(parts.write(tmp_path / "a.gopt", libraries={"lib/cpu.so": code + bytes(index + 2)}))
    assert len(os.listdir("/proc/self/fd")) <= before + 3  # one mapping each at most


def test_a_child_made_by_fork_runs_the_parents_session(artifact: Path) -> None:
    code = (
        "\nimport os\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    y = session.run(None, {'x': x})[0]\n"
        "    os._exit(0 if y[0, 3] == 4 else 1)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    assert fresh(f"import sys{RUN}{code}", artifact) == "0"


def test_functions_of_the_library_are_found_by_name(artifact: Path) -> None:
    code = InferenceSession(artifact)._model.library
    assert find_function(code, "multiply") is not None
    assert find_function(code, "graphopt_set_denormals") is None


def test_denormals_are_switched_around_every_run(artifact: Path) -> None:
    session = InferenceSession(artifact, threads=1)
    calls: list[tuple[int, int]] = []
    session._set_denormals = lambda *call: calls.append(call)
    feed, _ = session.samples()
    session.run(None, feed)
    assert calls == [(1, 1), (0, 1)]
    with pytest.raises(FeedError):
        session.run(None, {})
    assert calls == [(1, 1), (0, 1)]
