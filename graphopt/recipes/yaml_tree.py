"""YAML as plain values that know their lines, read without ever making an object.

Scalars follow the core schema of YAML 1.2, as editors do (`no` and `on` are words, 1e3 is a number). Tags and aliases
are refused, and so is a key that is given twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

PLAIN: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (
    (re.compile(r"|~|null|Null|NULL"), lambda text: None),
    (re.compile(r"true|True|TRUE"), lambda text: True),
    (re.compile(r"false|False|FALSE"), lambda text: False),
    (re.compile(r"[-+]?[0-9]{1,18}"), int),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
)
TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))


@dataclass(frozen=True)
class Located:
    """A scalar, a list of Located or a dict of them; an item of a dict stands where its key does."""

    value: Any
    line: int

    def plain(self) -> Any:
        """The value without lines."""
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return self.value


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own attribute

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            problem = "an alias (*) is not taken; write the value out"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> tuple[Located, list[tuple[int, str]]]:
    """The document in `text` and all that is wrong with it, as (line, sentence); lines count from 1."""
    mistakes: list[tuple[int, str]] = []
    try:
        node = yaml.compose(text, Loader=_Loader)
        tree = Located(None, 1) if node is None else _located(node, mistakes)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        return Located(None, line), [(line, f"this is no YAML: {error.problem or error.context}")]
    except yaml.YAMLError as error:  # characters that no YAML may hold
        return Located(None, 1), [(1, f"this is no YAML: {' '.join(str(error).split())}")]
    except RecursionError:
        return Located(None, 1), [(1, "lists or mappings are nested too deeply")]
    return tree, mistakes


def _located(node: Any, mistakes: list[tuple[int, str]]) -> Located:
    line = node.start_mark.line + 1
    if node.tag not in TAGS:
        mistakes.append((line, f"the tag {node.tag} is not taken; write the value alone"))
    if isinstance(node, yaml.ScalarNode):
        return Located(_scalar(node), line)
    if isinstance(node, yaml.SequenceNode):
        return Located([_located(item, mistakes) for item in node.value], line)
    found: dict[str, Located] = {}
    for key, value in node.value:
        place = key.start_mark.line + 1
        item = Located(_located(value, mistakes).value, place)
        if not isinstance(key, yaml.ScalarNode):
            mistakes.append((place, "a key is no word; write name: value"))
        elif key.value in found:
            mistakes.append((place, f"{key.value!r} is given twice, first in line {found[key.value].line}"))
        else:
            found[key.value] = item
    return Located(found, line)


def _scalar(node: Any) -> Any:
    if node.style is None:
        for spelling, convert in PLAIN:
            if spelling.fullmatch(node.value):
                return convert(node.value)
    return node.value
