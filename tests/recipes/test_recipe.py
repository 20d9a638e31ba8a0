from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml

import tests.models
from graphopt.data.metric import open_metric
from graphopt.errors import RecipeError, UsageError
from graphopt.levels import LEVELS
from graphopt.optimize import choose_passes, optimize
from graphopt.recipes.recipe import SETTINGS, is_recipe, read_recipe, shipped_recipes
from graphopt.recipes.recipe_schema import SETTING_HELP, recipe_schema
from graphopt.registry import pass_locations
from graphopt.spec_string import format_spec

ROOT = Path(__file__).parents[2]
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """write("passes: [O1]", name="a.yaml") -> "a.yaml", in the current folder and with the heading."""
    monkeypatch.chdir(tmp_path)

    def make(text: str, name: str = "r.yaml", heading: str = 'graphopt: "1.0"\n') -> str:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(heading + text)
        return name

    return make


def spec(source: str) -> str:
    return format_spec(step.item for step in read_recipe(source).passes)


def mistakes(source: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_recipe(source)
    return list(caught.value.mistakes)


def test_passes_in_every_spelling(write: Write) -> None:
    recipe = write("passes:\n- O1\n- dead-code,constant-folding{max-bytes=1}\n- {name: merge-linears, max_bytes: 2}\n")
    tail = "dead-code,constant-folding{max-bytes=1},merge-linears{max-bytes=2}"
    assert spec(recipe) == f"{','.join(LEVELS['O1'])},{tail}"
    assert [step.origin for step in read_recipe(recipe).passes[-3:]] == ["r.yaml:4", "r.yaml:4", "r.yaml:5"]


def test_settings_say_where_they_come_from(write: Write) -> None:
    write("include: [base.yaml]\npasses: []\nseed: 3\n")
    write("verify: off\nseed: 1\nkeep_if_faster: true\n", name="base.yaml")
    found = {name: (item.value, item.origin) for name, item in read_recipe("r.yaml").settings.items()}
    assert found == {
        "verify": ("off", "base.yaml:2"),
        "seed": (3, "r.yaml:4"),
        "keep_if_faster": (True, "base.yaml:4"),
    }


def test_included_passes_come_first_and_once(write: Write) -> None:
    write("passes: [dead-code]", name="sub/base.yaml")
    write("include: [base.yaml]\npasses: [no-op-removal]", name="sub/left.yaml")
    write("include: [base.yaml]\npasses: [merge-linears]", name="sub/right.yaml")
    recipe = write("include: [sub/left.yaml, sub/right.yaml]\npasses: [common-subexpressions]")
    assert spec(recipe) == "dead-code,no-op-removal,merge-linears,common-subexpressions"
    assert read_recipe(recipe).passes[0].origin == "sub/base.yaml:2"


def test_a_cycle_is_named(write: Write) -> None:
    write("include: [b.yaml]", name="a.yaml")
    write("include: [c.yaml]", name="b.yaml")
    write("include: [./b.yaml]", name="c.yaml")
    assert mistakes("a.yaml") == ["c.yaml:2: b.yaml includes c.yaml includes b.yaml; take one of these out"]


def test_all_mistakes_are_listed_with_their_lines(write: Write) -> None:
    recipe = write(
        """description: 3
include: [cpu-fas, no.yaml, other.yaml]
passes:
  - dead-cod,constant-folding{max-byte=1}
  - name: constant-folding
    max-bytes: many
  - O7
  - other.yaml
  - {max-bytes: 3}
  - 7
verfy: numeric
verify: nope
target: cpu:x86
seed: 1.5
seed: 2
strict: yes
"""
    )
    write("passes: O2\nmerge: 1\n", name="other.yaml", heading="")
    found = mistakes(recipe)
    expected = [
        ("r.yaml:2", "description takes words"),
        ("r.yaml:3", "unknown recipe 'cpu-fas'; did you mean 'cpu-fast'?"),
        ("r.yaml:3", "the recipe no.yaml cannot be read: No such file"),
        ("r.yaml:5", "unknown pass 'dead-cod'; did you mean 'dead-code'?"),
        ("r.yaml:5", "unknown option of constant-folding 'max-byte'; did you mean 'max-bytes'?"),
        ("r.yaml:7", "option 'max-bytes' of constant-folding takes an integer, got \"many\""),
        ("r.yaml:8", "unknown level 'O7'"),
        ("r.yaml:9", "write it under include"),
        ("r.yaml:10", "needs the name of a pass"),
        ("r.yaml:11", "a level, a pass, or a mapping"),
        ("r.yaml:12", "unknown key 'verfy'; did you mean 'verify'?"),
        ("r.yaml:13", 'verify takes one of off, structure, numeric, got "nope"'),
        ("r.yaml:14", "unknown target 'cpu:x86'"),
        ("r.yaml:15", "seed takes an integer, got 1.5"),
        ("r.yaml:16", "'seed' is given twice, first in line 15"),
        ("r.yaml:17", 'strict takes true or false, got "yes"'),
        ("other.yaml:1", "the format is missing"),
        ("other.yaml:1", "passes takes a list; write for example passes: [O2]"),
        ("other.yaml:2", "unknown key 'merge'"),
    ]
    assert len(found) == len(expected), "\n".join(found)
    for mistake, (place, words) in zip(found, expected, strict=True):
        assert mistake.startswith(f"{place}: ") and words in mistake


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("passes: [O2", "r.yaml:2: this is no YAML"),
        ("passes: [*a]", "an alias (*) is not taken"),
        ("passes: [!!python/object/apply:os.system ['true']]", "is not taken; write the value alone"),
        ("passes: [{name: dead-code, <<: {a: 1}}]", "takes no options, got '<<'"),
        ("? [a]\n: 1\npasses: []", "a key is no word"),
        ("passes: [" + "[" * 5000, "nested too deeply"),
        ("description: no passes", "r.yaml:1: the recipe names no passes"),
        ("passes: [{name: constant-folding, max-bytes: 1, max_bytes: 2}]", "given twice"),
        ("strict: true\nstrict_: 1", "unknown key 'strict_'"),
        ("keep-if-faster: true\nkeep_if_faster: true\npasses: []", "'keep-if-faster' is given twice"),
        ("passes: []\n\x00", "this is no YAML"),
    ],
)
def test_what_is_no_recipe(write: Write, text: str, words: str) -> None:
    found = mistakes(write(text))
    assert any(words in mistake for mistake in found) and all("\n" not in mistake for mistake in found), found


@pytest.mark.parametrize("heading", ["graphopt: 1.0\n", 'graphopt: "2.0"\n', "graphopt: [1]\n"])
def test_another_format_is_refused(write: Write, heading: str) -> None:
    assert 'write graphopt: "1.0", in quotes' in mistakes(write("passes: []", heading=heading))[0]


@pytest.mark.parametrize("text", ["", "- O2", "O2"])
def test_a_recipe_is_a_mapping(write: Write, text: str) -> None:
    assert "a recipe is a mapping" in mistakes(write(text, heading=""))[0]


@pytest.mark.parametrize(
    ("name", "words"), [("no.yaml", "No such file"), (".yaml", "Is a directory"), ("b.yml", "not text in UTF-8")]
)
def test_files_that_cannot_be_read(write: Write, name: str, words: str) -> None:
    Path(".yaml").mkdir()
    Path("b.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=words):
        read_recipe(name)


def test_shipped_names_mean_nothing_else() -> None:
    assert shipped_recipes() and not set(shipped_recipes()) & {*pass_locations(), *LEVELS}
    assert is_recipe("cpu-fast") and is_recipe("x.yml") and not is_recipe("dead-code") and not is_recipe("O2")


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_can_be_read(name: str) -> None:
    assert read_recipe(name).passes
    text = (ROOT / "graphopt" / "recipes" / f"{name}.yaml").read_text()
    jsonschema.Draft202012Validator(recipe_schema()).validate(yaml.safe_load(text))


def test_optimize_takes_a_recipe_and_arguments_win(write: Write) -> None:
    program = tests.models.program("mlp")
    recipe = write("passes: [dead-code, {name: constant-folding, max-bytes: 1}]\nverify: off\ntarget: cpu:x86-64-v3")
    report = optimize(program, recipe).report
    assert (report.verify, report.target) == ("off", "cpu:x86-64-v3")
    assert [item.options for item in report.passes] == [{}, {"max-bytes": 1}]
    assert optimize(program, recipe, verify="structure").report.verify == "structure"
    assert [item.name for item in optimize(program, "cpu-fast").report.passes] == list(LEVELS["O3"])
    with pytest.raises(UsageError, match="write --recipe cpu-fast"):
        choose_passes("cpu-fast")


def test_settings_are_arguments_of_optimize() -> None:
    parameters = inspect.signature(optimize).parameters
    assert {name.replace("-", "_") for name in SETTINGS} <= set(parameters) and set(SETTINGS) == set(SETTING_HELP)
    assert [open_metric(name).name for name in get_args(SETTINGS["metric"])] == list(get_args(SETTINGS["metric"]))


def test_the_published_schema_is_current() -> None:
    published = json.loads((ROOT / "docs" / "recipe.schema.json").read_text())
    assert published == recipe_schema(), "run: graphopt list-passes --schema > docs/recipe.schema.json"


VALID: list[dict[str, Any]] = [
    {"passes": ["O2", "dead-code", "dead-code,constant-folding{max-bytes=1}"]},
    {"passes": [{"name": "constant-folding", "max-bytes": 1}], "verify": "off", "seed": 1, "target": "cpu"},
    {"passes": ["O2"], "target": "cuda:sm_80+sm_90"},
    {"include": ["cpu-fast"], "description": "words", "keep-if-faster": True},
]
INVALID: list[dict[str, Any]] = [
    {"passes": ["dead-cod"]},
    {"passes": [{"name": "constant-folding", "max-byte": 1}]},
    {"passes": [{"name": "constant-folding", "max-bytes": "1"}]},
    {"passes": [{"max-bytes": 1}]},
    {"passes": "O2"},
    {"passes": [], "verify": "nope"},
    {"passes": [], "verfy": "off"},
    {"passes": [], "target": "cpu:x86"},
    {"passes": [], "target": "cuda:sm_80+sm_91"},
]


@pytest.mark.parametrize("content", [*VALID, *INVALID])
def test_the_schema_and_the_reader_agree(write: Write, content: dict[str, Any]) -> None:
    recipe = {"graphopt": "1.0", **content}
    source = write(json.dumps(recipe), heading="")
    valid = jsonschema.Draft202012Validator(recipe_schema()).is_valid(recipe)
    assert valid == (content in VALID)
    if valid:
        read_recipe(source)
    else:
        mistakes(source)
