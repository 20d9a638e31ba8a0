"""Passes as one writes them on a command line: "no-op-removal,constant-folding{max-bytes=4096}".

Values are JSON scalars or lists of them; bare words are strings. Options are converted to the types of the fields of
the pass, which are the only description of its options.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from graphopt.contract import Pass
from graphopt.errors import UnknownNameError, UsageError
from graphopt.registry import find_pass

WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a word", type(None): "null"}
BARE_END = ",}]"


def parse_spec(spec: str) -> tuple[Pass, ...]:
    """The passes of a spec string, in order. Raises UsageError for bad spelling, UnknownNameError for unknown names."""
    return tuple(make_pass(name, options) for name, options in read_spec(spec))


def read_spec(spec: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """The names and options in a spec string, whether they exist or not. Raises UsageError for bad spelling."""
    reader = _Reader(spec)
    found = []
    while True:
        name = reader.word("{,")
        if not name:
            raise reader.error("a pass name is missing")
        found.append((name, reader.options() if reader.take("{") else {}))
        if reader.at_end():
            return tuple(found)
        if not reader.take(","):
            raise reader.error("a comma is missing")


def make_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """A pass with these options, spelled in kebab-case or snake_case."""
    kind = find_pass(name)
    return build_pass(kind, dict(read_option(kind, option, value) for option, value in options.items()))


def read_option(kind: type[Pass], option: str, value: Any) -> tuple[str, Any]:
    """The field that `option` names and `value` as the type of that field."""
    known = {field.name.replace("_", "-"): field.name for field in fields(kind)}
    spelled = option.replace("_", "-")
    if spelled not in known:
        if not known:
            raise UsageError(f"{kind.name} takes no options, got {option!r}; write {kind.name} alone")
        raise UnknownNameError(f"option of {kind.name}", option, known)
    hint = get_type_hints(kind)[known[spelled]]
    return known[spelled], convert(value, hint, f"option {spelled!r} of {kind.name}")


def build_pass(kind: type[Pass], values: Mapping[str, Any]) -> Pass:
    """A pass with these values of its fields. Raises UsageError where one is missing or the pass refuses them."""
    for field in fields(kind):
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            option = field.name.replace("_", "-")
            raise UsageError(f"{kind.name} needs the option {option!r}; write {kind.name}{{{option}=...}}")
    try:
        return kind(**values)
    except ValueError as error:
        raise UsageError(f"{kind.name}: {error}") from error


def format_spec(passes: Iterable[Pass]) -> str:
    """The spec string of these passes; options that have their default are left out."""
    return ",".join(_format_pass(item) for item in passes)


def pass_options(item: Pass) -> dict[str, Any]:
    """Every option of a pass by its kebab-case name, as JSON values."""
    values = {field.name.replace("_", "-"): getattr(item, field.name) for field in fields(item)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def parse_value(text: str) -> Any:
    """One option value: a JSON scalar, a list, or a bare word."""
    reader = _Reader(text)
    value = reader.value()
    if not reader.at_end():
        raise reader.error("one value ends here")
    return value


def convert(value: Any, hint: Any, what: str) -> Any:
    """`value` as the type a field declares. Raises UsageError with what to write instead."""
    accepted, result = _convert(value, hint)
    if not accepted:
        raise UsageError(f"{what} takes {_describe(hint)}, got {json.dumps(value)}")
    return result


def _convert(value: Any, hint: Any) -> tuple[bool, Any]:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for option in get_args(hint):
            accepted, result = _convert(value, option)
            if accepted:
                return True, result
        return False, None
    if origin is Literal:
        return value in get_args(hint), value
    if origin in (tuple, list):
        items = [_convert(item, get_args(hint)[0]) for item in value] if isinstance(value, list) else [(False, None)]
        return all(accepted for accepted, _ in items), origin(item for _, item in items)
    if hint is float and type(value) is int:
        return True, float(value)
    return hint is Any or type(value) is hint, value


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if origin in (tuple, list):
        return f"a list, each item {_describe(get_args(hint)[0])}"
    return WORDS.get(hint, str(hint))


def _format_pass(item: Pass) -> str:
    defaults = {field.name.replace("_", "-"): field.default for field in fields(item)}
    changed = {name: value for name, value in pass_options(item).items() if value != _listed(defaults[name])}
    options = ",".join(f"{name}={_format_value(value)}" for name, value in changed.items())
    return f"{item.name}{{{options}}}" if options else item.name


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _format_value(value: Any) -> str:
    if isinstance(value, str) and parse_safely(value) == value:
        return value
    return json.dumps(value, separators=(",", ":"))


def parse_safely(text: str) -> Any:
    """`parse_value`, or None where the text is no value."""
    try:
        return parse_value(text)
    except UsageError:
        return None


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0

    def error(self, problem: str) -> UsageError:
        return UsageError(
            f"cannot read {self.text!r}: {problem} at character {self.place + 1}; write for example "
            "'constant-folding{max-bytes=4096},dead-code'"
        )

    def skip_spaces(self) -> None:
        while self.place < len(self.text) and self.text[self.place].isspace():
            self.place += 1

    def at_end(self) -> bool:
        self.skip_spaces()
        return self.place == len(self.text)

    def take(self, character: str) -> bool:
        self.skip_spaces()
        found = self.text[self.place : self.place + 1] == character
        self.place += found
        return found

    def word(self, stops: str) -> str:
        start = self.place
        while self.place < len(self.text) and self.text[self.place] not in stops:
            self.place += 1
        return self.text[start : self.place].strip()

    def options(self) -> dict[str, Any]:
        """What stands between the braces."""
        found: dict[str, Any] = {}
        while True:
            name = self.word("=,{}")
            if not name or not self.take("="):
                raise self.error("an option is not of the form name=value")
            if name in found:
                raise self.error(f"option {name!r} is given twice")
            found[name] = self.value()
            if self.take("}"):
                return found
            if not self.take(","):
                raise self.error("a comma or a closing brace is missing")

    def value(self) -> Any:
        self.skip_spaces()
        if self.take("["):
            return self.items()
        try:
            value, end = json.JSONDecoder().raw_decode(self.text, self.place)
        except json.JSONDecodeError:
            return self.bare_word()
        if isinstance(value, dict):
            raise self.error("an object is no option value")
        rest = self.text[end:].lstrip()
        if rest and rest[0] not in BARE_END:
            return self.bare_word()
        self.place = end
        return value

    def bare_word(self) -> str:
        word = self.word(BARE_END)
        if not word or word[0] in "\"'{":
            raise self.error("a value is missing or not closed")
        return word

    def items(self) -> list[Any]:
        found: list[Any] = []
        if self.take("]"):
            return found
        while True:
            found.append(self.value())
            if self.take("]"):
                return found
            if not self.take(","):
                raise self.error("a comma or a closing bracket is missing")
