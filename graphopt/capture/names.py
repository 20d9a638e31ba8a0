"""Names of inputs and outputs from the structure that a model takes and returns."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.utils import _pytree as pytree


def leaf_paths(structure: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Every leaf with the keys, fields and indices that lead to it; None is a leaf."""
    leaves, _ = pytree.tree_flatten_with_path(structure)
    return [(tuple(_key_text(key) for key in path), leaf) for path, leaf in leaves]


def _key_text(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def spec_paths(spec: pytree.TreeSpec) -> list[tuple[str, ...]]:
    """The path of every leaf of a tree specification; index paths where a container cannot say its keys."""
    try:
        structure = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
        found = {leaf: path for path, leaf in leaf_paths(structure) if isinstance(leaf, int)}
        if len(found) == spec.num_leaves:
            return [found[index] for index in range(spec.num_leaves)]
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, NotImplementedError):
        pass  # a registered container whose constructor insists on real tensors: indices name its leaves
    return list(_index_paths(spec, ()))


def _index_paths(spec: pytree.TreeSpec, prefix: tuple[str, ...]) -> list[tuple[str, ...]]:
    if spec.is_leaf():
        return [prefix]
    children = spec.children()
    keys = spec.context if isinstance(spec.context, list) and len(spec.context) == len(children) else None
    names = [str(key) for key in (keys or range(len(children)))]
    return [path for name, child in zip(names, children, strict=True) for path in _index_paths(child, (*prefix, name))]


def argument_names(module: torch.nn.Module, count: int) -> list[str]:
    """Names of the first `count` positional arguments of forward; `*args` gives "args.0", "args.1", ..."""
    names: list[str] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}.{index}" for index in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names[:count]
