"""Hostile `.pt2` files: each ends in one sentence that names the limit, and none in a crash or a hang."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.capture import Limits, capture
from graphopt.errors import CaptureError, UsageError
from graphopt.untrusted import child
from tests import models

Change = Callable[[Any], Any]
GRAPH, WEIGHTS = "models/model.json", "model_weights_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module, examples, _ = models.mlp()
    path = tmp_path_factory.mktemp("pt2") / "mlp.pt2"
    torch.export.save(torch.export.export(module, examples), path)
    return path


def changed(saved: Path, target: Path, part: str, change: Change, *, samples: bool = False) -> Path:
    """A copy of `saved` in which the JSON member that ends in `part` went through `change`."""
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(target, "w") as sink:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith(part):
                value = json.loads(content)
                content = json.dumps(change(value) or value).encode()
            if samples or "sample_inputs" not in name:
                sink.writestr(name, content)
    return target


def graph(model: Any) -> Any:
    return model["graph_module"]["graph"]


def sizes(*numbers: int) -> list[dict[str, int]]:
    return [{"as_int": number} for number in numbers]


def set_weight(**meta: Any) -> Change:
    return lambda config: config["config"]["first.weight"]["tensor_meta"].update(meta)


def deep(model: Any) -> Any:
    model["graph_module"]["metadata"] = {}
    value: Any = []
    for _ in range(500):
        value = [value]
    model["deep"] = value


def repeat_nodes(model: Any) -> None:
    graph(model)["nodes"] *= 100


def read_itself(model: Any) -> None:
    first = graph(model)["nodes"][0]
    own = first["outputs"][0]["as_tensor"]["name"]
    first["inputs"][0]["arg"] = {"as_tensor": {"name": own}}


def huge_input(model: Any) -> None:
    meta = graph(model)["tensor_values"]["x"]
    meta["sizes"], meta["strides"] = sizes(1_000_000, 16), sizes(16, 1)


CASES: dict[str, tuple[str, Change, str]] = {
    "negative size": (WEIGHTS, set_weight(sizes=sizes(-1, 16)), "no plain size"),
    "size over 64 bits": (WEIGHTS, set_weight(sizes=sizes(1 << 64, 16)), "no plain size"),
    "size of another type": (WEIGHTS, set_weight(sizes=[{"as_int": "9"}]), "no plain size"),
    "expanded weight": (
        WEIGHTS,
        set_weight(sizes=sizes(1_000_000, 1_000_000), strides=sizes(0, 0)),
        r"Limits\.max_constant_bytes",
    ),
    "deep graph": (GRAPH, deep, "nested deeper than"),
    "node that reads itself": (GRAPH, read_itself, "torch cannot load it"),
    "many nodes": (GRAPH, repeat_nodes, r"Limits\.max_nodes"),
    "large input": (GRAPH, huge_input, r"Limits\.max_constant_bytes"),
}


@pytest.mark.parametrize("name", CASES)
def test_hostile_descriptions(saved: Path, tmp_path: Path, name: str) -> None:
    part, change, message = CASES[name]
    limits = Limits(max_nodes=100, max_constant_bytes=1 << 20)
    with pytest.raises(CaptureError, match=message) as caught:
        capture(changed(saved, tmp_path / "bad.pt2", part, change), limits=limits)
    assert "\n" not in str(caught.value)


def test_what_is_within_the_limits_passes(saved: Path, tmp_path: Path) -> None:
    program = capture(changed(saved, tmp_path / "good.pt2", GRAPH, lambda model: None), limits=Limits(max_nodes=100))
    assert program.examples[0].shape[1] == 16


def test_json_nested_too_deep_for_the_parser(saved: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt2"
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(bad, "w") as sink:
        for name in source.namelist():
            sink.writestr(name, b"[" * 1_000_000 if name.endswith(GRAPH) else source.read(name))
    with pytest.raises(CaptureError, match="damaged"):
        capture(bad)


def bomb(saved: Path, target: Path, member: str, size: int) -> Path:
    """`member` becomes `size` zeros, a thousandth of that in the file."""
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as sink:
        for name in source.namelist():
            sink.writestr(name, bytes(size) if name.endswith(member) else source.read(name))
    return target


@pytest.mark.parametrize(
    ("member", "limits", "message"),
    [
        ("weight_0", Limits(max_bytes=1 << 20), r"Limits\.max_bytes"),
        (GRAPH, Limits(max_graph_bytes=1 << 20), r"Limits\.max_graph_bytes"),
        (GRAPH, Limits(max_parse_bytes=50 << 20), r"Limits\.max_parse_bytes"),
    ],
)
def test_zip_bombs(saved: Path, tmp_path: Path, member: str, limits: Limits, message: str) -> None:
    bad = bomb(saved, tmp_path / "bomb.pt2", member, 64 << 20)
    assert bad.stat().st_size < 1 << 20
    with pytest.raises(CaptureError, match=message):
        capture(bad, limits=limits)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(saved: Path, tmp_path: Path, share: float) -> None:
    short = tmp_path / "short.pt2"
    content = saved.read_bytes()
    short.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CaptureError, match="truncated"):
        capture(short)


@pytest.mark.parametrize("strides", [[1_000_000, 1], [0, 0]])
def test_filled_constants(strides: list[int]) -> None:
    class Filled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            number = torch.zeros(1) if strides[0] == 0 else torch.zeros(1000, 1000)
            return x + (number.expand(1000, 1000) + 1).sum()

    with pytest.raises(CaptureError, match=r"fills 4000000 bytes.*raise Limits\.max_constant_bytes"):
        capture(Filled(), (torch.ones(2),), limits=Limits(max_constant_bytes=1 << 20))
    assert capture(Filled(), (torch.ones(2),), limits=Limits(max_constant_bytes=1 << 22))


def test_values_that_the_model_makes_large() -> None:
    class Repeated(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.repeat(1000, 1000).relu()

    with pytest.raises(CaptureError, match=r"takes 8000000 bytes.*raise Limits\.max_value_bytes"):
        capture(Repeated(), (torch.ones(2),), limits=Limits(max_value_bytes=7 << 20))
    assert capture(Repeated(), (torch.ones(2),), limits=Limits(max_value_bytes=8 << 20))


SLOW = r"over 1 seconds; raise Limits\.max_parse_seconds"
_LIMITED = """
import sys; sys.path.insert(0, sys.argv[1])
from graphopt.untrusted import child
child._limit(child.Limits(**child.json.loads(sys.argv[5])))
"""


@pytest.mark.parametrize(
    ("program", "limits", "message"),
    [
        (
            "import time; time.sleep(60)",
            Limits(max_parse_seconds=1),
            SLOW,
        ),
        (
            f"{_LIMITED}while True: pass",
            Limits(max_parse_seconds=1),
            SLOW,
        ),
        ("import os; os.kill(os.getpid(), 11)", Limits(), "ended with signal 11"),
        ("raise SystemExit(3)", Limits(), "ended with exit code 3"),
        ("print('{')", Limits(), "ended with exit code 0"),
    ],
)
def test_child_that_hangs_or_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, limits: Limits, message: str
) -> None:
    monkeypatch.setattr(child, "_START", program)
    with pytest.raises(CaptureError, match=message) as caught:
        child.run_child("module:function", Path("model.pt2"), tmp_path, limits)
    assert str(caught.value).startswith("model.pt2: ") and "\n" not in str(caught.value)


def test_child_cannot_write_more_than_the_file_may_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = f"{_LIMITED}open(sys.argv[4] + '/large', 'wb').truncate(1 << 30)"
    monkeypatch.setattr(child, "_START", write)
    with pytest.raises(CaptureError, match="ended with"):
        child.run_child("module:function", Path("model.pt2"), tmp_path, Limits(max_bytes=1 << 20))
    assert (tmp_path / "large").stat().st_size == 0


def test_interrupt_ends_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = "import os, sys, time; open(sys.argv[4] + '/pid', 'w').write(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(child, "_START", note)

    def interrupt() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        child.run_child("module:function", Path("model.pt2"), tmp_path, Limits())
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_child_imports_neither_torch_nor_numpy(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = "assert not {'torch', 'numpy'} & set(sys.modules)"
    monkeypatch.setattr(child, "_START", f"{child._START}; {ending}; open(sys.argv[4] + '/lean', 'w')")
    child.run_child("graphopt.untrusted.pt2_file:clean_file", saved, tmp_path, Limits())
    assert (tmp_path / "lean").exists()


def test_every_limit_is_named_by_a_test() -> None:
    text = Path(__file__).read_text() + Path(__file__).with_name("test_pt2.py").read_text()
    assert [field.name for field in fields(Limits) if f"Limits({field.name}" not in text] == []


def test_what_is_no_limit() -> None:
    with pytest.raises(UsageError, match="max_nodes=0 is no limit; give a whole number of at least 1"):
        Limits(max_nodes=0)
    with pytest.raises(UsageError, match=r"limits is dict; write limits=graphopt\.Limits"):
        capture("model.pt2", limits={"max_nodes": 9})  # type: ignore[arg-type]
