from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from graphopt import registry, spec_string
from graphopt.contract import Pass, PassContext, PassResult
from graphopt.errors import UnknownNameError, UsageError
from graphopt.program import Program
from graphopt.spec_string import format_spec, make_pass, parse_spec, parse_value, pass_options


@dataclass(frozen=True)
class LutMatmul(Pass):
    """A pass with an option of every type."""

    name = "lut-matmul"
    bits: int
    group_size: int = 64
    threshold: float = 0.5
    symmetric: bool = True
    layers: tuple[str, ...] = ()
    mode: Literal["fast", "small"] = "fast"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.bits > 8:
            raise ValueError(f"bits={self.bits} exceeds 8; give 1 to 8")

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_string, "find_pass", lambda name: {"lut-matmul": LutMatmul}.get(name) or find(name))


find = registry.find_pass


def test_options_become_fields() -> None:
    (item,) = parse_spec("lut-matmul{bits=2,group-size=32,threshold=1,symmetric=false,layers=[a,b],limit=7}")
    assert item == LutMatmul(2, 32, 1.0, False, ("a", "b"), "fast", 7)


@pytest.mark.parametrize(
    "spec",
    [
        "dead-code",
        "dead-code,constant-folding{max-bytes=4096}",
        "lut-matmul{bits=2}",
        'lut-matmul{bits=2,layers=["a b","1"],mode=small}',
        "lut-matmul{bits=2,threshold=0.25,symmetric=false},dead-code",
    ],
)
def test_formatting_gives_back_what_was_parsed(spec: str) -> None:
    assert format_spec(parse_spec(spec)) == spec


def test_spaces_and_snake_case_are_accepted() -> None:
    assert parse_spec(" lut-matmul{ bits = 2 , group_size=32 } , dead-code ") == (
        LutMatmul(2, 32),
        *parse_spec("dead-code"),
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("1e3", 1e3), ("true", True), ("null", None), ("two", "two"), ("2x", "2x"), ('"1"', "1"), ("[]", [])],
)
def test_values_are_json_and_bare_words(text: str, value: Any) -> None:
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("lut-matmul{bits=two}", "option 'bits' of lut-matmul takes an integer, got \"two\""),
        ("lut-matmul{bits=2.5}", "takes an integer, got 2.5"),
        ("lut-matmul{bits=true}", "takes an integer, got true"),
        ("lut-matmul{bits=2,mode=big}", "takes one of fast, small"),
        ("lut-matmul{bits=2,layers=a}", "takes a list, each item a word"),
        ("lut-matmul{bits=2,limit=x}", "takes an integer or null"),
        ("lut-matmul", "needs the option 'bits'; write lut-matmul{bits=...}"),
        ("lut-matmul{bits=9}", "lut-matmul: bits=9 exceeds 8"),
        ("dead-code{x=1}", "takes no options"),
        ("lut-matmul{bits}", "not of the form name=value at character 16"),
        ("lut-matmul{bits=2", "a comma or a closing brace is missing"),
        ("lut-matmul{bits=2}x", "a comma is missing"),
        ("lut-matmul{bits=2,bits=3}", "given twice"),
        ("lut-matmul{bits=}", "a value is missing"),
        ("lut-matmul{bits={}}", "an object is no option value"),
        ("", "a pass name is missing"),
        ("dead-code,", "a pass name is missing"),
        ("a" * 3000 + "{", "not of the form"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(spec: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_spec(spec)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown option of lut-matmul 'group-sizes'; did you mean 'group-size'"):
        make_pass("lut-matmul", {"bits": 2, "group-sizes": 3})


def test_options_are_json_values() -> None:
    options = pass_options(LutMatmul(2, layers=("a",)))
    assert options["layers"] == ["a"] and options["group-size"] == 64
