"""Which passes run, and how they are checked: options that `optimize`, `run-pass` and `compile` share."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError
from graphopt.tools.model_argument import FUNCTION, find_function

if TYPE_CHECKING:
    from graphopt.recipes.recipe import Recipe

LEVELS = ("0", "1", "2", "3")
EXAMPLE = "batch-norm-folding,constant-folding{max-bytes=1024}"
METRICS = ("accuracy", "cosine", "snr")


def add_pass_choice(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--passes", metavar="SPEC", help=f'passes with options, such as "{EXAMPLE}" or "O2,dead-code"')
    help = (
        "a YAML file with passes and settings, or a shipped one such as cpu-fast; other options override its settings"
    )
    group.add_argument("--recipe", metavar="FILE", help=help)
    group.add_argument(
        "-O", dest="level", choices=LEVELS, help="level, -O0 nothing to -O3 all exact passes (default 2)"
    )
    add_data_options(parser)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    help = "an .npz file or a folder of them: arrays by input name, optionally label; the last fifth is held out"
    parser.add_argument("--data", metavar="D", help=help)
    help = "accuracy, cosine, snr, or package.module:function(outputs, labels) returning a number, more is better"
    parser.add_argument("--metric", metavar="M", help=help)


def optimize_settings(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments for `graphopt.optimize`: data is there, and a metric of one's own has become its function."""
    settings = {name: setting.value for name, setting in recipe.settings.items()}
    data, metric = settings.get("data"), settings.get("metric")
    if data is not None and not os.path.exists(data):
        raise UsageError(f"--data {data!r} does not exist; give an .npz file or a folder of them")
    if metric is not None and metric not in METRICS:
        if not FUNCTION.fullmatch(metric):
            raise UsageError(f"metric {metric!r} is neither {', '.join(METRICS)} nor package.module:function; give one")
        settings["metric"] = find_function(metric, "a number for (outputs, labels)")
    return settings


def add_checking_options(parser: argparse.ArgumentParser) -> None:
    """None stands for an option that is not given: a recipe may have its value, `optimize` has the default."""
    parser.add_argument("--verify", choices=("off", "structure", "numeric"), help="(default numeric)")
    help = "a rewrite that is found wrong is an error, not taken back"
    parser.add_argument("--strict", action="store_const", const=True, help=help)
    help = "a rewrite with which the model does not measure faster on the target is taken back"
    parser.add_argument("--keep-if-faster", action="store_const", const=True, help=help)
    parser.add_argument("--target", help="device the passes aim at (default cpu)")
    parser.add_argument("--seed", type=int, help="of everything random (default 0)")


def chosen_passes(arguments: argparse.Namespace) -> str:
    """What was asked for, as one word: a recipe, a spec string or "O2"."""
    if arguments.recipe is not None:
        return str(arguments.recipe)
    if arguments.passes is None:
        return f"O{arguments.level or 2}"
    if not arguments.passes.strip():
        raise UsageError(f"--passes is empty; write -O0 for no passes, or passes such as {EXAMPLE}")
    return str(arguments.passes)


def chosen_recipe(arguments: argparse.Namespace) -> Recipe:
    """The passes and settings that --recipe, --passes or -O come to, with the options that are given beside it."""
    from graphopt.recipes.recipe import read_recipe

    if arguments.recipe is not None:
        return with_options(read_recipe(arguments.recipe), arguments)
    passes = chosen_passes(arguments)
    return spelled_recipe(passes, f"-{passes}" if arguments.passes is None else "--passes", arguments)


def spelled_recipe(passes: str, origin: str, arguments: argparse.Namespace) -> Recipe:
    """As `chosen_recipe`, for a level or spec string that comes from `origin`."""
    from graphopt.optimize import choose_passes
    from graphopt.recipes.recipe import Recipe, Step

    return with_options(Recipe(tuple(Step(item, origin) for item in choose_passes(passes)), {}), arguments)


def with_options(recipe: Recipe, arguments: argparse.Namespace) -> Recipe:
    """`recipe` with the settings that the command line gives in place of its own."""
    from graphopt.recipes.recipe import SETTINGS, Recipe, Setting

    given = {key: getattr(arguments, key.replace("-", "_"), None) for key in (*SETTINGS, "data")}
    settings = {key.replace("-", "_"): Setting(value, f"--{key}") for key, value in given.items() if value is not None}
    return Recipe(recipe.passes, {**recipe.settings, **settings})
