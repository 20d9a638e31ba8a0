"""ONNX's backend tests, as the installed `onnx` package holds them: nothing is downloaded.

`node` tests are made in memory by `onnx.backend.test.case.node`; `simple`, `pytorch-converted` and `pytorch-operator`
lie in the package; so do the graphs of `light`, whose weights are one number repeated.
"""

from __future__ import annotations

import fnmatch
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_LEFT_OUT = {
    "ai.onnx.ml": "traditional machine learning (domain ai.onnx.ml)",
    "ai.onnx.training": "training (domain ai.onnx.training)",
    "Gradient": "gradients of other nodes",
    "ImageDecoder": "compressed image files",
    "Bernoulli": "random numbers, of which the standard fixes no sequence",
    "RandomUniformLike": "random numbers, of which the standard fixes no sequence",
}
_NOISE = {"test_dft_inverse": 1e-6, "test_dft_inverse_opset19": 1e-6}
"""`atol` where results of 0 are asked for with the rounding error of float32 input."""


@dataclass(frozen=True)
class Case:
    """One test; `inputs` and `outputs` have one list of values for each of its data sets."""

    suite: str
    name: str
    model: Any
    inputs: Sequence[Sequence[Any]]
    outputs: Sequence[Sequence[Any]]
    rtol: float
    atol: float


def load_cases(suites: Sequence[str], patterns: Sequence[str] = ()) -> list[Case]:
    """The tests of these suites whose names match one of the patterns (none: all)."""

    def is_wanted(name: str) -> bool:
        return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, where tests are about infinities
        return [case for suite in suites for case in _READERS[suite](suite, is_wanted)]


def not_applicable(case: Case) -> str | None:
    """Why a test asks for what no tensor program has."""
    for value in (*case.model.graph.input, *case.model.graph.output):
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            return {"sequence_type": "sequences", "optional_type": "optional values"}.get(kind, str(kind))
        if value.type.tensor_type.elem_type == 8:
            return "strings"
    for node in case.model.graph.node:
        if reason := _LEFT_OUT.get(node.domain) or _LEFT_OUT.get(node.op_type):
            return reason
    return None


def describe(case: Case, cases: Mapping[str, Case]) -> dict[str, Any]:
    """What a record says of its test: for the body of an operator that is a function, that operator.

    `opset` is that of the default domain, 0 where the test has none of it.
    """
    base = cases.get(case.name.partition("_expanded")[0], case)
    versions = [entry.version for entry in case.model.opset_import if entry.domain in ("", "ai.onnx")]
    operator = base.model.graph.node[0].op_type if case.suite == "node" else case.suite
    return {"test": case.name, "suite": case.suite, "operator": operator, "opset": max(versions, default=0)}


def _node_cases(suite: str, is_wanted: Any) -> Iterator[Case]:
    from onnx.backend.test.loader import load_model_tests

    for test in load_model_tests(kind="node"):
        if is_wanted(test.name):
            yield of_node_test(test)


def of_node_test(test: Any) -> Case:
    """From the `TestCase` that `onnx.backend.test.case.node` makes."""
    sets = [[list(map(_array, side)) for side in pair] for pair in test.data_sets]
    inputs, outputs = zip(*sets, strict=True)
    atol = _NOISE.get(test.name, test.atol)
    return Case("node", test.name, test.model, inputs, outputs, test.rtol, atol)


def _stored_cases(suite: str, is_wanted: Any) -> Iterator[Case]:
    import onnx
    from onnx.backend.test.loader import load_model_tests

    for test in sorted(load_model_tests(kind=suite), key=lambda test: test.name):
        if not is_wanted(test.name):
            continue
        folder = Path(test.model_dir or "")
        model = onnx.load(folder / "model.onnx")
        sets = sorted(folder.glob("test_data_set_*"))
        inputs = [_stored(data, "input", model.graph.input) for data in sets]
        outputs = [_stored(data, "output", model.graph.output) for data in sets]
        yield Case(suite, test.name, model, inputs, outputs, test.rtol, test.atol)


def _stored(folder: Path, kind: str, values: Any) -> list[Any]:
    import onnx

    found = []
    for number, value in enumerate(values):
        path = folder / f"{kind}_{number}.pb"
        if not path.exists():
            break
        if value.type.WhichOneof("value") == "tensor_type":
            found.append(_array(onnx.TensorProto.FromString(path.read_bytes())))
        else:
            found.append(None)  # of a test that is not applicable
    return found


def _light_cases(suite: str, is_wanted: Any) -> Iterator[Case]:
    import onnx
    from onnx.backend.test.loader import DATA_DIR
    from onnx.backend.test.runner import Runner

    folder = Path(DATA_DIR)
    for path in sorted((folder / "light").glob("*.onnx")):
        name = f"test_{path.stem.removeprefix('light_')}"
        if not is_wanted(name):
            continue
        model = onnx.load(path)
        held = {proto.name for proto in model.graph.initializer}
        inputs = [Runner.generate_dummy_data(value) for value in model.graph.input if value.name not in held]
        stored = sorted(path.parent.glob(f"{path.stem}_output_*.pb"))
        outputs = [_array(onnx.TensorProto.FromString(file.read_bytes())) for file in stored]
        near = json.loads((folder / "real" / name / "data.json").read_text())
        yield Case(suite, name, model, [inputs], [outputs], near["rtol"], near["atol"])


def _array(value: Any) -> Any:
    from onnx import TensorProto, numpy_helper

    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic | int | float) else value


_READERS = {
    "node": _node_cases,
    "simple": _stored_cases,
    "light": _light_cases,
    "pytorch-converted": _stored_cases,
    "pytorch-operator": _stored_cases,
}
