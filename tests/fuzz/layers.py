"""Layers with weights, attention, branches and state: what passes and kernels look for."""

from __future__ import annotations

import torch

from tests.fuzz.expressions import SAME_SHAPE, Writer, fill
from tests.fuzz.source import SCOPE, Source


def linear(s: Source) -> object:
    """One linear, or several that read the same input."""
    name = s.pick_float(range(1, 5), torch.float32, torch.float32, torch.float16)
    if name is None or (width := s.sizes(name)[-1]) is None:
        return None
    dtype, made = s.value(name).dtype, None
    for _ in range(s.rng.choice((1, 1, 1, 2, 3))):
        rows = s.rng.choice((1, 3, 4, 8, 16, 17))
        weight = s.weight([rows, width], dtype, spread=(width or 1) ** -0.5)
        bias = f", {s.weight([rows], dtype)}" if s.rng.random() < 0.6 else ""
        made = s.add(f"F.linear({name}, {weight}{bias})") or made
    if made and s.rng.random() < 0.4:
        made = s.add(fill(s.rng.choice(SAME_SHAPE), made[0]))
    return made


def matrix_product(s: Source) -> object:
    name = s.pick_float(range(1, 5), torch.float32, torch.float16)
    if name is None:
        return None
    value, sizes = s.value(name), s.sizes(name)
    other = s.pick(
        lambda v: v.dtype == value.dtype and 0 < v.dim() < 5 and v.shape[max(v.dim() - 2, 0)] == value.shape[-1]
    )
    if (other is None or s.rng.random() < 0.4) and sizes[-1] is not None:
        lead = [s.rng.choice((1, 2))] if s.rng.random() < 0.2 else []
        other = s.weight([*lead, sizes[-1], s.rng.choice((1, 4, 8))], value.dtype, spread=0.4)
    if other is None or s.rng.random() < 0.15:
        return s.add(f"{name} @ {name}.mT") if value.dim() > 1 else s.add(f"torch.dot({name}, {name})")
    columns = s.rng.choice((1, 4, 8))
    forms = [f"{name} @ {other}", f"torch.matmul({name}, {other})"]
    if value.dim() == 2 and sizes[-1] is not None:
        weight = s.weight([sizes[-1], columns], value.dtype, spread=0.4)
        forms += [f"torch.addmm({s.weight([columns], value.dtype)}, {name}, {weight})", f"torch.mm({name}, {weight})"]
        forms += [f"torch.einsum('ij,jk->ki', {name}, {weight})", f"torch.mv({weight}.T, {name}[0])"]
    if value.dim() == 3 and sizes[-1] is not None:
        forms += [f"torch.einsum('bij,jk->bik', {name}, {s.weight([sizes[-1], columns], value.dtype, 0.4)})"]
        forms += [f"torch.bmm({name}, {name}.transpose(1, 2))"]
    return s.add(s.rng.choice(forms))


def attention(s: Source) -> object:
    name = s.pick_float((3, 4), torch.float32)
    if name is None:
        return None
    key, value = (s.add(fill(s.rng.choice(("{} * 0.5", "{}.flip(-1)", "torch.tanh({})")), name)) for _ in range(2))
    if key is None or value is None:
        return None
    rows = s.size(name, -2)
    masks = ["", "", ", is_causal=True", f", attn_mask=torch.arange({rows})[None, :] <= torch.arange({rows})[:, None]"]
    masks += [f", attn_mask={s.weight([1, 1])}", ", scale=0.3"]
    return s.add(f"F.scaled_dot_product_attention({name}, {key[0]}, {value[0]}{s.rng.choice(masks)})")


def normalization(s: Source) -> object:
    name = s.pick_float(range(1, 5), torch.float32, torch.float16)
    if name is None:
        return None
    value, sizes = s.value(name), s.sizes(name)
    width, dtype = sizes[-1], value.dtype
    if value.dim() > 1 and (channels := sizes[1]) and dtype is torch.float32 and s.rng.random() < 0.5:
        affine = f"{s.finite([channels])}, {s.finite([channels])}" if s.rng.random() < 0.7 else "None, None"
        statistics = f"{s.finite([channels])}, {s.positive([channels])}"
        if s.rng.random() < 0.6:
            return s.add(f"F.batch_norm({name}, {statistics}, {affine}, False, 0.1, 1e-5)")
        groups = s.rng.choice([n for n in (1, 2, 4) if channels % n == 0])
        return s.add(f"F.group_norm({name}, {groups}, {affine})")
    if not width:
        return None
    weight, bias = s.weight([width], dtype), s.weight([width], dtype)
    forms = [f"F.layer_norm({name}, ({width},), {weight}, {bias})", f"F.rms_norm({name}, ({width},), {weight})"]
    forms += [f"F.layer_norm({name}, ({width},))", f"F.layer_norm({name}, ({width},), {weight}, None, 1e-3)"]
    return s.add(s.rng.choice(forms))


def convolution(s: Source) -> object:
    """A convolution, often with a batch normalization and an activation behind it."""
    name = s.pick_float((3, 4, 5), torch.float32)
    if name is None or not (channels := s.sizes(name)[1]):
        return None
    rank = s.value(name).dim() - 2
    groups = s.rng.choice([n for n in (1, 1, 2, channels) if channels % n == 0])
    count = groups * s.rng.choice((1, 2, 4))
    kernel = [s.rng.choice((1, 2, 3)) for _ in range(rank)]
    options = f"stride={s.rng.choice((1, 1, 2))}, padding={s.rng.choice((0, 1, 1))}, groups={groups}"
    if s.rng.random() < 0.3:
        options = f"padding='same', groups={groups}"
    elif s.rng.random() < 0.2:
        options += ", dilation=2"
    bias = s.weight([count]) if s.rng.random() < 0.5 else "None"
    if rank < 3 and s.rng.random() < 0.2:
        weight = s.weight([channels, count // groups, *kernel], spread=0.4)
        made = s.add(f"F.conv_transpose{rank}d({name}, {weight}, {bias}, stride=2, groups={groups})")
    else:
        weight = s.weight([count, channels // groups, *kernel], spread=0.4)
        made = s.add(f"F.conv{rank}d({name}, {weight}, {bias}, {options})")
    if made and s.rng.random() < 0.6:
        statistics = f"{s.finite([count])}, {s.positive([count])}"
        affine = f"{s.finite([count])}, {s.finite([count])}"
        made = s.add(f"F.batch_norm({made[0]}, {statistics}, {affine}, False, 0.1, 1e-5)")
    if made and s.rng.random() < 0.5:
        made = s.add(fill(s.rng.choice(SAME_SHAPE), made[0]))
    return made


def pooling(s: Source) -> object:
    name = s.pick_float((3, 4), torch.float32)
    if name is None:
        return None
    rank = s.value(name).dim() - 2
    forms = [f"F.max_pool{rank}d({name}, 2)", f"F.max_pool{rank}d({name}, 3, stride=2, padding=1)"]
    forms += [f"F.avg_pool{rank}d({name}, 2)", f"F.adaptive_avg_pool{rank}d({name}, 1)"]
    forms += [
        f"F.avg_pool{rank}d({name}, 3, 1, 1, count_include_pad=False)",
        f"F.interpolate({name}, scale_factor=2.0)",
    ]
    mode = {1: "linear", 2: "bilinear"}[rank]
    forms += [f"F.interpolate({name}, scale_factor=2.0, mode='{mode}', align_corners={s.rng.random() < 0.5})"]
    return s.add(s.rng.choice(forms))


def branch(s: Source) -> object:
    """torch.cond, also inside its branches, also on a constant."""
    name = s.pick_float(range(5), torch.float32)
    if name is None or s.depth > 1:
        return None
    other = s.pick_float(range(5))
    operands = [name] if other is None or other == name or s.rng.random() < 0.5 else [name, other]
    operands = [_contiguous(s, operand) for operand in operands]
    name = operands[0]
    deciders = [f"{s.rng.choice(operands)}.sum() > 0.1", f"{name}.max() < 1.0", f"{s.weight([4])}.sum() > 0"]
    deciders += [f"({name} > 5).any()", f"torch.tensor({s.rng.random() < 0.5})", s.weight([], torch.bool)]
    predicate = s.add(s.rng.choice(deciders))
    if predicate is None or s.value(predicate[0]).dim():
        return None
    results = 2 if s.rng.random() < 0.2 else 1
    bodies = [_body(s, operands, results) for _ in range(2)]
    if None in bodies:
        return None
    names = []
    for number, body in enumerate(bodies):
        names.append(f"f{s.depth}_{s.fresh}_{number}")
        parameters = ", ".join(f"{'x' * (s.depth + 1)}{index}" for index in range(len(operands)))
        s.lines += [f"def {names[-1]}({parameters}):", *(f"    {line}" for line in body or ())]
    return _call(s, predicate[0], names, operands, results)


def _contiguous(s: Source, name: str) -> str:
    """torch.cond wants the results of both branches to lie alike in memory."""
    if all(world[name].stride() == torch.empty(world[name].shape).stride() for world in s.worlds):
        return name
    made = s.add(f"{name}.clone(memory_format=torch.contiguous_format)")
    return made[0] if made else name


def _body(s: Source, operands: list[str], results: int) -> list[str] | None:
    """Lines that end in values of the first operand's shape, made anew."""
    parameters = [f"{'x' * (s.depth + 1)}{index}" for index in range(len(operands))]
    worlds = [{new: world[old] for new, old in zip(parameters, operands, strict=True)} for world in s.worlds]
    inner = Source(s.rng, s.generator, worlds, s.module, s.settings, s.depth + 1)
    ends = []
    for _ in range(results):
        current, made = parameters[0], None
        for _ in range(s.rng.randint(1, 3)):
            made = _step(inner, current, parameters[0])
            current = made[0] if made else current
        if current == parameters[0]:
            made = inner.add(f"{current} * 2.0")
            if made is None:
                return None
            current = made[0]
        ends.append(current)
    if len(set(ends)) < len(ends):
        return None
    return [*inner.lines, f"return {ends[0] if results == 1 else '(' + ', '.join(ends) + ')'}"]


def _step(s: Source, name: str, origin: str) -> list[str] | None:
    """One line that keeps shape and dtype."""
    width = s.sizes(name)[-1] if s.value(name).dim() else None
    if s.depth == 1 and s.rng.random() < 0.15:
        branch(s)
        found = s.names[-1]
    elif width and s.rng.random() < 0.3:
        weight = s.weight([width, width], spread=width**-0.5)
        made = s.add(f"F.linear({name}, {weight}, {s.weight([width])})")
        found = made[0] if made else name
    elif s.rng.random() < 0.3:
        made = s.add(f"{name} {s.rng.choice('+-*')} {s.like(name)}")
        found = made[0] if made else name
    else:
        made = s.add(fill(s.rng.choice(SAME_SHAPE), name))
        found = made[0] if made else name
    alike = all(world[found].shape == world[origin].shape for world in s.worlds)
    fresh = not any(found == parameter for parameter in s.names if parameter.startswith("x"))
    return [found] if alike and fresh and s.value(found).dtype == s.value(origin).dtype else None


def _call(s: Source, predicate: str, functions: list[str], operands: list[str], results: int) -> list[str] | None:
    """Run the branches that were just defined in every world, each in turn: both must suit."""
    text = "\n".join(_definitions(s.lines))
    for world in s.worlds:
        space = {**SCOPE, **world, "self": s.module}
        exec(text, space)
        world.update({name: space[name] for name in functions})
    return s.add(f"cond({predicate}, {functions[0]}, {functions[1]}, ({', '.join(operands)},))", results)


def _definitions(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(("def ", "    "))]


def state(s: Source) -> object:
    """A buffer that is read, written and read again."""
    name = s.pick(lambda value: value.dtype in (torch.float32, torch.int64) and value.dim() < 4)
    if name is None or s.depth:
        return None
    value, sizes = s.value(name), s.sizes(name)
    shape = [1 if size is None else size for size in sizes]
    fixed = (
        f"{name}.sum(dim={[n for n, size in enumerate(sizes) if size is None]}, keepdim=True)"
        if None in sizes
        else name
    )
    buffer = s.state(shape, value.dtype)
    new = s.add(f"self.{buffer} + {fixed}")
    if new is None or s.value(new[0]).shape != torch.Size(shape) or s.value(new[0]).dtype != value.dtype:
        del s.module._buffers[buffer]
        if new:
            s.lines.pop()
            s.expressions.pop()
            s.names.remove(new[0])
        return None
    s.lines.append(s.rng.choice((f"self.{buffer}.copy_({new[0]})", f"self.{buffer}.add_({fixed})")))
    s.used.add(new[0])
    return s.add(f"self.{buffer} * 0.5") if value.is_floating_point() else new


LAYERS: dict[Writer, float] = {
    linear: 6,
    matrix_product: 3,
    attention: 1,
    normalization: 3,
    convolution: 4,
    pooling: 1,
    branch: 1.2,
    state: 0.5,
}
