"""The expressions that random models are made of: each function writes one or several lines, or gives up with None."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.fuzz.source import Source

Writer = Callable[[Source], object]
FLOATS = (torch.float32, torch.float64, torch.float16)
SAME_SHAPE = (
    "torch.relu({})",
    "F.gelu({})",
    "F.gelu({}, approximate='tanh')",
    "F.silu({})",
    "torch.sigmoid({})",
    "torch.tanh({})",
    "torch.exp(-{}.abs())",
    "torch.exp({}.clamp(max=3.0))",
    "torch.erf({})",
    "torch.sin({})",
    "torch.cos({})",
    "torch.atan({})",
    "torch.sqrt({}.abs())",
    "torch.rsqrt({}.abs() + 1.0)",
    "torch.log({}.abs() + 0.5)",
    "torch.log1p({}.abs())",
    "torch.log2({}.abs() + 0.5)",
    "torch.expm1({}.clamp(-2, 2))",
    "torch.exp2({}.clamp(-2, 2))",
    "F.leaky_relu({}, 0.1)",
    "F.elu({})",
    "F.softplus({})",
    "F.hardswish({})",
    "F.hardsigmoid({})",
    "F.relu6({})",
    "F.mish({})",
    "F.logsigmoid({})",
    "F.hardtanh({}, -0.5, 0.5)",
    "F.threshold({}, 0.1, -1.0)",
    "torch.square({})",
    "torch.reciprocal({}.abs() + 0.5)",
    "-{}",
    "{}.abs()",
    "{}.clamp(-1.0, 1.0)",
    "{}.clamp(min=-0.25)",
    "torch.floor({})",
    "torch.ceil({})",
    "torch.round({})",
    "torch.trunc({})",
    "torch.frac({})",
    "torch.sign({})",
    "torch.nan_to_num({})",
    "{} ** 2",
    "{} ** 3",
    "({}.abs() + 0.1) ** 0.5",
    "({}.abs() + 0.1) ** 1.3",
    "{} * 0.5",
    "2.0 - {}",
    "{} / 3.0",
    "{} + 1",
    "torch.softmax({}, -1)",
    "torch.log_softmax({}, -1)",
    "{} - {}.mean(-1, keepdim=True)",
    "{} * torch.rsqrt({}.square().mean(-1, keepdim=True) + 1e-5)",
    "F.layer_norm({0}, {0}.shape[-1:])",
)
NO_OPS = (
    "{}.clone()",
    "{}.contiguous()",
    "{}.detach()",
    "{}.to({}.dtype)",
    "{} * 1",
    "{} / 1",
    "{} + 0",
    "{} - 0",
    "F.dropout({}, 0.5, False)",
    "{}.reshape({}.shape)",
    "{}.expand({}.shape)",
    "{}[...]",
    "{}.transpose(0, -1).transpose(0, -1)",
    "-(-{})",
    "{}.unsqueeze(0).squeeze(0)",
    "torch.cat([{}], 0)",
    "{}[:]",
)


def fill(template: str, name: str) -> str:
    """Every {} and {0} is the name."""
    return template.replace("{0}", name).replace("{}", name)


def same_shape(s: Source) -> object:
    name = s.pick_float(range(6))
    if name is None:
        return None
    form = s.rng.choice(SAME_SHAPE)
    refused = s.value(name).dtype is torch.float64 and ("softmax" in form or "layer_norm" in form)
    return None if refused else s.add(fill(form, name))


def no_op(s: Source) -> object:
    name = s.pick()
    return name and s.add(fill(s.rng.choice(NO_OPS), name))


def duplicate(s: Source) -> object:
    return s.add(s.rng.choice(s.expressions)) if s.expressions else None


def constant_chain(s: Source) -> object:
    """Arithmetic on weights alone."""
    shape = [s.rng.choice((1, 3, 4, 8)) for _ in range(s.rng.randint(0, 2))]
    made = s.add(f"{s.weight(shape)} * {s.rng.choice((0.5, 2.0, -1.0))}")
    for _ in range(s.rng.randint(0, 2)):
        made = made and s.add(fill(s.rng.choice(SAME_SHAPE), made[0]))
    return made


def factory(s: Source) -> object:
    name = s.pick(lambda value: value.dim() > 0)
    if name is None:
        return None
    axis = s.rng.randrange(s.value(name).dim())
    size = s.size(name, axis)
    forms = [
        f"torch.zeros({size})",
        f"torch.ones({size}, 2)",
        f"torch.full(({size},), 0.75)",
        f"torch.arange({size})",
        f"torch.arange({size}, dtype=torch.float32) * 0.1",
        f"torch.arange(1, {size} + 1)",
        f"torch.ones_like({name})",
        f"torch.zeros_like({name}, dtype=torch.float32)",
        f"torch.full_like({name}, 2)",
        f"{name}.new_zeros(3)",
        "torch.linspace(-1.0, 1.0, 5)",
        "torch.tensor([1.0, -2.0, 0.5])",
        "torch.tensor(3)",
        f"torch.arange({size})[None, :] <= torch.arange({size})[:, None]",
    ]
    return s.add(s.rng.choice(forms))


def binary(s: Source) -> object:
    name = s.pick(lambda value: value.dtype is not torch.bool)
    if name is None:
        return None
    other = s.like(name)
    forms = ["{a} + {b}", "{a} - {b}", "{a} * {b}", "torch.maximum({a}, {b})", "torch.minimum({a}, {b})"]
    if s.value(name).is_floating_point():
        forms += ["{a} / ({b}.abs() + 0.5)", "torch.add({a}, {b}, alpha=2)", "torch.lerp({a}, {b}, 0.25)"]
        forms += ["torch.addcmul({a}, {b}, {a}, value=0.5)", "torch.remainder({a}, {b}.abs() + 0.5)"]
        forms += ["torch.fmod({a}, {b}.abs() + 0.5)", "torch.sub({b}, {a}, alpha=0.5)"]
        forms += ["torch.div({a}, {b}.abs() + 0.5, rounding_mode='floor')"]
        forms += ["torch.div({a}, {b}.abs() + 0.5, rounding_mode='trunc')"]
    else:
        forms += ["{a} // ({b}.clamp(1, 5))", "{a} % ({b}.clamp(1, 5))", "{a} & {b}", "{a} | {b}", "{a} ^ {b}"]
        forms += ["{a} / ({b}.clamp(1, 5))", "torch.fmod({a}, {b}.clamp(1, 5))", "{a} * 2 + 1", "-{a}", "{a}.abs()"]
        forms += ["torch.sign({a})", "~{a}", "{a}.clamp(-2, 3)", "{a} ** 2", "{a} + 0.5", "{a} // 2", "{a} % 3"]
    a, b = (name, other) if s.rng.random() < 0.7 else (other, name)
    return s.add(s.rng.choice(forms).format(a=a, b=b))


def mixed(s: Source) -> object:
    """Two values of different dtypes: promotion."""
    name = s.pick()
    other = s.pick(lambda value: name is not None and value.dtype != s.value(name).dtype)
    return name and other and s.add(f"{name} {s.rng.choice('+-*')} {other}")


def comparison(s: Source) -> object:
    name = s.pick()
    if name is None:
        return None
    sign = s.rng.choice(("<", "<=", ">", ">=", "==", "!="))
    other = s.like(name) if s.rng.random() < 0.5 else s.rng.choice(("0", "0.3", "1", "-0.25"))
    return s.add(f"{name} {sign} {other}")


def logic(s: Source) -> object:
    name = s.pick(lambda value: value.dtype is torch.bool)
    if name is None:
        return comparison(s)
    other = s.like(name)
    forms = ["{a} & {b}", "{a} | {b}", "{a} ^ {b}", "~{a}", "torch.logical_not({a})", "torch.logical_and({a}, {b})"]
    return s.add(s.rng.choice(forms).format(a=name, b=other))


def where(s: Source) -> object:
    name = s.pick(lambda value: value.dtype is not torch.bool)
    if name is None:
        return None
    mask = s.pick(lambda value: value.dtype is torch.bool) if s.rng.random() < 0.6 else f"({name} > 0)"
    other = s.like(name)
    forms = ["torch.where({m}, {a}, {b})", "torch.where({m}, {a}, 0.0)", "{a}.masked_fill({m}, -2)"]
    return mask and s.add(s.rng.choice(forms).format(m=mask, a=name, b=other))


def cast(s: Source) -> object:
    name = s.pick()
    if name is None:
        return None
    weights = {"float32": 6, "float16": 2, "float64": 1, "int64": 3, "int32": 3, "bool": 2, "int8": 1, "uint8": 1}
    wanted = s.rng.choices(list(weights), list(weights.values()))[0]
    source = name
    if s.value(name).is_floating_point() and wanted in ("int64", "int32", "int8", "uint8"):
        low = 0 if wanted == "uint8" else -50
        source = f"torch.nan_to_num({name}).clamp({low}, 50)"
    elif wanted in ("int8", "uint8") and s.value(name).dtype is not torch.bool:
        source = f"{name}.clamp(0, 50)"
    form = s.rng.choice(("{}.to(torch.{t})", "{}.type(torch.{t})"))
    return s.add(form.replace("{}", source).replace("{t}", wanted))


def reduction(s: Source) -> object:
    name = s.pick(lambda value: value.dim() > 0)
    if name is None:
        return None
    value = s.value(name)
    axes = sorted(s.rng.sample(range(value.dim()), s.rng.randint(1, value.dim())))
    axes = [axis - value.dim() if s.rng.random() < 0.3 else axis for axis in axes]
    keep = s.rng.random() < 0.5
    one = axes[0]
    if value.dtype is torch.bool:
        forms = [f"{name}.any({one}, keepdim={keep})", f"{name}.all({one}, keepdim={keep})", f"{name}.any()"]
        forms += [f"{name}.sum({one}, keepdim={keep})", f"{name}.all()"]
    elif not value.is_floating_point():
        forms = [f"{name}.sum({axes}, keepdim={keep})", f"{name}.amax({axes}, keepdim={keep})", f"{name}.sum()"]
        forms += [f"{name}.amin({axes}, keepdim={keep})", f"{name}.argmax({one}, keepdim={keep})"]
        forms += [f"{name}.cumsum({one})", f"{name}.max()", f"{name}.prod({one}, keepdim={keep})"]
    else:
        forms = [f"{name}.{f}({axes}, keepdim={keep})" for f in ("sum", "mean", "amax", "amin")]
        if value.dtype is torch.float32:
            forms += [f"{name}.logsumexp({axes}, keepdim={keep})"]
        forms += [f"{name}.{f}({axes}, keepdim={keep})" for f in ("var", "std")] if min(value.shape) > 1 else []
        forms += [f"{name}.var({axes}, unbiased=False, keepdim={keep})", f"{name}.argmax({one}, keepdim={keep})"]
        forms += [f"{name}.argmin({one}, keepdim={keep})", f"{name}.mean()", f"{name}.sum()", f"{name}.max()"]
        forms += [f"{name}.prod({one}, keepdim={keep})", f"{name}.cumsum({one})", f"{name}.argmax()"]
        order = s.rng.choice(("1", "2", "torch.inf"))
        forms += [f"torch.linalg.vector_norm({name}, {order}, {axes}, {keep})"]
        if value.dtype is not torch.float64:
            forms += [f"torch.softmax({name}, {one})", f"torch.log_softmax({name}, {one})", f"{name}.any({one})"]
    if value.dtype is not torch.bool and s.rng.random() < 0.1:
        return s.add(f"{name}.{s.rng.choice(('max', 'min'))}({one}, {keep})", results=2)
    return s.add(s.rng.choice(forms))


def reshape(s: Source) -> object:
    name = s.pick()
    if name is None:
        return None
    sizes, rank = s.sizes(name), s.value(name).dim()
    forms = [f"{name}.unsqueeze({s.rng.randint(0, rank)})", f"{name}.squeeze()", f"{name}[None]"]
    if rank:
        axis = s.rng.randrange(rank)
        own = [s.size(name, number) for number in range(rank)]
        size = sizes[axis]
        forms += [
            f"{name}.flatten({axis})",
            f"{name}.flatten(0, {axis})",
            f"{name}.flatten()",
            f"{name}.squeeze({axis})",
        ]
        if size:
            parts = [part for part in range(1, size + 1) if size % part == 0]
            part = s.rng.choice(parts)
            split = [*own[:axis], str(part), str(size // part), *own[axis + 1 :]]
            forms += [f"{name}.reshape({', '.join(split)})", f"{name}.unflatten({axis}, ({part}, {size // part}))"]
            forms += [f"{name}.reshape({', '.join(split)}).transpose({axis}, {axis + 1})"]
            joined = [*own[:axis], "-1", *own[axis + 2 :]]
            forms += [f"{name}.reshape({', '.join(joined)})"]
    return s.add(s.rng.choice(forms))


def permutation(s: Source) -> object:
    name = s.pick(lambda value: value.dim() > 1)
    if name is None:
        return None
    rank = s.value(name).dim()
    order = s.rng.sample(range(rank), rank)
    a, b = s.rng.sample(range(-rank, rank), 2)
    forms = [f"{name}.permute({order})", f"{name}.transpose({a}, {b})", f"{name}.mT", f"{name}.movedim({a}, {b})"]
    return s.add(s.rng.choice(forms))


def part(s: Source) -> object:
    """Slices, selections, splits."""
    name = s.pick(lambda value: value.dim() > 0)
    if name is None:
        return None
    value, sizes = s.value(name), s.sizes(name)
    axis = s.rng.randrange(value.dim())
    colons = ":, " * axis
    size = sizes[axis]
    forms = [f"{name}[{colons}1:]", f"{name}[{colons}:-1]", f"{name}[{colons}::2]", f"{name}[{colons}-1]"]
    forms += [f"{name}[{colons}0]", f"{name}[{colons}-2:]", f"{name}[{colons}:2]", f"{name}.flip({axis})"]
    forms += [f"{name}.roll({s.rng.choice((1, -1, 2))}, {axis})", f"{name}[..., :1]", f"{name}.diff(dim={axis})"]
    if size and size > 1:
        cut = s.rng.randint(1, size - 1)
        several = [
            (f"{name}.split([{cut}, {size - cut}], {axis})", 2),
            (f"{name}.chunk(2, {axis})", 2),
            (f"{name}.split({cut}, {axis})", -(-size // cut)),
            (f"{name}.unbind({axis})", size),
        ]
        if s.rng.random() < 0.35:
            expression, results = s.rng.choice([item for item in several if item[1] <= 4] or several[:1])
            return s.add(expression, results)
        start = s.rng.randrange(size)
        forms += [f"{name}[{colons}{start}:{s.rng.randint(start, size)}]", f"{name}.narrow({axis}, {start}, 1)"]
        forms += [f"{name}.unfold({axis}, 2, 1)", f"{name}.select({axis}, {start})"]
    return s.add(s.rng.choice(forms))


def growth(s: Source) -> object:
    """Expansions, repetitions, padding, concatenations."""
    name = s.pick(lambda value: value.dim() > 0)
    if name is None:
        return None
    value = s.value(name)
    rank = value.dim()
    axis = s.rng.randrange(rank)
    before, after = s.rng.randint(-1, 2), s.rng.randint(0, 2)
    ones = ", ".join("2" if number == axis else "1" for number in range(rank))
    forms = [
        f"{name}.expand(2, {', '.join(['-1'] * rank)})",
        f"{name}.repeat({ones})",
        f"torch.cat([{name}, {name}], {axis})",
    ]
    forms += [
        f"{name}.repeat_interleave(2, {axis})",
        f"torch.stack([{name}, {name}], {axis})",
        f"torch.tile({name}, (2,))",
    ]
    forms += [f"{name}.unsqueeze({axis}).expand({', '.join(['-1'] * axis + ['3'] + ['-1'] * (rank - axis))})"]
    if value.dtype is not torch.bool:
        forms += [f"F.pad({name}, ({before}, {after}))", f"F.pad({name}, ({after}, {before}), value=2)"]
    if rank > 1:
        forms += [f"{name}.tril()", f"{name}.triu(1)", f"F.pad({name}, (0, 1, {after}, 0))"]
    other = s.pick(
        lambda v: (
            v.dim() == rank
            and all(p == q for n, (p, q) in enumerate(zip(v.shape, value.shape, strict=True)) if n != axis)
        )
    )
    if other is not None and s.rng.random() < 0.6:
        return s.add(f"torch.cat([{name}, {other}], {axis})")
    return s.add(s.rng.choice(forms))


def lookup(s: Source) -> object:
    """Rows of a table by position."""
    ids = s.pick(lambda value: value.dtype in (torch.int64, torch.int32) and value.dim() < 4)
    if ids is not None and s.rng.random() < 0.5:
        rows = s.rng.choice((3, 7, 11))
        table = s.weight([rows, s.rng.choice((4, 8))])
        return s.add(s.rng.choice((f"F.embedding({ids}.clamp(0, {rows - 1}), {table})", f"{table}[{ids} % {rows}]")))
    name = s.pick(lambda value: value.dim() > 0 and value.numel() > 0)
    if name is None:
        return None
    value, sizes = s.value(name), s.sizes(name)
    axis = s.rng.randrange(value.dim())
    size = sizes[axis]
    if not size:
        return None
    colons = ":, " * axis
    positions = s.ids([s.rng.randint(1, 4)], size)
    forms = [f"{name}[{colons}{positions}]", f"torch.index_select({name}, {axis}, {positions} % {size})"]
    if all(sizes):
        shape = [n if number != axis else s.rng.randint(1, 3) for number, n in enumerate(value.shape)]
        forms += [f"{name}.gather({axis}, {s.ids(shape, size)} % {size})"]
        forms += [f"torch.take_along_dim({name}, {s.ids(shape, size)} % {size}, {axis})"]
    return s.add(s.rng.choice(forms))


def in_place(s: Source) -> object:
    """Writes to a copy: capture makes them functional."""
    name = s.pick_float()
    if name is None or not (made := s.add(f"{name}.clone()")):
        return None
    forms = ["{}.add_(1)", "{}.mul_(0.5)", "{}.relu_()", "{}.clamp_(-1, 1)", "{}.neg_()"]
    return s.add(fill(s.rng.choice(forms), made[0]))


EXPRESSIONS: dict[Writer, float] = {
    same_shape: 10,
    no_op: 2.5,
    duplicate: 2,
    constant_chain: 1,
    factory: 1,
    binary: 6,
    mixed: 0.7,
    comparison: 1.5,
    logic: 0.7,
    where: 1.2,
    cast: 1.2,
    reduction: 4,
    reshape: 3,
    permutation: 2,
    part: 3,
    growth: 2,
    lookup: 1.5,
    in_place: 0.7,
}
