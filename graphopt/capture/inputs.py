"""Inputs drawn from a program's domains, and the sizes at which programs are compared."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphopt.program import Domain, Program, SizeRange, TensorSpec, evaluate_size

_PRIMES = (7, 5, 11, 13, 3, 17, 2)
_DEFAULT_SIZE = 4


def draw_inputs(program: Program, sizes: Mapping[str, int], seed: int) -> tuple[torch.Tensor, ...]:
    """Inputs of the given sizes: ids uniform over the table, masks of 0 and 1, else the spread of the examples.

    Bound inputs have their one value. `sizes` holds a value for every name in `program.sizes`; the same arguments give
    the same tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    examples = program.examples or (None,) * len(program.inputs)
    return tuple(
        program.bound[spec.name].clone() if spec.name in program.bound else _draw(spec, example, sizes, generator)
        for spec, example in zip(program.inputs, examples, strict=True)
    )


def draw_examples(program: Program) -> tuple[torch.Tensor, ...]:
    """Inputs for a program that came without examples: unnamed sizes are small, floats are standard normal."""
    return draw_inputs(program, drawn_sizes(program), seed=0)


def drawn_sizes(program: Program) -> dict[str, int]:
    """The sizes of `draw_examples`."""
    return {name: _clamp(_DEFAULT_SIZE + index, bounds) for index, (name, bounds) in enumerate(program.sizes.items())}


def check_sizes(program: Program) -> list[dict[str, int]]:
    """The sizes to compare at: the examples', all at 1 (or the least allowed), all at different primes."""
    if not program.sizes:
        return [{}]
    example = program.bind(program.examples)
    candidates = [
        {name: example[name] for name in program.sizes},
        {name: _clamp(1, bounds) for name, bounds in program.sizes.items()},
        _primes(program.sizes),
    ]
    return [sizes for index, sizes in enumerate(candidates) if sizes not in candidates[:index]]


def _primes(sizes: Mapping[str, SizeRange]) -> dict[str, int]:
    chosen: dict[str, int] = {}
    for name, bounds in sizes.items():
        allowed = [p for p in _PRIMES if p >= bounds.low and (bounds.high is None or p <= bounds.high)]
        fresh = [p for p in allowed if p not in chosen.values()]
        chosen[name] = next(iter(fresh or allowed), _clamp(_PRIMES[0], bounds))
    return chosen


def _clamp(size: int, bounds: SizeRange) -> int:
    size = max(size, bounds.low)
    return size if bounds.high is None else min(size, bounds.high)


def _draw(
    spec: TensorSpec, example: torch.Tensor | None, sizes: Mapping[str, int], generator: torch.Generator
) -> torch.Tensor:
    shape = [evaluate_size(size, sizes) for size in spec.shape]
    match spec.domain:
        case Domain(kind="ids", low=low, high=high):
            return torch.randint(low, high + 1, shape, generator=generator).to(spec.dtype)
        case Domain(kind="mask"):
            return _mask(shape, generator).to(spec.dtype)
    if spec.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=spec.dtype)
    if spec.dtype.is_floating_point:
        mean, spread = _spread(example)
        return (torch.randn(shape, generator=generator) * spread + mean).to(spec.dtype)
    low, high = (0, 1) if example is None or example.numel() == 0 else (int(example.min()), int(example.max()))
    return torch.randint(low, high + 1, shape, generator=generator).to(spec.dtype)


def _spread(example: torch.Tensor | None) -> tuple[float, float]:
    if example is None or example.numel() == 0:
        return 0.0, 1.0
    finite = example.to(torch.float64)[example.isfinite()]
    if finite.numel() < 2:
        return (float(finite[0]) if finite.numel() else 0.0), 1.0
    return float(finite.mean()), float(finite.std()) or 1.0


def _mask(shape: list[int], generator: torch.Generator) -> torch.Tensor:
    """Zeros and ones, three of four being ones, at least one in every row of the last axis."""
    mask = torch.rand(shape, generator=generator) < 0.75
    if mask.dim() and mask.shape[-1]:
        mask[..., 0] = True
    return mask
