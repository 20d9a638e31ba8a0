"""Names of passes and targets, our own and those of installed packages.

Another distribution adds a pass with an entry point of group `graphopt.passes` (name -> "module:Class") and a target
with one of group `graphopt.targets`. Reading names imports none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from graphopt.contract import Pass
from graphopt.errors import UnknownNameError, UsageError
from graphopt.optional import missing_extra


@dataclass(frozen=True)
class OptionInfo:
    """An option of a pass as one writes it: a kebab-case name, a type, a default unless it is `required`."""

    name: str
    type: str
    default: Any
    required: bool


@dataclass(frozen=True)
class PassInfo:
    """A pass as `list-passes` shows it; `summary` is the first line of the class docstring."""

    name: str
    summary: str
    preserves: str
    options: tuple[OptionInfo, ...]


def pass_locations() -> dict[str, str]:
    """Name -> "module:Class" of every pass, sorted by name. Raises UsageError where two packages use one name."""
    from graphopt.passes import PASSES

    return _with_third_parties("pass", PASSES, "graphopt.passes")


def find_pass(name: str) -> type[Pass]:
    """The class of a pass.

    Raises UnknownNameError with the nearest name, UsageError for an entry that is no pass, MissingExtraError where
    the pass needs a package that is not installed.
    """
    locations = pass_locations()
    if name not in locations:
        raise UnknownNameError("pass", name, locations)
    module, _, attribute = locations[name].partition(":")
    try:
        found = getattr(import_module(module), attribute, None)
    except ImportError as error:
        missing = missing_extra(f"pass {name}", error)
        if missing is None:
            raise
        raise missing from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise UsageError(f"pass {name!r} is registered as {locations[name]}, which is no subclass of graphopt.Pass")
    if found.name != name:
        raise UsageError(
            f"pass {name!r} is registered as {locations[name]}, whose name is {found.name!r}; use that name"
        )
    return found


def list_passes() -> tuple[PassInfo, ...]:
    """Every pass with its summary and options, sorted by name."""
    return tuple(describe_pass(find_pass(name)) for name in pass_locations())


def describe_pass(kind: type[Pass]) -> PassInfo:
    """What a pass says about itself."""
    options = tuple(
        OptionInfo(
            field.name.replace("_", "-"),
            field.type if isinstance(field.type, str) else field.type.__name__,
            None if field.default is MISSING else field.default,
            field.default is MISSING and field.default_factory is MISSING,
        )
        for field in fields(kind)
    )
    summary = (kind.__doc__ or "").strip().splitlines()[0] if kind.__doc__ else ""
    return PassInfo(kind.name, summary, kind.preserves, options)


def list_targets() -> tuple[str, ...]:
    """Every target name that `optimize` and `compile` know."""
    from graphopt.backends.cuda.target import target_names as cuda_names
    from graphopt.backends.target import target_names

    own = dict.fromkeys((*target_names(), *cuda_names()), "graphopt.backends.target")
    return tuple(_with_third_parties("target", own, "graphopt.targets"))


def find_backend(name: str) -> ModuleType:
    """The module that compiles for this target: it has `resolve_target(name, threads)`, `lower`, `build`, `runnable`.

    Raises UnknownNameError with the nearest name.
    """
    from graphopt.backends import TARGETS
    from graphopt.backends.target import target_names
    from graphopt.backends.targets import DEVICES

    on_gpu = name in DEVICES and DEVICES[name].on_gpu
    family = "cuda" if on_gpu else "cpu" if name in target_names() else name.partition(":")[0]
    if family in TARGETS:
        return import_module(TARGETS[family])
    for entry in entry_points(group="graphopt.targets"):
        if entry.name == name:
            module: ModuleType = entry.load()
            return module
    raise UnknownNameError("target", name, list_targets())


def check_target(name: str) -> str:
    """The target that this one is compiled as: that of its CPU for a device, else itself.

    Raises UnknownNameError for a name that is neither in `list_targets` nor several architectures of GPUs.
    """
    from graphopt.backends.cuda.target import FAMILY, resolve_target
    from graphopt.backends.targets import DEVICES

    known = list_targets()
    if name not in known:
        if name.partition(":")[0] == FAMILY:
            return resolve_target(name).name
        raise UnknownNameError("target", name, known)
    device = DEVICES.get(name)
    if device is None or device.on_gpu:
        return name
    return str(device.level)


def _with_third_parties(kind: str, own: Mapping[str, str], group: str) -> dict[str, str]:
    found = dict(own)
    owners = dict.fromkeys(own, "graphopt")
    for entry in entry_points(group=group):
        if entry.name in found:
            raise UsageError(
                f"{kind} {entry.name!r} is provided by both {owners[entry.name]} and {_owner(entry)}; uninstall one"
            )
        found[entry.name] = entry.value
        owners[entry.name] = _owner(entry)
    return dict(sorted(found.items()))


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value
