from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.errors import UsageError
from graphopt.tools.model_argument import parse_dynamic
from tests.tools.conftest import DYNAMIC, TINY, Cli


def test_inspect(cli: Cli) -> None:
    outcome = cli("inspect", TINY)
    assert outcome.code == 0
    assert "3x8" in outcome.out and "aten.linear.default" in outcome.out and "144 in 2 tensors" in outcome.out


def test_inspect_as_json_with_dynamic_size(cli: Cli) -> None:
    report = cli("inspect", TINY, "--dynamic", DYNAMIC, "--json").json
    assert report["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["rows", 8], "domain": "any"}]
    assert report["sizes"] == {"rows": {"low": 1, "high": 64}}


def test_dynamic_bounds() -> None:
    shapes = parse_dynamic(["a:b:0=batch,1=seq:2..9", "c:1=seq:1.."])
    assert shapes["a:b"][0] == "batch"
    assert (shapes["a:b"][1].min, shapes["a:b"][1].max, shapes["c"][1].min) == (2, 9, 1)


def test_dynamic_expressions() -> None:
    shapes = parse_dynamic(["m:0=batch,1=past+1", "m:2=max(past, 2),-1=seq:1..9"])
    assert (shapes["m"][0], shapes["m"][1], shapes["m"][2]) == ("batch", "past+1", "max(past, 2)")
    assert shapes["m"][-1].max == 9


@pytest.mark.parametrize(
    ("text", "words"), [("x:0=n:9..2", "smaller one first"), ("x:0=n+1:2..9", "which is computed")]
)
def test_dynamic_bounds_that_cannot_be(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_dynamic([text])


def test_a_module_that_leaves_when_imported(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "leaving.py").write_text("raise SystemExit(7)\n")
    cli("inspect", "leaving:f").refused("cannot import leaving", "SystemExit: 7")


def test_names_in_any_alphabet(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "größe.py").write_text("from tests.tools.tiny_models import dense as modèle\n", encoding="utf-8")
    assert cli("inspect", "größe:modèle").code == 0


def test_help_offers_what_is_accepted(cli: Cli) -> None:
    for verb in ("inspect", "compare", "benchmark"):
        assert ".gopt" in (text := cli(verb, "--help").out) and ".onnx" in text


@pytest.mark.parametrize("text", ["x", "x:", "x:a=b", "x:0=", "x:0=rows:1-64", "x:0=rows,"])
def test_dynamic_misspelt(text: str) -> None:
    with pytest.raises(UsageError, match="ids:0=batch"):
        parse_dynamic([text])


def test_unknown_input_in_dynamic(cli: Cli) -> None:
    cli("inspect", TINY, "--dynamic", "y:0=rows").refused("unknown input 'y'", "x")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nothing", "not a model"),
        ("nothing.pt2", "does not exist"),
        ("no_such_module:function", "No module named 'no_such_module'"),
        ("tests.tools.tiny_models:dens", "no function 'dens'"),
        ("tests.tools.tiny_models:no_example", "must return (module, example_inputs)"),
        ("tests.tools.tiny_models:broken", "no such checkpoint"),
        ("tests.tools.tiny_models:leaves", "leaves failed: SystemExit: 7"),
        (".", "is a folder"),
        ("no/such", "no/such does not exist"),
        ("models/mm.py:make", "write models.mm:make"),
    ],
)
def test_not_a_model(cli: Cli, model: str, words: str) -> None:
    cli("inspect", model).refused(words)


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\3\4" + bytes(40)])
def test_damaged_file(cli: Cli, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "damaged.pt2").write_bytes(content)
    cli("inspect", "damaged.pt2").refused("damaged.pt2")


def test_truncated_file(cli: Cli, tmp_path: Path) -> None:
    assert cli("optimize", TINY, "-o", "whole.pt2", "-O0").code == 0
    whole = (tmp_path / "whole.pt2").read_bytes()
    (tmp_path / "half.pt2").write_bytes(whole[: len(whole) // 2])
    cli("inspect", "half.pt2").refused("half.pt2")


def test_damaged_onnx_is_refused_in_plain_words(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08")
    cli("inspect", "model.onnx").refused("ONNX")


def test_onnx_is_a_model(cli: Cli) -> None:
    assert cli("optimize", TINY, "-o", "tiny.onnx", "-O0").code == 0
    assert cli("inspect", "tiny.onnx").code == 0
    assert cli("compare", TINY, "tiny.onnx").code == 0


def test_function_in_the_current_folder(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "here_model.py").write_text("from tests.tools.tiny_models import dense\n")
    assert cli("inspect", "here_model:dense").code == 0


def test_artifact_where_a_model_is_wanted(cli: Cli) -> None:
    cli("optimize", "model.gopt", "-o", "out.pt2").refused("model.gopt is compiled already")
