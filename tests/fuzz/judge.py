"""What a result may be: found by running the model in float64, and with the rounding of every operator shaken.

An element that changes a lot when every operator is off by some rounding may change as much in any exact rewriting;
one that does not must come out as PyTorch gives it. Nothing of graphopt's own checking is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

RUNS = 5
CAREFUL_RUNS = 64  # before a result is called wrong: five may all miss a comparison that rounding decides
FACTOR = 16.0  # times the largest change that shaking causes
SHARE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3}  # of the largest value
ROUNDING = {torch.float64: 1e-14, torch.float32: 3e-7, torch.float16: 1e-3}
NARROW = (torch.float32, torch.float16)
# fmt: off
EXACT = frozenset(
    {
        "_to_copy", "abs", "alias", "amax", "amin", "arange", "cat", "ceil", "clamp", "clamp_max", "clamp_min",
        "clone", "constant_pad_nd", "copy", "detach", "embedding", "empty", "empty_like", "expand", "fill", "flip",
        "floor", "full", "full_like", "gather", "hardtanh", "index", "index_select", "leaky_relu_", "lift_fresh",
        "lift_fresh_copy", "masked_fill", "max", "max_pool2d_with_indices", "max_pool3d_with_indices", "maximum",
        "min", "minimum", "nan_to_num", "neg", "new_full", "new_ones", "new_zeros", "ones", "ones_like", "relu",
        "repeat", "roll", "round", "scalar_tensor", "sign", "slice_backward", "stack", "threshold", "tril", "triu",
        "trunc", "upsample_nearest1d", "upsample_nearest2d", "where", "zeros", "zeros_like",
    }
)
SUMS = frozenset(
    {
        "_fused_rms_norm", "_log_softmax", "_native_batch_norm_legit_no_training", "_softmax", "addmm", "addmv",
        "baddbmm", "bmm", "convolution", "cumsum", "dot", "linalg_vector_norm", "logsumexp", "mean", "mm", "mv",
        "native_batch_norm", "native_group_norm", "native_layer_norm", "rms_norm", "std", "sum", "var", "var_mean",
    }
)
APPROXIMATED = frozenset(
    {
        "_log_softmax", "elu", "erf", "expm1", "gelu", "log_sigmoid_forward", "logsumexp", "mish", "sigmoid", "silu",
        "softplus", "tanh",
    }
)
# fmt: on


class Shaken(TorchDispatchMode):
    """Every floating-point result is off by some units of rounding, at random."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if self.seed % 2:
            result = _as_documented(name, args, result, self.seed)
        if name in EXACT or any(value.alias_info is not None for value in func._schema.returns):
            return result
        reach = 4.0 if name in APPROXIMATED else 0.0
        if name in SUMS:
            reach += max((_largest(leaf) for leaf in _pytree.tree_leaves(args)), default=0.0)
        return _pytree.tree_map(lambda value: self._shake(value, reach), result)

    def _shake(self, value: Any, reach: float) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in ROUNDING:
            return value
        noise = torch.rand(value.shape, generator=self.generator) * 2 - 1
        size = value.abs().double() + reach
        shaken = value + (noise * size * ROUNDING[value.dtype]).to(torch.float64)
        return torch.where(value.isfinite() & (size > 0), shaken, value).to(value.dtype)


def _as_documented(name: str, args: Any, result: Any, seed: int) -> Any:
    """The differences from PyTorch that docs/numerics.md lists: gelu(-inf), denormals, floats that no integer holds."""
    if name == "gelu":
        return torch.where(args[0] == -torch.inf, 0.0, result)
    if name == "_to_copy" and args[0].is_floating_point() and not result.is_floating_point():
        limits = None if result.dtype is torch.bool else torch.iinfo(result.dtype)
        if limits is not None:
            held = (args[0].double() > limits.min - 1.0) & (args[0].double() < limits.max + 1.0)
            return torch.where(held, result, torch.full_like(result, seed))
    if isinstance(result, Tensor) and result.dtype in (torch.float32, torch.float64):
        return torch.where(result.abs() < torch.finfo(result.dtype).tiny, result * 0.0, result)
    return result


def _largest(value: Any) -> float:
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return 0.0
    finite = value.double().nan_to_num(0, 0, 0).abs()
    return float(finite.max())


class Wide(TorchDispatchMode):
    """float64 takes the place of narrower floats, also where a dtype is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _pytree.tree_map(_wide_dtype, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if any(value.alias_info is not None for value in func._schema.returns):
            return result
        return _pytree.tree_map(widen, result)


def _wide_dtype(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


def widen(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype in NARROW else value


@dataclass(frozen=True)
class Verdict:
    """What the model gives for one set of inputs, and how far each element may be from it."""

    expected: tuple[Tensor, ...]
    runs: tuple[tuple[Tensor, ...], ...]

    @property
    def unstable(self) -> bool:
        """Whether some element changes by far more than rounding when rounding is shaken."""
        return any(
            bool((_tolerance(value, [run[n] for run in self.runs]) > 1e-2 * _largest(value)).any())
            for n, value in enumerate(self.expected)
        )

    def fault(self, results: tuple[Tensor, ...]) -> str | None:
        """What is wrong with these results, or None."""
        if len(results) != len(self.expected):
            return f"{len(results)} outputs instead of {len(self.expected)}"
        for number, (result, value) in enumerate(zip(results, self.expected, strict=True)):
            if (result.dtype, result.shape) != (value.dtype, value.shape):
                return f"output {number} is {result.dtype}{list(result.shape)}, not {value.dtype}{list(value.shape)}"
            allowed = _tolerance(value, [run[number] for run in self.runs])
            wrong = ~(_distance(result, value) <= allowed)
            if wrong.any():
                place = tuple(int(n) for n in wrong.nonzero()[0])
                count = f"{int(wrong.sum())} of {wrong.numel()} elements"
                return (
                    f"output {number} at {list(place)} ({count}) is {result[place]} where PyTorch gives {value[place]}"
                )
        return None


def _distance(left: Tensor, right: Tensor) -> Tensor:
    """|left - right|; 0 for equal infinities and for NaN in both, infinite where only one is finite."""
    a, b = left.double(), right.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs()).nan_to_num(torch.inf, torch.inf)


def _tolerance(value: Tensor, runs: list[Tensor]) -> Tensor:
    spread = torch.stack([_distance(run, value) for run in runs]).amax(0) if runs else torch.zeros(value.shape)
    if not value.is_floating_point():
        return torch.where(spread > 0, torch.inf, 0.0)
    return FACTOR * spread + SHARE[value.dtype] * _largest(value)


def run_model(module: nn.Module, steps: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """A copy of the model called on each item in turn, without gradients."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        return [tuple(value.clone() for value in module(*(item.clone() for item in inputs))) for inputs in steps]


def verdicts(module: nn.Module, steps: list[tuple[Tensor, ...]], count: int = RUNS) -> list[Verdict]:
    """What a model that is called on each item in turn has to give; `count` is how often rounding is shaken."""
    expected = run_model(module, steps)
    runs = []
    for seed in range(count):
        with Shaken(seed):
            runs.append(run_model(module, steps))
    with sdpa_kernel(SDPBackend.MATH):  # NaN scores: PyTorch's fused kernel gives 0 where its plain one gives NaN
        runs.append(run_model(module, steps))
    wide = _try_wide(module, steps)
    runs += [wide] if wide is not None else []
    return [Verdict(value, tuple(run[step] for run in runs)) for step, value in enumerate(expected)]


def _try_wide(module: nn.Module, steps: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]] | None:
    """The float64 run; None where PyTorch has none of an operator, or dtypes decide what happens."""
    wide = copy.deepcopy(module).double()
    inputs = [tuple(widen(value) for value in item) for item in steps]
    attempt: Callable[[], list[tuple[Tensor, ...]]] = lambda: run_model(wide, inputs)  # noqa: E731
    try:
        with Wide():  # type: ignore[no-untyped-call]
            return attempt()
    except (RuntimeError, NotImplementedError, TypeError, IndexError):
        return None
