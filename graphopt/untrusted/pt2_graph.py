"""Checks and cleans the graph description in a `.pt2`, which torch would otherwise trust.

torch resolves operator targets by attribute access, evaluates size expressions and pastes names into generated Python.
Only what is known to be harmless passes; what programs do not need is dropped.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from graphopt.errors import CaptureError
from graphopt.untrusted.limits import Limits
from graphopt.untrusted.names import join, output_names

_MOST_POWER = 8
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_DUNDER = re.compile(r"__\w*__", re.ASCII)
_DOTTED = re.compile(r"[A-Za-z_0-9]\w*(\.\w+)*", re.ASCII)
_NAMESPACES = "aten|prim|prims|graphopt|quantized_decomposed|torchvision"
_PART = r"(?!__)\w+(?<!__)"  # Python's own attributes are no operators; ATen has only those spelled out below
_TARGET = re.compile(
    rf"torch\.ops\.(?:{_NAMESPACES})\.(?!from_file\b)(?:{_PART}|__i?(?:and|or|xor|lshift|rshift)__)(?:\.{_PART})?"
    r"|torch\.ops\.higher_order\.(?:cond|while_loop|scan|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(?:add|sub|mul|floordiv|truediv|mod|neg|pos|abs|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|math\.(?:ceil|floor|trunc|sqrt|log|log2|exp)"
    r"|torch\._?sym_(?:int|float|max|min|not|ite|sum|sqrt)",
    re.ASCII,
)
_FUNCTIONS = {
    "Symbol", "Integer", "Add", "Mul", "Max", "Min", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Rational", "Not",
    "And", "Or", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt",
    "CeilDiv", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt", "RoundToInt",
    "RoundDecimal", "ToFloat", "Identity", "Float", "IsNonOverlappingAndDenseIndicator", "StrictLessThan",
    "LessThan", "Equality", "StrictGreaterThan", "GreaterThan", "Unequality",
}  # fmt: skip
_POWERS = {"Pow", "PowByNatural"}
_SYMBOL = re.compile(r"z?[suz]\w*\d+", re.ASCII)
_EXPRESSION_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.keyword, ast.Name, ast.Constant, ast.Load,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.unaryop, ast.cmpop,
)  # fmt: skip
_KEPT_METADATA = ("stack_trace", "custom")
_MAX_DEPTH = 200


def clean_graph(text: bytes, limits: Limits) -> tuple[dict[str, Any], list[str], list[str]]:
    """The graph description ready for torch, and the names of its inputs and outputs. Raises CaptureError."""
    try:
        model = json.loads(text.decode("utf-8"))
        count = _check(model, 0)
        if count > limits.max_nodes:
            raise CaptureError(f"it has {count} nodes, over the limit of {limits.max_nodes}; raise Limits.max_nodes")
        module = model["graph_module"]
        entry = next(entry for entry in module["module_call_graph"] if entry["fqn"] == "")
        signature = module["signature"]
        inputs = [s for s in signature["input_specs"] if next(iter(s)) in ("user_input", "constant_input")]
        outputs = [s for s in signature["output_specs"] if next(iter(s)) == "user_output"]
        names = _input_names(entry.get("signature"), len(inputs))
        results = _output_names(entry.get("signature"), len(outputs))
        entry["signature"] = _flat_signature(len(inputs), len(outputs))
        module["module_call_graph"] = [entry]
        module["metadata"], module["treespec_namedtuple_fields"] = {}, {}
        model["guards_code"] = []
    except CaptureError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, IndexError, RecursionError) as error:
        raise CaptureError("the graph in the .pt2 is damaged; save it again with torch.export.save") from error
    return model, names, results


def _check(value: Any, depth: int) -> int:
    """Check and clean a part of the description; returns how many nodes of graphs it holds."""
    if depth > _MAX_DEPTH:
        raise CaptureError(f"the graph in the .pt2 is nested deeper than {_MAX_DEPTH} levels")
    nodes = 0
    if isinstance(value, dict):
        nodes = len(value["nodes"]) if isinstance(value.get("nodes"), list) else 0
        if isinstance(value.get("metadata"), dict):
            value["metadata"] = _kept_metadata(value["metadata"])
        for key, item in value.items():
            _check_key(key, item)
            if key != "metadata":
                nodes += _check(item, depth + 1)
    elif isinstance(value, list):
        nodes = sum(_check(item, depth + 1) for item in value)
    return nodes


def _kept_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {key: metadata[key] for key in _KEPT_METADATA if isinstance(metadata.get(key), str)}


def _check_key(key: str, value: Any) -> None:
    check = _CHECKS.get(key)
    if check is not None and value is not None:
        check(value)
    elif key in ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"):
        for name in value:
            _check_name(name)
    elif key == "as_custom_obj" or (key in ("custom_obj", "token") and isinstance(value, dict)):
        raise CaptureError("the .pt2 holds a custom object; only tensors can be read safely")
    elif key == "custom_obj_values" and value:
        raise CaptureError("the .pt2 holds custom objects; only tensors can be read safely")


def _check_name(name: Any) -> None:
    # "" names a constant output; everything else must be an identifier, since torch pastes it into generated code.
    if not isinstance(name, str) or (name and not _IDENTIFIER.fullmatch(name)):
        raise CaptureError(f"the .pt2 holds the name {str(name)[:40]!r}, which is no identifier")


def _check_dotted(name: Any) -> None:
    if not isinstance(name, str) or not _DOTTED.fullmatch(name) or any(map(_DUNDER.fullmatch, name.split("."))):
        raise CaptureError(f"the .pt2 holds the attribute name {str(name)[:40]!r}, which cannot be used")


def _check_target(target: Any) -> None:
    if not isinstance(target, str):
        raise CaptureError("the .pt2 holds an operator without a name")
    if not _TARGET.fullmatch(target):
        raise CaptureError(f"the .pt2 calls {target[:80]!r}, which is not an operator that graphopt reads from files")


def _check_expression(text: Any) -> None:
    """torch evaluates this text as Python through sympy: only arithmetic on sizes may pass."""
    try:
        if not isinstance(text, str) or len(text) > 10_000:
            raise ValueError
        for node in ast.walk(ast.parse(text, mode="eval")):
            if not _harmless(node):
                raise ValueError
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise CaptureError(f"the .pt2 holds the size {str(text)[:40]!r}, which is no arithmetic on sizes") from error


def _harmless(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id=name), args=[base, exponent], keywords=[]) if name in _POWERS:
            return _small_power(base, exponent)
        case ast.Call(func=ast.Name(id="Float"), args=arguments, keywords=keywords):
            return len(arguments) == 1 and not keywords  # a second one sets how many digits are computed
        case ast.Call(func=function):
            return isinstance(function, ast.Name) and function.id in _FUNCTIONS
        case ast.Name(id=name):
            return name in (*_FUNCTIONS, *_POWERS, "oo", "int_oo") or _SYMBOL.fullmatch(name) is not None
        case ast.Constant(value=str(value)):
            return _SYMBOL.fullmatch(value) is not None
        case ast.Constant(value=value):
            return isinstance(value, (bool, int, float)) and abs(value) < 2**64
        case ast.BinOp(op=ast.Pow(), left=base, right=exponent):
            return _small_power(base, exponent)
    return isinstance(node, _EXPRESSION_NODES)


def _small_power(base: ast.expr, exponent: ast.expr) -> bool:
    """A power of a power could have more digits than fit in memory; torch itself writes only n**2 and the like."""
    match exponent:
        case (
            ast.Call(func=ast.Name(id="Integer"), args=[ast.Constant(value=int(value))])
            | ast.Constant(value=int(value))
        ):
            return 0 <= value <= _MOST_POWER and not any(_is_power(part) for part in ast.walk(base))
    return False


def _is_power(node: ast.AST) -> bool:
    return isinstance(node, ast.Pow) or (isinstance(node, ast.Name) and node.id in _POWERS)


_CHECKS: dict[str, Callable[[Any], None]] = {
    "name": _check_name,
    "graph_name": _check_name,
    "user_input_name": _check_name,
    "parameter_name": _check_dotted,
    "buffer_name": _check_dotted,
    "tensor_constant_name": _check_dotted,
    "target": _check_target,
    "as_operator": _check_target,
    "expr_str": _check_expression,
}


def _input_names(signature: Any, count: int) -> list[str]:
    names = [f"input_{index}" for index in range(count)]
    if signature is None:
        return names
    arguments = signature.get("forward_arg_names") or []
    paths = _paths(json.loads(signature["in_spec"])[1], ())
    found = []
    for kind, *rest in paths:
        if kind == "0" and int(rest[0]) < len(arguments):
            rest[0] = str(arguments[int(rest[0])])
        found.append(join(rest))
    return found if len(found) == count else names


def _output_names(signature: Any, count: int) -> list[str]:
    paths = [] if signature is None else _paths(json.loads(signature["out_spec"])[1], ())
    return output_names(paths if len(paths) == count else [(str(index),) for index in range(count)])


def _paths(spec: Mapping[str, Any], prefix: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The paths of the leaves of a serialized tree specification, whatever classes it names."""
    children = spec["children_spec"]
    if spec["type"] is None and not children:
        return [prefix]
    keys: list[Any] = list(range(len(children)))
    if isinstance(spec.get("context"), str):
        context = json.loads(spec["context"])
        if isinstance(context, list):  # a dataclass keeps its fields and those that are None
            context = context[0] if context and isinstance(context[0], list) else context
            keys = context if len(context) == len(children) else keys
    elif isinstance(spec.get("context"), list) and len(spec["context"]) == len(children):
        keys = spec["context"]
    return [path for key, child in zip(keys, children, strict=True) for path in _paths(child, (*prefix, str(key)))]


def _flat_signature(inputs: int, outputs: int) -> dict[str, Any]:
    def leaves(count: int) -> list[dict[str, Any]]:
        return [{"type": None, "context": None, "children_spec": []} for _ in range(count)]

    def tree(kind: str, context: str, children: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": f"builtins.{kind}", "context": context, "children_spec": children}

    args = tree("tuple", "null", [tree("tuple", "null", leaves(inputs)), tree("dict", "[]", [])])
    return {
        "inputs": [],
        "outputs": [],
        "in_spec": json.dumps([1, args]),
        "out_spec": json.dumps([1, tree("tuple", "null", leaves(outputs))]),
        "forward_arg_names": None,
    }
