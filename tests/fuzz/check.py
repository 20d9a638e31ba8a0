"""One seed: a model is captured, rewritten by every pass, saved and read, compiled, and compared at every step."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphopt
from graphopt import CaptureError, CompileError, GraphoptError, Program, VerificationError
from graphopt.checking.output_check import Check, check_cases
from graphopt.passes import PASSES
from graphopt.registry import find_pass
from tests.fuzz.generator import Case
from tests.fuzz.judge import CAREFUL_RUNS, Verdict, verdicts

OUTCOMES = ("ok", "refused", "unstable", "mismatch", "crash")
REFUSALS = ("lowering", "is lowered for", "convert them to float first", "write it with where", "write it from one end")
EXACT = [name for name in PASSES if find_pass(name).preserves == "exact"]  # the others need data, and change results


@dataclass
class Outcome:
    """What came of a seed; `detail` is the first line of it, `rewrites` counts those of each pass."""

    name: str
    seed: int
    kind: str = "ok"
    stage: str = ""
    detail: str = ""
    seconds: float = 0.0
    operators: int = 0
    rewrites: dict[str, int] = field(default_factory=dict)


class Wrong(Exception):
    """A result that is not what the model gives, or a rewrite that should not be."""


def check(name: str, seed: int, make: Callable[[int], Case]) -> Outcome:
    """The outcome of one seed of one generator."""
    start = time.process_time()
    outcome = Outcome(name, seed)
    try:
        outcome.stage = "generate"
        _check(outcome, make(seed))
        outcome.stage = ""
    except Wrong as error:
        outcome.kind, outcome.detail = "mismatch", str(error)
    except CaptureError as error:
        outcome.kind = "refused" if outcome.stage == "capture" else "crash"
        outcome.detail = _line(error)
    except CompileError as error:
        refused = any(words in str(error) for words in REFUSALS) and "cannot be lowered" not in str(error)
        outcome.kind, outcome.detail = "refused" if refused else "crash", _line(error)
    except Exception as error:
        outcome.kind, outcome.detail = "crash", f"{_line(error)} {_place(error)}"
    outcome.seconds = time.process_time() - start
    return outcome


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


def _place(error: Exception) -> str:
    """The last three places in our own code that the error came through."""
    cause = error.__cause__ or error
    frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if "site-packages" not in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-3:]))


def _check(outcome: Outcome, case: Case) -> None:
    outcome.stage = "reference"
    steps = {number: [inputs, inputs] for number, inputs in enumerate(case.inputs)}
    wanted = {number: verdicts(case.module, calls) for number, calls in steps.items()}
    outcome.stage = "capture"
    program = graphopt.capture(case.module, case.inputs[0], dynamic_shapes=case.dynamic)
    outcome.operators = program.count_operators()
    stateful = bool(program.state)
    judge = _Judge(program, case, wanted, stateful)
    judge.program("capture", program)
    for name in EXACT:
        outcome.stage = name
        result = judge.optimized(outcome, with_dead_code(program) if name == "dead-code" else program, name)
        outcome.rewrites[name] = len(result.report.passes[0].rewrites)
        again = graphopt.optimize(result.program, name, verify="off").report.passes[0].rewrites
        if again:
            raise Wrong(f"a second run makes {len(again)} rewrites, the first one {again[0].id}")
    outcome.stage = "O2"
    best = judge.optimized(outcome, program, "O2").program
    if outcome.seed % 4 == 0:
        outcome.stage = "save"
        judge.program("saved", _saved(best))
    outcome.stage = "compile"
    judge.compiled(outcome, best)


def with_dead_code(program: Program) -> Program:
    """The program with operators that nothing reads: torch.export leaves none."""
    copied = program.copy()
    for _, module in copied.graphs():
        for node in module.graph.nodes:
            value = node.meta.get("val")
            if node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
                with module.graph.inserting_after(node):
                    unread = module.graph.call_function(torch.ops.aten.neg.default, (node,))
                unread.meta["val"] = value
                break
        module.recompile()
    return copied


def _saved(program: Program) -> Program:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.pt2"
        program.save(path)
        return graphopt.capture(path)


@dataclass
class _Judge:
    """Compares programs and sessions with the model."""

    first: Program
    case: Case
    wanted: dict[int, list[Verdict]]
    stateful: bool

    def program(self, label: str, program: Program) -> None:
        self._compare(label, lambda inputs: _calls(program, inputs, self.stateful), self.case.inputs, self.wanted)

    def optimized(self, outcome: Outcome, program: Program, passes: str) -> graphopt.OptimizeResult:
        """The result of the passes, compared; an alarm of the framework's own check is judged too."""
        try:
            result = graphopt.optimize(program, passes, verify="numeric")
        except VerificationError as error:
            result = graphopt.optimize(program, passes, verify="structure")
            self._judge_alarm(outcome, error, lambda inputs: _calls(result.program, inputs, self.stateful))
        self.program(passes, result.program)
        return result

    def compiled(self, outcome: Outcome, program: Program) -> None:
        try:
            session = graphopt.compile(program, threads=1).session()
        except VerificationError as error:
            with _unchecked():
                session = graphopt.compile(program, threads=1).session()
            self._judge_alarm(outcome, error, lambda inputs: _session_calls(session, program, inputs, self.stateful))
        run: Callable[[Any], list[tuple[Tensor, ...]]] = lambda i: _session_calls(session, program, i, self.stateful)  # noqa: E731
        self._compare("compiled", run, self.case.inputs, self.wanted)

    def _compare(self, label: str, run: Any, inputs: Any, wanted: dict[int, list[Verdict]]) -> None:
        for number, item in enumerate(inputs):
            if number not in wanted or not self._fits(item):
                continue
            results = run(item)
            if any(verdict.fault(found) for found, verdict in zip(results, wanted[number], strict=False)):
                wanted[number] = verdicts(self.case.module, [item, item], CAREFUL_RUNS)
            for call, (found, verdict) in enumerate(zip(results, wanted[number], strict=False)):
                fault = verdict.fault(found)
                if fault:
                    shapes = [list(value.shape) for value in item]
                    raise Wrong(f"{label}, inputs {number} of shapes {shapes}, call {call}: {fault}")

    def _fits(self, inputs: tuple[Tensor, ...]) -> bool:
        """Capture may find that the model has a lower bound for a size."""
        try:
            self.first.bind(inputs)
        except graphopt.FeedError:
            return False
        return True

    def _judge_alarm(self, outcome: Outcome, error: VerificationError, run: Any) -> None:
        """An alarm is right (mismatch), about a model that shaking changes (unstable), or a fault of checking."""
        inputs = [*self.case.inputs, *(item.inputs for item in check_cases(self.first)[0])]
        wanted = {}
        for number, item in enumerate(inputs):
            try:
                wanted[number] = verdicts(self.case.module, [item, item])
            except (RuntimeError, IndexError):
                continue
        self._compare("alarm", run, inputs, wanted)
        if not any(verdict.unstable for found in wanted.values() for verdict in found):
            raise Wrong(f"false alarm: {_line(error)}")
        outcome.kind, outcome.detail = "unstable", f"{outcome.stage}: {_line(error)}"


def _calls(program: Program, inputs: tuple[Tensor, ...], stateful: bool) -> list[tuple[Tensor, ...]]:
    results, state = [], None
    for _ in range(2 if stateful else 1):
        outputs, state = program.step(inputs, state)
        results.append(outputs)
    return results


def _session_calls(session: Any, program: Program, inputs: Any, stateful: bool) -> list[tuple[Tensor, ...]]:
    session.reset()
    feed = {spec.name: value.numpy() for spec, value in zip(program.inputs, inputs, strict=True)}
    return [tuple(map(torch.from_numpy, session.run(None, feed))) for _ in range(2 if stateful else 1)]


@contextmanager
def _unchecked() -> Iterator[None]:
    """compile without its own check, to see what it refused to give."""
    import sys

    module = sys.modules["graphopt.compile"]
    kept = module.check_session
    module.check_session = lambda session, entries: {name: Check(0.0) for name in entries}  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.check_session = kept  # type: ignore[attr-defined]


def is_failure(outcome: Outcome) -> bool:
    return outcome.kind in ("mismatch", "crash")


__all__ = ["OUTCOMES", "GraphoptError", "Outcome", "check", "is_failure"]
