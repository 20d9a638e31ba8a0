"""The JSON schema of recipes, made from the fields of the installed passes, for editors and for checking in advance."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from graphopt.backends.cuda.target import ARCHS, FAMILY
from graphopt.contract import Pass
from graphopt.levels import LEVELS
from graphopt.recipes.recipe import FORMATS, SETTINGS
from graphopt.registry import describe_pass, find_pass, list_targets, pass_locations

TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}
SETTING_HELP = {
    "verify": "What is checked after every pass.",
    "strict": "A rewrite that is found wrong is an error, not taken back.",
    "keep-if-faster": "Rewrites are taken back unless the model runs faster with them.",
    "seed": "Of everything random.",
    "target": "The device that the passes aim at.",
    "metric": "How the result is judged, on the data given with it; higher is better.",
}


def recipe_schema() -> dict[str, Any]:
    """A schema in the 2020-12 dialect; keys and options in kebab-case."""
    kinds = {name: find_pass(name) for name in pass_locations()}
    words = {"enum": [*LEVELS, *kinds], "description": "A level, or a pass with its default options."}
    spelled = {"type": "string", "pattern": "[{,]", "description": "Passes and options as --passes takes them."}
    settings = {key: {**_type(hint), "description": SETTING_HELP[key]} for key, hint in SETTINGS.items()}
    arch = f"({'|'.join(ARCHS)})"
    several = {"type": "string", "pattern": rf"^{FAMILY}:{arch}(\+{arch})+$"}
    settings["target"] = {"anyOf": [{"enum": list(list_targets())}, several], "description": SETTING_HELP["target"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "graphopt recipe",
        "description": "Passes and settings of graphopt.optimize.",
        "type": "object",
        "properties": {
            "graphopt": {"type": "string", "pattern": f"^{FORMATS.pattern}$", "description": "The format."},
            "description": {"type": "string"},
            "include": {
                "type": "array",
                "items": {"type": "string"},
                "description": "Recipes whose passes come first: shipped ones by name, others by path from this file.",
            },
            "passes": {
                "type": "array",
                "items": {"anyOf": [words, spelled, *(_mapping(name, kind) for name, kind in kinds.items())]},
                "description": "What runs, in this order, after what is included.",
            },
            **settings,
        },
        "required": ["graphopt"],
        "additionalProperties": False,
    }


def _mapping(name: str, kind: type[Pass]) -> Mapping[str, Any]:
    hints = get_type_hints(kind)
    options: dict[str, Any] = {}
    for field in fields(kind):
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        default = {} if value is MISSING else {"default": value}
        options[field.name.replace("_", "-")] = {**_type(hints[field.name]), **default}
    info = describe_pass(kind)
    return {
        "type": "object",
        "description": info.summary,
        "properties": {"name": {"const": name}, **options},
        "required": ["name", *(option.name for option in info.options if option.required)],
        "additionalProperties": False,
    }


def _type(hint: Any) -> dict[str, Any]:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(option) for option in get_args(hint)]}
    if origin is Literal:
        return {"enum": list(get_args(hint))}
    if origin in (tuple, list):
        return {"type": "array", "items": _type(get_args(hint)[0])}
    return {"type": TYPES[hint]} if hint in TYPES else {}
