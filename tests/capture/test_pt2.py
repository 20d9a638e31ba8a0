"""`.pt2` files: what is refused, and that nothing in one ever runs."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim

from graphopt.capture import Limits, capture
from graphopt.errors import CaptureError
from graphopt.untrusted.pt2_graph import _TARGET, _check_expression
from tests import models

Edit = Callable[[str, bytes], bytes]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module, examples, _ = models.mlp()
    exported = torch.export.export(module, examples, dynamic_shapes={"x": {0: Dim("batch", min=1, max=64)}})
    path = tmp_path_factory.mktemp("pt2") / "mlp.pt2"
    torch.export.save(exported, path)
    return path


def rewritten(saved: Path, target: Path, edit: Edit, extra: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(target, "w") as sink:
        for name in source.namelist():
            sink.writestr(name, edit(name, source.read(name)))
        for name, content in (extra or {}).items():
            sink.writestr(name, content)
    return target


def edit_json(part: str, change: Callable[[Any], None]) -> Edit:
    def edit(name: str, content: bytes) -> bytes:
        if not name.endswith(part):
            return content
        value = json.loads(content)
        change(value)
        return json.dumps(value).encode()

    return edit


class Marker:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def pickled(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": Marker(marker)}, buffer)
    return buffer.getvalue()


def test_reads_values_names_and_sample_inputs(saved: Path) -> None:
    module, examples, _ = models.mlp()
    program = capture(str(saved), dynamic_shapes={"x": {0: "batch"}})
    assert (program.name, program.inputs[0].name, program.inputs[0].shape) == ("mlp", "x", ("batch", 16))
    assert torch.equal(program.examples[0], examples[0])
    torch.testing.assert_close(program(*examples)[0], module(*examples))


def test_marker_really_marks(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.load(io.BytesIO(pickled(marker)), weights_only=False)["x"].close()
    assert marker.exists()


def test_code_in_sample_inputs_never_runs(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    bad = rewritten(
        saved,
        tmp_path / "bad.pt2",
        lambda name, content: pickled(marker) if name.endswith("sample_inputs/model.pt") else content,
    )
    program = capture(bad)
    assert not marker.exists()
    assert program.examples[0].shape[1] == 16


def test_code_in_weights_never_runs(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def use_pickle(config: Any) -> None:
        config["config"]["first.weight"]["use_pickle"] = True

    edit = edit_json("model_weights_config.json", use_pickle)
    bad = rewritten(
        saved,
        tmp_path / "bad.pt2",
        lambda name, content: pickled(marker) if name.endswith("weight_0") else edit(name, content),
    )
    with pytest.raises(CaptureError, match=r"'first\.weight' is stored as a pickle"):
        capture(bad)
    assert not marker.exists()


def set_batch(text: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        sizes = model["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = text

    return change


def rename_input(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"] = name

    return change


def call(target: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model["graph_module"]["graph"]["nodes"][0]["target"] = target

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_batch("open('MARKER', 'w')"), "no arithmetic on sizes"),
        (set_batch("Symbol('s77').__class__"), "no arithmetic on sizes"),
        (set_batch("9**9**9**9"), "no arithmetic on sizes"),
        (rename_input("x=open('MARKER','w')"), "no identifier"),
        (call("torch.load"), "not an operator"),
        (call("torch.ops.aten.from_file.default"), "not an operator"),
        (call("#my.extension"), "not an operator"),
        (lambda model: model["graph_module"]["graph"].pop("nodes"), "damaged|cannot load"),
    ],
)
def test_code_in_the_graph_never_runs(saved: Path, tmp_path: Path, change: Any, message: str) -> None:
    marker = tmp_path / "marker"
    edit = edit_json("models/model.json", change)
    bad = rewritten(
        saved, tmp_path / "bad.pt2", lambda name, content: edit(name, content).replace(b"MARKER", str(marker).encode())
    )
    with pytest.raises(CaptureError, match=message):
        capture(bad)
    assert not marker.exists()


def test_guards_in_the_file_are_dropped(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def change(model: Any) -> None:
        model["guards_code"] = [f"open({str(marker)!r}, 'w')"]

    capture(rewritten(saved, tmp_path / "bad.pt2", edit_json("models/model.json", change)))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["mlp/../../evil", "/etc/evil", "mlp\\..\\evil", "other/data"])
def test_names_that_lead_elsewhere(saved: Path, tmp_path: Path, name: str) -> None:
    bad = rewritten(saved, tmp_path / "bad.pt2", lambda _, content: content, {name: b"x"})
    with pytest.raises(CaptureError, match=r"leads out|not in one folder"):
        capture(bad)


def test_compiled_code_is_refused(saved: Path, tmp_path: Path) -> None:
    bad = rewritten(saved, tmp_path / "bad.pt2", lambda _, content: content, {"mlp/data/aotinductor/model/x.so": b"x"})
    with pytest.raises(CaptureError, match="AOTInductor"):
        capture(bad)


def test_custom_objects_are_refused(saved: Path, tmp_path: Path) -> None:
    def change(config: Any) -> None:
        config["config"]["first.weight"]["path_name"] = "custom_obj_0"

    with pytest.raises(CaptureError, match="custom object"):
        capture(rewritten(saved, tmp_path / "bad.pt2", edit_json("model_weights_config.json", change)))


def test_limits(saved: Path) -> None:
    for limits, name in ((Limits(max_bytes=100), "max_bytes"), (Limits(max_members=2), "max_members")):
        with pytest.raises(CaptureError, match=name):
            capture(saved, limits=limits)


def test_files_that_are_no_model(saved: Path, tmp_path: Path) -> None:
    text, plain, short = tmp_path / "text.pt2", tmp_path / "plain.pt2", tmp_path / "short.pt2"
    text.write_text("hello")
    with zipfile.ZipFile(plain, "w") as file:
        file.writestr("a/b", "c")
    content = saved.read_bytes()
    short.write_bytes(content[: len(content) // 2])
    torch.save({"a": torch.ones(1)}, tmp_path / "weights.pt2")
    for path in (text, plain, short, tmp_path / "weights.pt2", tmp_path / "absent.pt2", tmp_path):
        with pytest.raises(CaptureError) as caught:
            capture(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_flipped_bytes_never_crash(saved: Path, tmp_path: Path) -> None:
    content = bytearray(saved.read_bytes())
    for position in range(50, len(content), len(content) // 40):
        changed = content.copy()
        changed[position] ^= 0xFF
        (tmp_path / "flipped.pt2").write_bytes(changed)
        try:
            capture(tmp_path / "flipped.pt2")
        except CaptureError:
            continue


@pytest.mark.parametrize(
    "text",
    [
        "Pow(9, 99999999999)",
        "PowByNatural(9, Integer(99999999999))",
        "1 << 99999999999",
        "((9**8)**8)**8",
        "Pow(Mul(Pow(9, 8), 2), 8)",
        "Float(1.5, 99999999999)",
        "s0 | 1",
    ],
)
def test_sizes_that_would_never_be_computed_are_refused(text: str) -> None:
    with pytest.raises(CaptureError, match="no arithmetic on sizes"):
        _check_expression(text)


@pytest.mark.parametrize("text", ["Pow(Symbol('s0', integer=True), Integer(2))", "2*s0**2 + 1", "Max(1, s0 // 2)"])
def test_sizes_as_torch_writes_them_pass(text: str) -> None:
    _check_expression(text)


@pytest.mark.parametrize("name", ["__class__", "add.__call__", "__init__.default", "__dict__.add"])
def test_python_attributes_are_no_operators(name: str) -> None:
    assert not _TARGET.fullmatch(f"torch.ops.aten.{name}")


@pytest.mark.parametrize("name", ["add.Tensor", "__and__.Tensor", "__rshift__.Scalar", "_to_copy.default"])
def test_operators_of_aten_are_operators(name: str) -> None:
    assert _TARGET.fullmatch(f"torch.ops.aten.{name}")
