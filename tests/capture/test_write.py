"""Programs written as `.pt2` and `.onnx`."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphopt.capture import capture
from graphopt.errors import UsageError, WriteError
from graphopt.program import provenance
from tests import models


@pytest.mark.parametrize("name", ["mlp", "counter", "branching", "tied", "dict_output", "bert"])
def test_pt2_comes_back_with_everything(name: str, tmp_path: Path) -> None:
    program = models.program(name)
    program.save(str(tmp_path / "m.pt2"))
    back = capture(tmp_path / "m.pt2")
    assert back.name == program.name
    assert back.inputs == program.inputs
    assert back.outputs == program.outputs
    assert back.sizes == program.sizes
    assert [state.spec for state in back.state] == [state.spec for state in program.state]
    for mine, theirs in zip(back(*program.examples), program(*program.examples), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_provenance_comes_back(tmp_path: Path) -> None:
    program = models.program("mlp").copy()
    (relu,) = (node for node in program.nodes() if "relu" in str(node.target))
    relu.meta["custom"] = {"graphopt": {"rule": "made-up", "from": ["a", "b"]}}
    program.save(str(tmp_path / "m.pt2"))
    back = capture(tmp_path / "m.pt2")
    found = {str(node.target): provenance(node) for node in back.nodes() if provenance(node)}
    assert found == {"aten.relu.default": {"rule": "made-up", "from": ["a", "b"]}}


def test_torch_reads_our_pt2(tmp_path: Path) -> None:
    program = models.program("dict_output")
    program.save(str(tmp_path / "m.pt2"))
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    result: Any = loaded(*program.examples)
    assert list(result) == ["logits", "pair.0", "found.score", "found.index"]
    torch.testing.assert_close(result["logits"], program(*program.examples)[0])
    assert loaded(torch.ones(1, 6))["logits"].shape == (1, 5)


@pytest.mark.parametrize("name", ["conv_net", "branching", "tied", "dict_output"])
def test_onnx_agrees_with_onnxruntime(name: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    program = models.program(name)
    path = tmp_path / "m.onnx"
    program.to_onnx(str(path))
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(path)
    assert [(i.name, tuple(i.shape)) for i in session.get_inputs()] == [(s.name, s.shape) for s in program.inputs]
    assert [(o.name, tuple(o.shape)) for o in session.get_outputs()] == [(s.name, s.shape) for s in program.outputs]
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, program.examples, strict=True)}
    for got, wanted in zip(session.run(None, feed), program(*program.examples), strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=1e-5)


class Collisions(torch.nn.Module):
    """Outputs named like inner values and like a weight, a value twice, an input and a weight as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(4, requires_grad=False))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x * 2
        z = torch.relu(y)
        return {"mul": z, "relu": y, "again": z, "same": x.clone(), "scale": self.scale + z, "held": self.scale}


def test_onnx_outputs_may_be_named_like_inner_values(tmp_path: Path) -> None:
    import onnxruntime

    x = torch.randn(3, 4)
    program = capture(Collisions(), (x,))
    program.to_onnx(str(tmp_path / "m.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [item.name for item in session.get_outputs()] == ["mul", "relu", "again", "same", "scale", "held"]
    for result, wanted in zip(session.run(None, {"x": x.numpy()}), program(x), strict=True):
        np.testing.assert_array_equal(result, wanted.detach().numpy())


def test_onnx_has_no_state(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"state \(total\)"):
        models.program("counter").to_onnx(str(tmp_path / "m.onnx"))
    assert not list(tmp_path.iterdir())


def test_writing_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = models.program("mlp")
    program.save(str(tmp_path / "m.pt2"))
    program.to_onnx(str(tmp_path / "m.onnx"))
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.pt2"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pt2"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    program = models.program("mlp")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WriteError, match="No space left on device"):
        program.save(str(path))
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pt2"]


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    program = models.program("mlp")
    with pytest.raises(UsageError, match=r"must end in \.pt2"):
        program.save(str(tmp_path / "m.bin"))
    with pytest.raises(WriteError, match="cannot write"):
        program.save(str(tmp_path / "absent" / "m.pt2"))


FULL = """
import resource, sys
from graphopt.capture import capture
from graphopt.errors import GraphoptError
program = capture(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
for step in (lambda: program.save(sys.argv[2]), lambda: capture(sys.argv[1])):
    try:
        step()
    except GraphoptError as error:
        print(type(error).__name__, error)
"""


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    source, target = tmp_path / "m.pt2", tmp_path / "n.pt2"
    models.program("mlp").save(str(source))
    child = subprocess.run(
        [sys.executable, "-c", FULL, str(source), str(target)], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    written, read = child.stdout.splitlines()
    assert written == f"WriteError cannot write {target}: File too large"
    assert read.startswith(f"CaptureError {source}: the temporary folder") and "cannot be read" not in read
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pt2"]
