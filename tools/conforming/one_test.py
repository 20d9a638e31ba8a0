"""Runs one test in one mode and says in one record what came of it.

passed          the results are those that the test asks for; `ulp` is the largest error, `bound` are the inputs bound
                to the test's values
refused         the importer, a lowering or the ONNX writer says that it does not take it, before any code is made
wrong           other values, shapes or types than the test asks for, and nothing says so
failed          any other error: code generation, or compiled code that was found wrong before it was given out
crashed         the process ended, or went over its memory or time
not-applicable  the test asks for what no tensor program has; in a round trip: ONNX Runtime does not pass it itself
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import CaptureError, CodeGenerationError, CompileError, GraphoptError, UsageError
from graphopt.tools.conforming.cases import Case, not_applicable
from graphopt.tools.conforming.judge import Mismatch, judge

_LONGEST = 400  # characters of a reason

Record = dict[str, Any]


class _NotApplicable(Exception):
    pass


def run_case(case: Case, mode: str) -> Record:
    """The outcome, what more there is to say of it, and the seconds it took."""
    begin = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = _outcome(case, mode)
    if "reason" in record:
        record["reason"] = " ".join(str(record["reason"]).split())[:_LONGEST]
    return {**record, "seconds": round(time.monotonic() - begin, 3)}


def _outcome(case: Case, mode: str) -> Record:
    if reason := not_applicable(case):
        return {"outcome": "not-applicable", "reason": reason}
    try:
        return _round_trip(case) if mode == "roundtrip" else _own(case, compiled=mode == "compiled")
    except _NotApplicable as error:
        return {"outcome": "not-applicable", "reason": error}
    except Mismatch as error:
        return {"outcome": "wrong", "kind": error.kind, "reason": error}
    except CodeGenerationError as error:
        return {"outcome": "failed", "kind": "code generation", "reason": error}
    except (CaptureError, CompileError) as error:
        return {"outcome": "refused", "kind": type(error).__name__, "reason": error}
    except Exception as error:
        said = str(error) if isinstance(error, GraphoptError) else f"{type(error).__name__}: {error}"
        return {"outcome": "failed", "kind": type(error).__name__, "reason": said}


def _own(case: Case, compiled: bool) -> Record:
    from graphopt.backends.onnx import prepare

    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(case.model, compiled=compiled, threads=1, database=Path(folder) / "none.jsonl")
        return _judged(case, prepared.run, lambda: prepared.program)


def _judged(case: Case, run: Any, program: Any) -> Record:
    errors = [
        judge(wanted, run(given), case.rtol, case.atol) for given, wanted in zip(case.inputs, case.outputs, strict=True)
    ]
    record: Record = {"outcome": "passed", "ulp": float(f"{max(errors, default=0.0):.3g}")}
    if bound := list(program().bound):
        record["bound"] = bound
    return record


def _round_trip(case: Case) -> Record:
    """The original in ONNX Runtime first, then what the program is written as."""
    from graphopt.backends.onnx import prepare

    for given, wanted in zip(case.inputs, case.outputs, strict=True):
        _check_peer(case, given, wanted)
    prepared = prepare(case.model)
    for given in case.inputs:
        prepared.run(given)
    program = prepared.program
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "again.onnx"
        try:
            program.to_onnx(str(path))
        except UsageError as error:
            return {"outcome": "refused", "kind": "ONNX writer", "reason": error}
        return _judged(case, lambda given: _in_onnxruntime(path.read_bytes(), prepared.inputs, given), lambda: program)


def _check_peer(case: Case, given: Sequence[Any], wanted: Sequence[Any]) -> None:
    names = [value.name for value in case.model.graph.input]
    try:
        judge(wanted, _in_onnxruntime(case.model.SerializeToString(), names, given), case.rtol, case.atol)
    except Mismatch as error:
        raise _NotApplicable(f"ONNX Runtime gives another result for the original: {error}") from error
    except Exception as error:
        raise _NotApplicable(f"ONNX Runtime does not run the original: {error}") from error


def _in_onnxruntime(model: bytes, names: Sequence[str], given: Sequence[Any]) -> list[np.ndarray]:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    read = {value.name for value in session.get_inputs()}
    feed = {name: value for name, value in zip(names, given, strict=True) if name in read}
    results: list[np.ndarray] = session.run(None, feed)
    return results
