from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import graphopt

SIGNATURES = {
    "capture": "(source, example_inputs=None, *, dynamic_shapes=None, name=None, limits)",
    "optimize": "(program, passes, *, data=None, metric=None, verify='numeric', keep_if_faster=False, target='cpu', "
    "database=None, threads=None, seed=0, strict=False)",
    "compile": "(programs, target='cpu', *, tune=None, database=None, threads=None, check_operators=False)",
    "fit": "(program, data, *, train, loss=None, teacher=None, estimators=None, options=None, checkpoint=None, "
    "resume=False, progress=None)",
    "load": "(path, threads=None, verify='full')",
    "list_passes": "()",
    "list_targets": "()",
    "InferenceSession": "(path, threads=None, verify='full')",
    "FitResult": "(program, trained, history, stopped_by, best_step, seconds)",
    "FitOptions": "(optimizer='adamw', learning_rate, weight_decay, schedule='constant', clip_norm=None, steps=None, "
    "epochs=None, accumulate=1, evaluate_every=None, patience=None, seed=0)",
    "Distillation": "(kind='mse', outputs=(), temperature, task=None, task_weight, features=())",
    "PassContext": "(target='cpu', data=None, metric=None, seed=0, progress, allow, measure, race=None)",
    "PassResult": "(program, rewrites=(), declined=(), notes=(), near_misses=(), instances=(), trade_offs=(), "
    "regions=())",
    "Rewrite": "(id, rule, before, after)",
    "Declined": "(rule, node, reason)",
    "Timing": "(seconds, rounds)",
}


def spelled(function: object) -> str:
    """A signature without types; defaults that are objects are left out."""
    words = []
    star = False
    for parameter in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            star = True
            words.append("*")
        plain = isinstance(parameter.default, (str, int, bool, tuple, type(None)))
        words.append(f"{parameter.name}={parameter.default!r}" if plain else parameter.name)
    return f"({', '.join(words)})"


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    assert spelled(getattr(graphopt, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", graphopt.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(graphopt, name) is not None
    assert name in dir(graphopt)


def test_names() -> None:
    assert graphopt.__all__ == [
        *(
            "Artifact",
            "ArtifactError",
            "BoundInputError",
            "CaptureError",
            "CaptureWarning",
            "CompileError",
            "Declined",
            "Distillation",
            "Domain",
        ),
        *("FeedError", "FitError", "FitOptions", "FitResult"),
        *("GraphoptError", "InferenceSession", "Limits", "MissingExtraError", "OptimizeResult", "Pass", "PassContext"),
        *("PassError", "PassResult", "PostconditionError", "PreconditionError", "Program", "PropagationError"),
        *("Rewrite", "RewritePass", "Rule", "RunError", "SizeRange", "State", "TensorSpec", "Timing"),
        *("UnknownNameError", "UsageError", "VerificationError", "WriteError", "__version__", "capture", "compile"),
        *("fit", "list_passes", "list_targets", "load", "optimize"),
    ]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'captured'"):
        _ = graphopt.captured


def python(code: str) -> str:
    """What a new interpreter prints for `code`."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_functions_stay_functions_when_modules_of_their_name_are_imported() -> None:
    code = """
import graphopt.capture, graphopt.optimize
from graphopt.capture import Limits
from graphopt.optimize import optimize
import graphopt
print(type(graphopt.capture).__name__, type(graphopt.optimize).__name__, graphopt.optimize is optimize)
"""
    assert python(code) == "function function True"


def test_importing_graphopt_is_cheap() -> None:
    heavy = "{'torch', 'tvm', 'tvm_ffi', 'onnx', 'numpy', 'networkx'}"
    assert python(f"import sys, graphopt; print(sorted({heavy} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize(
    ("use", "name"), [("graphopt.optimize", "graphopt.optimize"), ("graphopt.list_passes()", "pass batch-norm-folding")]
)
def test_a_missing_package_names_the_extra(use: str, name: str) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
import graphopt
try:
    {use}
except graphopt.MissingExtraError as error:
    print(error)
"""
    advice = 'run pip install "graphopt[compile]"'
    assert python(code) == f"{name} needs torch, which the base installation leaves out; {advice}"
