"""Models of NNSmith (Liu et al., ASPLOS 2023): random graphs whose shapes a constraint solver makes valid."""

from __future__ import annotations

import random
import warnings
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.fuzz.generator import Case

NODES = 10
ELEMENTS = 4096  # of a value
ATTEMPTS = 40
UNSUPPORTED = frozenset({"Asin", "Acos", "ReflectPad", "ReplicatePad", "BicubicInterp"})  # no lowering
NARROW_ONLY = {"Softmax": frozenset({"float64"})}
DTYPES = frozenset({"float32", "float64", "float16", "int64", "int32", "bool"})


class Model(nn.Module):
    """NNSmith's network by positional inputs, without what its own `forward` looks at while it searches inputs."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self.network.input_map, inputs, strict=True))
        for function, arguments, names, _ in self.network.instructions:
            results = function(*(values[name] for name in arguments))
            values.update(zip(names, results if isinstance(results, list) else [results], strict=True))
        return tuple(values[name] for name in self.network.output_map)


@cache
def operators() -> tuple[Any, ...]:
    """NNSmith's torch operators that graphopt has a lowering for, on the dtypes it has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for a drawing library
        from nnsmith.abstract.extension import activate_ext
        from nnsmith.materialize.torch import TorchModelCPU

    kept = []
    for operator in TorchModelCPU.operators():
        if operator.__name__ in UNSUPPORTED:
            continue
        dtypes = DTYPES - NARROW_ONLY.get(operator.__name__, frozenset())
        operator.in_dtypes = [row for row in operator.in_dtypes if all(dtype.name in dtypes for dtype in row)]
        operator.out_dtypes = [row for row in operator.out_dtypes if all(dtype.name in dtypes for dtype in row)]
        kept.append(operator)
    activate_ext(opset=kept)
    return tuple(kept)


def generate(seed: int) -> Case:
    """The first model of this seed that PyTorch runs: NNSmith's operators allow some dtypes that PyTorch lacks."""
    for attempt in range(ATTEMPTS):
        case = _attempt(seed * ATTEMPTS + attempt)
        if case is not None:
            return case
    raise ValueError(f"NNSmith made no model that PyTorch runs of seed {seed}")


def _attempt(seed: int) -> Case | None:
    available = operators()
    import z3
    from nnsmith.error import ConstraintError, InternalError
    from nnsmith.graph_gen import model_gen
    from nnsmith.materialize.torch import TorchModelCPU

    z3.z3._main_ctx = None  # what the solver answers depends on what it was asked before
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        generated = model_gen(
            opset=list(available),
            method="symbolic-cinit",
            seed=seed,
            max_elem_per_tensor=ELEMENTS,
            max_nodes=NODES,
            timeout_ms=10_000,
        )
        graph = generated.make_concrete()
        network = TorchModelCPU.from_gir(graph).native_model
        inputs = tuple(tuple(network.get_random_inps(base=base).values()) for base in (5, "center"))
        module = Model(network).eval()
        with torch.no_grad():
            results = [module(*item) for item in inputs]
    except (ConstraintError, InternalError, RuntimeError, AssertionError, IndexError):
        return None
    if any(value.dtype.is_complex for item in (*inputs, *results) for value in item) or not inputs[0]:
        return None
    return Case(module, inputs, {}, graph.pretty())
