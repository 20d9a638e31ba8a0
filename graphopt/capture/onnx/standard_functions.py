"""Operators that the standard defines by functions of others: the nodes of one, for inputs of given types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, TypeProto, helper

from graphopt.capture.onnx.graphs import DOMAINS
from graphopt.capture.onnx.tensors import DTYPES
from graphopt.capture.onnx.values import Items, Value
from graphopt.errors import CaptureError

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def schema_of(node: Any, opset: int) -> Any:
    """The operator of this version, None where the standard has none; domains other than the first have one version."""
    domain = "" if node.domain in DOMAINS else node.domain
    try:
        if domain:
            return onnx.defs.get_schema(node.op_type, domain)
        return onnx.defs.get_schema(node.op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None


def has_function(node: Any, opset: int) -> bool:
    """Whether the standard says what the operator is by a function that this version can use."""
    schema = schema_of(node, opset)
    return schema is not None and bool(_versions(schema, opset, node))


def _versions(schema: Any, opset: int, node: Any) -> list[int]:
    """Those of the default domain that its bodies are written in; none is newer than the file's."""
    found = [*schema.function_opset_versions, *schema.context_dependent_function_opset_versions]
    return found if node.domain not in DOMAINS else [version for version in found if version <= opset]


def function_of(node: Any, opset: int, inputs: Sequence[Value]) -> tuple[FunctionProto, int]:
    """The body with the node's attributes in it, and the opset it is written in.

    Raises CaptureError where the standard has no body for inputs of these types.
    """
    schema = schema_of(node, opset)
    version = max(_versions(schema, opset, node))
    function = FunctionProto()
    if version in schema.function_opset_versions:
        function.ParseFromString(schema.get_function_with_opset_version(version))
    else:
        types = [_type(value).SerializeToString() for value in inputs]
        types += [TypeProto().SerializeToString()] * (len(node.input) - len(types))
        text = schema.get_context_dependent_function_with_opset_version(version, node.SerializeToString(), types)
        function.ParseFromString(text)
    if not function.node:
        raise CaptureError(f"the standard does not define {node.op_type} of these types and attributes by others")
    _fill(function.node, _attributes(node, schema))
    opsets = [entry.version for entry in function.opset_import if entry.domain in DOMAINS]
    return function, max(opsets, default=version)


def _attributes(node: Any, schema: Any) -> dict[str, AttributeProto]:
    """Those of the node, and the defaults of the operator for others."""
    defaults = {name: item.default_value for name, item in schema.attributes.items() if item.default_value.name}
    return defaults | {item.name: item for item in node.attribute}


def _fill(nodes: Any, given: dict[str, AttributeProto]) -> None:
    """Attributes that refer to one of the function's become that one, or go where it has none."""
    for node in nodes:
        kept = []
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                if attribute.ref_attr_name in given:
                    copy = AttributeProto()
                    copy.CopyFrom(given[attribute.ref_attr_name])
                    copy.name = attribute.name
                    kept.append(copy)
                continue
            if attribute.HasField("g"):
                _fill(attribute.g.node, given)
            kept.append(attribute)
        copies = [AttributeProto.FromString(item.SerializeToString()) for item in kept]
        del node.attribute[:]
        node.attribute.extend(copies)


def _type(value: Value | Items) -> TypeProto:
    if value is None:
        return TypeProto()
    if isinstance(value, Items):
        first = _type(value.values[0]) if value.values else helper.make_tensor_type_proto(_CODES[value.dtype], None)
        return helper.make_sequence_type_proto(first)
    shape = [size if isinstance(size, int) else str(size) for size in value.shape]
    return helper.make_tensor_type_proto(_CODES[value.dtype], shape)


def called(function: FunctionProto, inputs: Sequence[Value]) -> dict[str, Value]:
    """What the names of the function's inputs stand for."""
    given = [*inputs, *[None] * (len(function.input) - len(inputs))]
    return {"": None, **dict(zip(function.input, given, strict=False))}
