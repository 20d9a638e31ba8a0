"""Recipes: passes and settings of `optimize` in a YAML file.

    graphopt: "1.0"
    include: [cpu-fast]                       # shipped ones by name, others by their path from this file
    passes:
      - O1                                    # a level
      - no-op-removal,dead-code               # or what --passes takes
      - name: constant-folding                # or a mapping with options
        max-bytes: 4096
    verify: structure                         # settings

Included passes come first, in order; a file that is included twice counts where it is included first. Of a setting, the
file that includes overrides what it includes. Everything wrong in all files is reported at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

from graphopt.contract import Pass
from graphopt.errors import MissingExtraError, RecipeError, UnknownNameError, UsageError
from graphopt.levels import is_level, level_passes
from graphopt.recipes.yaml_tree import Located, parse_yaml
from graphopt.registry import check_target, find_pass
from graphopt.spec_string import build_pass, convert, read_option, read_spec

FORMAT = "1.0"
FORMATS = re.compile(r"1\.\d+")
SUFFIXES = (".yaml", ".yml")
LARGEST = 1 << 20  # bytes of a file
SETTINGS: dict[str, Any] = {
    "verify": Literal["off", "structure", "numeric"],
    "strict": bool,
    "keep-if-faster": bool,
    "seed": int,
    "target": str,
    "metric": Literal["accuracy", "cosine", "snr"],
}
KEYS = ("graphopt", "description", "include", "passes", *SETTINGS)


@dataclass(frozen=True)
class Step:
    """A pass, and where it was asked for: "recipe.yaml:4"."""

    item: Pass
    origin: str


@dataclass(frozen=True)
class Setting:
    """An argument of `optimize`, and where it was given."""

    value: Any
    origin: str


@dataclass(frozen=True)
class Recipe:
    """What a recipe comes to with all that it includes; `settings` are keyed by the parameter names of `optimize`."""

    passes: tuple[Step, ...]
    settings: Mapping[str, Setting]

    def settings_beside(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        """`given`, with the recipe's value in place of each that is its default."""
        own = {name: setting.value for name, setting in self.settings.items() if given[name] == defaults[name]}
        return {**given, **own}


def shipped_recipes() -> tuple[str, ...]:
    """The names of the recipes that are installed with graphopt."""
    names = (item.name for item in resources.files(__package__).iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def is_recipe(text: str) -> bool:
    """Whether `optimize` takes this string as a recipe, not as passes."""
    return text.endswith(SUFFIXES) or text in shipped_recipes()


def read_recipe(source: str) -> Recipe:
    """The recipe in a file, or the shipped one of this name. Raises RecipeError with all mistakes, UsageError."""
    reader = _Reader()
    first = _find(source, "")
    reader.read(first, ())
    if not reader.mistakes and not reader.names_passes:
        reader.mistakes.append((first.label, 1, "the recipe names no passes; write for example passes: [O2]"))
    if reader.mistakes:
        files = list(reader.done.values())
        found = sorted(reader.mistakes, key=lambda mistake: (files.index(mistake[0]), mistake[1]))
        raise RecipeError(f"{label}:{line}: {sentence}" for label, line, sentence in found)
    return Recipe(tuple(reader.passes), reader.settings)


@dataclass(frozen=True)
class _File:
    """`label` is what messages say; two labels may stand for one file, which `identity` tells."""

    label: str
    identity: str
    text: str


def _find(source: str, folder: str) -> _File:
    if not source.endswith(SUFFIXES):
        shipped = shipped_recipes()
        if source not in shipped:
            hint = f"the name of a file ends in {' or '.join(SUFFIXES)}"
            raise UsageError(f"{UnknownNameError('recipe', source, shipped)} ({hint})")
        text = (resources.files(__package__) / f"{source}.yaml").read_text(encoding="utf-8")
        return _File(source, source, text)
    path = os.path.normpath(os.path.join(folder, source))
    try:
        with open(path, "rb") as stream:
            content = stream.read(LARGEST + 1)
    except OSError as error:
        raise UsageError(f"the recipe {path} cannot be read: {error.strerror}") from error
    if len(content) > LARGEST:
        raise UsageError(f"{path} has over {LARGEST} bytes and is no recipe")
    try:
        return _File(path, os.path.realpath(path), content.decode())
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from error


@dataclass
class _Reader:
    """What has been read so far of a recipe and of those that it includes."""

    passes: list[Step] = field(default_factory=list)
    settings: dict[str, Setting] = field(default_factory=dict)
    mistakes: list[tuple[str, int, str]] = field(default_factory=list)
    names_passes: bool = False
    done: dict[str, str] = field(default_factory=dict)  # identity -> label, in the order in which they are read

    def read(self, file: _File, chain: tuple[_File, ...]) -> None:
        """`file` and what it includes; `chain` are the files that led to it."""
        tree, wrong = parse_yaml(file.text)
        self.mistakes.extend((file.label, line, sentence) for line, sentence in wrong)
        self.done[file.identity] = file.label
        if not isinstance(tree.value, dict):
            if not wrong:
                self._mistake(file, tree, f'a recipe is a mapping; start it with graphopt: "{FORMAT}"')
            return
        content = self._known_keys(file, tree.value)
        self._check_heading(file, tree, content)
        for item in self._items(file, content.get("include"), "include", "[cpu-fast]"):
            self._include(file, item, (*chain, file))
        self.names_passes |= "passes" in content
        for item in self._items(file, content.get("passes"), "passes", "[O2]"):
            self._read_passes(file, item)
        for key, hint in SETTINGS.items():
            if key in content:
                self._read_setting(file, key, hint, content[key])

    def _mistake(self, file: _File, place: Located, sentence: object) -> None:
        self.mistakes.append((file.label, place.line, str(sentence)))

    def _known_keys(self, file: _File, content: dict[str, Located]) -> dict[str, Located]:
        """By their kebab-case names."""
        known: dict[str, Located] = {}
        for key, value in content.items():
            spelled = key.replace("_", "-")
            if spelled not in KEYS:
                self._mistake(file, value, UnknownNameError("key", key, KEYS))
            elif spelled in known:
                self._mistake(file, value, f"{spelled!r} is given twice, first in line {known[spelled].line}")
            else:
                known[spelled] = value
        return known

    def _check_heading(self, file: _File, tree: Located, content: dict[str, Located]) -> None:
        version, description = content.get("graphopt"), content.get("description")
        if version is None:
            self._mistake(file, tree, f'the format is missing; write graphopt: "{FORMAT}"')
        elif not isinstance(version.value, str) or not FORMATS.fullmatch(version.value):
            self._mistake(file, version, f'this version reads format {FORMAT}; write graphopt: "{FORMAT}", in quotes')
        if description is not None and not isinstance(description.value, str):
            self._mistake(file, description, "description takes words; put them in quotes")

    def _items(self, file: _File, value: Located | None, key: str, example: str) -> list[Located]:
        if value is None or isinstance(value.value, list):
            return value.value if value else []
        self._mistake(file, value, f"{key} takes a list; write for example {key}: {example}")
        return []

    def _include(self, file: _File, item: Located, chain: tuple[_File, ...]) -> None:
        if not isinstance(item.value, str):
            self._mistake(file, item, "include takes names and paths of recipes; write for example include: [cpu-fast]")
            return
        try:
            found = _find(item.value, os.path.dirname(file.label))
        except UsageError as error:
            self._mistake(file, item, error)
            return
        identities = [other.identity for other in chain]
        if found.identity in identities:
            cycle = [other.label for other in chain[identities.index(found.identity) :]]
            self._mistake(file, item, f"{' includes '.join([*cycle, cycle[0]])}; take one of these out")
        elif found.identity not in self.done:
            self.read(found, chain)

    def _read_passes(self, file: _File, item: Located) -> None:
        if isinstance(item.value, dict):
            self._read_mapping(file, item)
        elif not isinstance(item.value, str):
            self._mistake(file, item, "an item of passes is a level, a pass, or a mapping with its name and options")
        elif item.value.endswith(SUFFIXES):
            self._mistake(file, item, f"{item.value} is a recipe, not a pass; write it under include")
        else:
            self._read_text(file, item)

    def _read_text(self, file: _File, item: Located) -> None:
        origin = f"{file.label}:{item.line}"
        try:
            if is_level(item.value):
                self.passes.extend(Step(found, origin) for found in level_passes(item.value))
                return
            named = read_spec(item.value)
        except UsageError as error:
            self._mistake(file, item, error)
            return
        for name, options in named:
            self._make(file, item, name, {option: Located(value, item.line) for option, value in options.items()})

    def _read_mapping(self, file: _File, item: Located) -> None:
        options = dict(item.value)
        name = options.pop("name", None)
        if name is None or not isinstance(name.value, str):
            self._mistake(file, item, "a mapping under passes needs the name of a pass; write name: constant-folding")
        else:
            self._make(file, Located(None, item.line), name.value, options)

    def _make(self, file: _File, place: Located, name: str, options: Mapping[str, Located]) -> None:
        before = len(self.mistakes)
        try:
            kind = find_pass(name)
        except MissingExtraError:
            raise
        except UsageError as error:
            self._mistake(file, place, error)
            return
        values: dict[str, Any] = {}
        for option, value in options.items():
            try:
                key, converted = read_option(kind, option, value.plain())
            except UsageError as error:
                self._mistake(file, value, error)
                continue
            if key in values:
                self._mistake(file, value, f"option {option!r} of {name} is given twice")
            values[key] = converted
        if len(self.mistakes) > before:
            return
        try:
            self.passes.append(Step(build_pass(kind, values), f"{file.label}:{place.line}"))
        except UsageError as error:
            self._mistake(file, place, error)

    def _read_setting(self, file: _File, key: str, hint: Any, value: Located) -> None:
        try:
            converted = convert(value.plain(), hint, key)
            if key == "target":
                check_target(converted)
        except UsageError as error:
            self._mistake(file, value, error)
            return
        self.settings[key.replace("-", "_")] = Setting(converted, f"{file.label}:{value.line}")
