"""What LLVM made of each rule on each level: the widest registers, no library call, and nothing stored in hot loops.

Kernels are compiled for every level whatever this machine is, and never run. Sizes are whole numbers of tiles, so that
loops over what is left, which are scalar, do not hide what the others are.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.backends import cpu, operators, rules
from graphopt.backends.rules import integer_gemm
from graphopt.backends.rules.gemm import Configuration
from graphopt.backends.rules.integer_gemm import words_of
from graphopt.backends.rules.register_tile import tiles
from graphopt.backends.target import LEVELS, Target, resolve_target
from graphopt.capture import capture
from graphopt.program import Program
from graphopt.runtime.manifest import KernelInfo
from tests.backends.rules.assembly import Loop, calls, functions, kernel_functions, loops

F = nn.functional
WIDE = {16: "zmm", 8: "ymm", 4: ".4s"}
FUSED = re.compile(r"\t(?:vfn?m(?:add|sub)\w+|fml[as]|vdpbf16ps|vpdpbusd|vpmaddwd|smlal|(?:s|us|su)dot)\t")
TILES = re.compile(r"\t(?:ldtilecfg|tile\w+|tdp\w+)\b")
ARITHMETIC = re.compile(
    r"\t(?:v(?:fn?m(?:add|sub)\d*|add|sub|mul|div|max|min|sqrt)[ps]s|f(?:n?m)?(?:add|sub|mul|div|mla|mls|max|min|maxnm|minnm|sqrt))\t"
)
STORE = re.compile(r"\t(?:vmov[au]p[sd]\t%[xyz]mm\d+, .*\(|st[rp]\t[qds]\d|st1\t)")
SPILLED = re.compile(r"\t(?:v\w+\t.*\d*\(%rsp|(?:ld[rp]|st[rp])\t[qds]\d+.*\[sp)")


@dataclass(frozen=True)
class Expected:
    """Of a rule's kernels: whether hot loops only add into registers, whether a task asks for workspace, and whether
    loops that compute do so in whole vectors."""

    accumulates: bool = False
    workspace: bool = False
    wide: bool = True


AMX = ("amx-gemm", "amx-convolution")  # where the target has tiles
PRODUCTS = {  # what a kernel says that it multiplies -> the instructions that do it
    "pairs of bfloat16": {"vdpbf16ps"},
    "tiles of bfloat16": {"tdpbf16ps"},
    "tiles of uint8": {"tdpbusd"},
    "4 codes of uint8": {"vpdpbusd", "sudot"},
    "4 codes of int8": {"sdot"},
    "2 codes of int16": {"vpmaddwd", "smlal"},
}
NARROW = {  # level -> what multiplies narrow numbers there
    "cpu:x86-64-v3": {"vpmaddwd"},
    "cpu:x86-64-v3-vnni": {"vpdpbusd"},
    "cpu:x86-64-v4": {"vpmaddwd"},
    "cpu:x86-64-v4-vnni": {"vpdpbusd"},
    "cpu:x86-64-v4-bf16": {"vpdpbusd", "vdpbf16ps"},
    "cpu:sapphirerapids": {"vpdpbusd", "vdpbf16ps", "tdpbf16ps", "tdpbusd"},
    "cpu:aarch64": {"smlal"},
    "cpu:cortex-a78ae": {"sdot"},
    "cpu:armv8.6-a": {"sudot"},
}
EXPECTED = {
    "packed-gemm": Expected(accumulates=True),
    "amx-gemm": Expected(),  # its sums have a test of their own
    "amx-convolution": Expected(workspace=True),
    "integer-gemm": Expected(accumulates=True),
    "integer-convolution": Expected(accumulates=True, workspace=True),
    "batched-gemm": Expected(accumulates=True, workspace=True),
    "integer-batched-gemm": Expected(accumulates=True, workspace=True),
    "low-bit-build": Expected(wide=False),  # of the rest of a row
    "low-bit": Expected(workspace=True, wide=False),  # bits are taken apart between products, groups end in scalars
    "fused-attention": Expected(accumulates=True, workspace=True),
    "direct-convolution": Expected(accumulates=True, workspace=True),
    "winograd": Expected(workspace=True),  # its transforms multiply and store as much as its products add
    "gated-direct-convolution": Expected(accumulates=True, workspace=True),
    "gated-winograd": Expected(workspace=True),
    "depthwise": Expected(accumulates=True),
    "pooling": Expected(),
    "resampling": Expected(wide=False),  # positions are scalars
    "scan": Expected(),
    "recurrence": Expected(accumulates=True, workspace=True),
    "row-reduction": Expected(),
    "column-reduction": Expected(),
    "transpose": Expected(),
    "pointwise": Expected(),
    "sort": Expected(workspace=True, wide=False),  # compares one pair at a time
    "scatter": Expected(wide=False),  # writes where the indices say
    "generic": Expected(wide=False),
}
# Other kernels of these levels are those of another, or, on cpu:aarch64, LLVM keeps too few of their sums in registers.
ONLY_CODES = ("cpu:x86-64-v3-vnni", "cpu:aarch64", "cpu:armv8.6-a")
_FAST = ("cpu:x86-64-v3", "cpu:sapphirerapids")
SOME = [level if level in _FAST else pytest.param(level, marks=pytest.mark.slow) for level in LEVELS]


class Case(nn.Module):
    """A function of the inputs as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> Any:
        return self.function(*(x for x in (a, b, c) if x is not None))


class Codes(nn.Module):
    """A product of 96 columns or channels of codes, with codes again."""

    def __init__(self, operator: Callable[..., Any], *weight: int, **options: Any) -> None:
        super().__init__()
        self.operator, self.options = operator, options
        self.register_buffer("weight", torch.ones(weight, dtype=torch.int8))
        self.register_buffer("step", torch.tensor(0.1))
        self.register_buffer("zero", torch.tensor(7, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Any:
        given = (x, self.step, self.zero, self.weight, self.step, None, self.step, self.zero, None, None, None)
        return self.operator(*given, **self.options, dtype=torch.uint8)


class LowBit(nn.Module):
    """A product with 96 columns of 4-bit weights in groups of 128."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.ones(96, 256, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(96, 2))

    def forward(self, x: Tensor) -> Any:
        built = torch.ops.graphopt.lut_build(x, 128)
        return torch.ops.graphopt.lut_gemv(*built, self.codes, self.scale, None, None, None, 4, 128)


class ProductOfCodes(nn.Module):
    """Of two computed matrices, neither of which has the zero point 0."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(0.1))
        self.register_buffer("zero", torch.tensor(7, dtype=torch.uint8))

    def forward(self, a: Tensor, b: Tensor) -> Any:
        given = (a, self.step, self.zero, b, self.step, self.zero, self.step, self.zero)
        return torch.ops.graphopt.qmatmul(*given, dtype=torch.uint8)


class GatedConvolution(nn.Module):
    """Of 96 channels in blocks of 16."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(96, 96, 3, padding=1, stride=stride)

    def forward(self, x: Tensor, inputs: Tensor, outputs: Tensor) -> Any:
        sizes = {"stride": self.inner.stride, "padding": self.inner.padding, "dilation": self.inner.dilation}
        return torch.ops.graphopt.gated_convolution(x, self.inner.weight, self.inner.bias, inputs, outputs, **sizes)


def functions_of(x: Tensor) -> Tensor:
    """Every function that has a polynomial."""
    return (
        torch.erf(x) * torch.tanh(x)
        + torch.sigmoid(x) * x.exp()
        + F.gelu(x)
        + F.gelu(x, approximate="tanh")
        + F.silu(x)
    )


def programs() -> dict[str, Program]:
    """At least one kernel of each rule; which rule takes what is the compiler's choice."""
    r = torch.randn
    queries = (r(2, 4, 96, 32), r(2, 4, 96, 32), r(2, 4, 96, 32))
    images, active = r(1, 96, 64, 64), torch.ones(1, 6, dtype=torch.bool)
    cases: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "linear": (nn.Sequential(nn.Linear(64, 96), nn.GELU()), (r(256, 64),)),
        "vector": (nn.Linear(256, 384), (r(1, 256),)),
        "products": (Case(torch.matmul), (r(8, 96, 64), r(8, 64, 96))),
        "attention": (Case(F.scaled_dot_product_attention), queries),
        "causal": (Case(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)), queries),
        "softmax": (Case(lambda x: torch.softmax(x, -1)), (r(16, 6144),)),
        "layer_norm": (nn.LayerNorm(6144), (r(16, 6144),)),
        "sums": (Case(lambda x: (x.sum(0), x.amax(0), x.mean(-1), x.amax(-1))), (r(96, 6144),)),
        "spread": (Case(lambda x: (x * x.square().mean(-1, True).rsqrt(), x - x.amax(-1, True))), (r(16, 6144),)),
        "functions": (Case(functions_of), (r(16, 6144),)),
        "convolution": (nn.Sequential(nn.Conv2d(96, 96, 3, padding=1, stride=2), nn.ReLU()), (images,)),
        "minimal": (nn.Conv2d(96, 96, 3, padding=1), (images,)),
        "gated_convolution": (GatedConvolution(2), (images, active, active)),
        "gated_minimal": (GatedConvolution(1), (images, active, active)),
        "one_by_one": (nn.Conv2d(96, 96, 1), (images,)),
        "depthwise": (nn.Conv2d(96, 96, 3, padding=1, groups=96), (images,)),
        "pooling": (Case(lambda x: (F.max_pool2d(x, 2), F.avg_pool2d(x, 2), x.mean((2, 3)))), (images,)),
        "resampling": (Case(lambda x: F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2)), (r(1, 8, 8, 96),)),
        "transposed": (Case(lambda x: (x.t().contiguous(), torch.relu(x).t() * 2)), (r(256, 384),)),
        "double": (Case(torch.matmul), (r(8, 16).double(), r(16, 8).double())),
        "sorted": (Case(lambda x: x.sort(-1)[0]), (r(16, 96),)),
        "scattered": (Case(lambda x, i: x.index_add(0, i, x)), (r(16, 96), torch.arange(16))),
        "recurrent": (nn.LSTM(48, 96), (r(4, 6, 48),)),
        "gated": (nn.GRU(48, 96), (r(4, 6, 48),)),
        "running": (Case(lambda x: x.cumsum(0)), (r(16, 48),)),
        "codes": (Codes(torch.ops.graphopt.qlinear, 96, 64), (torch.ones(256, 64, dtype=torch.uint8),)),
        "codes_deep": (Codes(torch.ops.graphopt.qlinear, 96, 1024), (torch.ones(256, 1024, dtype=torch.uint8),)),
        "codes_vector": (Codes(torch.ops.graphopt.qlinear, 384, 1024), (torch.ones(1, 1024, dtype=torch.uint8),)),
        "codes_image": (
            Codes(torch.ops.graphopt.qconv, 96, 96, 3, 3, stride=[2, 2], padding=[1, 1], dilation=[1, 1]),
            (torch.ones(1, 96, 64, 64, dtype=torch.uint8),),
        ),
        "codes_groups": (
            Codes(torch.ops.graphopt.qconv, 96, 48, 3, 3, stride=[2, 2], padding=[1, 1], dilation=[1, 1], groups=2),
            (torch.ones(1, 96, 64, 64, dtype=torch.uint8),),
        ),
        "low_bit": (LowBit(), (r(1, 256),)),
        "codes_products": (
            ProductOfCodes(),
            (torch.ones(8, 96, 64, dtype=torch.uint8), torch.ones(8, 64, 96, dtype=torch.uint8)),
        ),
        "brain_linear": (nn.Sequential(nn.Linear(64, 96), nn.GELU()).bfloat16(), (r(256, 64).bfloat16(),)),
        "brain_deep": (nn.Linear(512, 96).bfloat16(), (r(256, 512).bfloat16(),)),
        "brain_image": (nn.Conv2d(96, 96, 3, padding=1, stride=2).bfloat16(), (images.bfloat16(),)),
        "brain_attention": (Case(F.scaled_dot_product_attention), tuple(x.bfloat16() for x in queries)),
        "brain_chain": (Case(lambda x: torch.relu(x * 2 + 1)), (r(16, 6144).bfloat16(),)),
    }
    return {name: capture(module.eval(), inputs) for name, (module, inputs) in cases.items()}


@dataclass(frozen=True)
class Compiled:
    """All kernels for one level."""

    level: str
    lanes: int
    pairs: bool
    amx: bool
    kernels: Mapping[str, KernelInfo]
    code: Mapping[str, tuple[str, ...]]

    def of_rule(self, rule: str) -> dict[str, dict[str, tuple[str, ...]]]:
        """Kernel -> its functions."""
        return {name: kernel_functions(self.code, name) for name, kernel in self.kernels.items() if kernel.rule == rule}

    def of_rules(self, rules: tuple[str, ...]) -> dict[str, dict[str, tuple[str, ...]]]:
        return {name: parts for rule in rules for name, parts in self.of_rule(rule).items()}

    def narrow(self, body: tuple[str, ...]) -> list[str]:
        """Arithmetic on floats in less than the widest registers."""
        return [line for line in body if ARITHMETIC.match(line) and WIDE[self.lanes] not in line]


@pytest.fixture(scope="module")
def captured() -> dict[str, Program]:
    return programs()


@pytest.fixture(scope="module", params=SOME)
def compiled(request: pytest.FixtureRequest, captured: dict[str, Program]) -> Compiled:
    target = resolve_target(request.param, threads=2)
    if request.param in ONLY_CODES:
        captured = {name: captured[name] for name in captured if name.startswith("codes")}
    if not target.amx:  # whose tiles take windows of codes but for groups
        captured = {name: captured[name] for name in captured if name != "codes_groups"}
    lowered = cpu.lower(captured, target)
    text = cpu.generate(lowered.module, target).mod.imports[0].inspect_source("s")
    return Compiled(target.name, target.lanes, target.pairs, target.amx, lowered.kernels, functions(text))


def test_every_rule_is_looked_at(compiled: Compiled) -> None:
    named = set()
    for package in (rules, operators):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            named |= {
                value for name, value in vars(import_module(module.name)).items() if re.fullmatch(r"(\w+_)?RULE", name)
            }
    assert named == set(EXPECTED)
    used = {kernel.rule for kernel in compiled.kernels.values()}
    if compiled.level in ONLY_CODES:
        assert used >= {"integer-gemm", "integer-convolution"}
    else:
        assert used == (set(EXPECTED) if compiled.amx else set(EXPECTED) - set(AMX))


@pytest.mark.parametrize("rule", EXPECTED)
def test_no_library_is_called(compiled: Compiled, rule: str) -> None:
    """Tasks are started and workspace is asked for through pointers; everything else has a name."""
    for kernel, parts in compiled.of_rule(rule).items():
        named = {name for body in parts.values() for name in calls(body) if re.match(r"[A-Za-z_]\w*$", name)}
        named = {name for name in named if not name.startswith("__tvm_set_raised")}  # an error's message
        named -= {"syscall"} if rule in AMX else set()
        named -= {"memset", "memcpy", "memmove", *(f"x{number}" for number in range(31))}
        assert not named, kernel


def calls_pointers(body: tuple[str, ...]) -> bool:
    """Loops that do not may still load the address of what asks for workspace, for the next turn of an outer one."""
    return any(re.fullmatch(r"x\d+|[^A-Za-z_].*", name) for name in calls(body))


@pytest.mark.parametrize("rule", EXPECTED)
def test_workspace_is_asked_for_once_a_task_at_most(compiled: Compiled, rule: str) -> None:
    for kernel, parts in compiled.of_rule(rule).items():
        for body in parts.values():
            found = [line for line in body if "BackendAllocWorkspace" in line]
            assert not found or EXPECTED[rule].workspace, kernel
            inner = [loop.body for loop in loops(body) if loop.depth and calls_pointers(loop.body)]
            assert not [line for lines in inner for line in lines if line in found], kernel


@pytest.mark.parametrize("rule", [rule for rule, expected in EXPECTED.items() if expected.wide])
def test_loops_compute_in_the_widest_registers(compiled: Compiled, rule: str) -> None:
    for kernel, parts in compiled.of_rule(rule).items():
        for loop in innermost(parts):
            assert not compiled.narrow(loop.body), kernel


@pytest.mark.parametrize("rule", [rule for rule, expected in EXPECTED.items() if expected.accumulates])
def test_accumulators_stay_in_registers(compiled: Compiled, rule: str) -> None:
    """Loops of matrix products store nothing and read nothing back."""
    for kernel, parts in compiled.of_rule(rule).items():
        hot = products(parts) if rule in ("fused-attention", "recurrence") else hottest(parts)
        assert hot, kernel
        for loop in hot:
            assert not [line for line in loop.body if STORE.match(line) or SPILLED.match(line)], kernel
            assert not calls(loop.body), kernel


def test_tiles_have_the_size_that_was_chosen(compiled: Compiled) -> None:
    for kernel, parts in compiled.of_rule("packed-gemm").items():
        if not {"linear", "brain_linear"} & {
            *compiled.kernels[kernel].nodes
        }:  # one row alone is computed once and not eight times
            continue
        chosen = compiled.kernels[kernel].configuration
        tile = int(chosen["rows"]) * int(chosen["columns"]) // compiled.lanes * int(chosen["steps"])
        assert {count_fused(loop) for loop in hottest(parts)} == {tile}, kernel


def test_products_of_narrow_numbers_have_the_instruction_that_is_told(compiled: Compiled) -> None:
    """And roundings to bfloat16 one of theirs; what saturates is used nowhere."""
    every, used = set().union(*PRODUCTS.values()), set()
    for name, info in compiled.kernels.items():
        if info.rule == "low-bit":  # takes what the level has, VPMADDUBSW too where its bits cannot saturate
            continue
        lines = [line for body in kernel_functions(compiled.code, name).values() for line in body]
        found = {word for word in every if any(f"\t{word}\t" in line for line in lines)}
        told = PRODUCTS.get(str(info.configuration.get("products")), set())
        assert len(found) == bool(told) and found <= told, name
        assert not any("vpmaddubsw" in line for line in lines), name
        used |= found
    assert used == NARROW[compiled.level]
    if compiled.pairs:
        (kernel,) = (name for name, info in compiled.kernels.items() if "brain_chain" in info.nodes)
        body = [line for part in kernel_functions(compiled.code, kernel).values() for line in part]
        assert any("\tvcvtneps2bf16\t%zmm" in line for line in body)


def test_tiles_are_multiplied_in_a_loop_of_nothing_else(compiled: Compiled) -> None:
    """Four multiplications for four loads, whole or several times; no vector is touched, and sums stay in tiles."""
    for kernel, parts in compiled.of_rules(AMX).items():
        if not {"brain_deep", "codes_deep"} & {*compiled.kernels[kernel].nodes}:
            continue
        found = [loop for loop in innermost(parts) if any("\ttdp" in line for line in loop.body)]
        assert found, kernel
        for loop in found:
            counts = [sum(f"\t{word}" in line for line in loop.body) for word in ("tdp", "tileload", "tilestore")]
            assert counts[0] == counts[1] > 0 and counts[0] % 4 == 0 and not counts[2], kernel
            assert not calls(loop.body) and not [line for line in loop.body if re.search(r"%[xyz]mm", line)], kernel


def test_tiles_are_released_by_the_task_that_configured_them(compiled: Compiled) -> None:
    for kernel, parts in compiled.of_rules(AMX).items():
        for name, body in parts.items():
            words = [line.split()[0] for line in body if TILES.match(line)]
            if words:
                assert words[0] == "ldtilecfg" and words[-1] == "tilerelease", (kernel, name)
                assert words.count("ldtilecfg") == words.count("tilerelease") == 1, (kernel, name)


def innermost(parts: Mapping[str, tuple[str, ...]]) -> list[Loop]:
    return [loop for body in parts.values() for loop in loops(body) if loop.innermost]


def count_fused(loop: Loop) -> int:
    return sum(bool(FUSED.search(line)) for line in loop.body)


def products(parts: Mapping[str, tuple[str, ...]]) -> list[Loop]:
    """Loops of matrix products: most of what they do is multiply-adds, unlike in exponentials."""
    return [loop for loop in innermost(parts) if count_fused(loop) > 0.5 * len(loop.body)]


def hottest(parts: Mapping[str, tuple[str, ...]]) -> list[Loop]:
    """Innermost loops with at least half as many multiply-adds as any has."""
    found = innermost(parts)
    most = max((count_fused(loop) for loop in found), default=0)
    return [loop for loop in found if most and 2 * count_fused(loop) >= most]


def test_what_has_no_avx512_has_vex_encodings_alone(compiled: Compiled) -> None:
    """The very instruction that AVX512-VNNI brought, in the form that AVX-VNNI has."""
    if compiled.level == "cpu:x86-64-v3-vnni":
        lines = [line for body in compiled.code.values() for line in body]
        products = [line for line in lines if "vpdpbusd" in line]
        assert products and all(line.startswith("\t{vex}\tvpdpbusd\t") and "%ymm" in line for line in products)
        assert not [line for line in lines if re.search(r"%zmm|%[xy]mm(?:1[6-9]|[23]\d)|%k\d", line)]


@pytest.mark.slow
@pytest.mark.parametrize("level", [level for level, found in NARROW.items() if level in ONLY_CODES or len(found) == 1])
def test_every_tile_of_codes_stays_in_registers(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = resolve_target(level, threads=1)
    every = list(tiles(target, True, words_of(target).temporaries))
    shapes = [(tile.rows * 8, tile.vectors * target.lanes * 2) for tile in every]
    chosen = dict(zip(shapes, every, strict=True))

    def configure(target: Target, rows: int, n: int, k: int, temporaries: int) -> Configuration:
        return Configuration(chosen[rows, n], rows // 2, k, 1, 1)

    monkeypatch.setattr(integer_gemm, "configure", configure)
    cases = [
        (Codes(torch.ops.graphopt.qlinear, n, 1024), torch.ones(rows, 1024, dtype=torch.uint8)) for rows, n in shapes
    ]
    captured = {f"case{number}": capture(module, (x,)) for number, (module, x) in enumerate(cases)}
    lowered = cpu.lower(captured, target)
    code = functions(cpu.generate(lowered.module, target).mod.imports[0].inspect_source("s"))
    kernels = [name for name, info in lowered.kernels.items() if info.rule == "integer-gemm"]
    assert len(kernels) == len(every)
    for kernel in kernels:
        told = lowered.kernels[kernel].configuration
        for loop in hottest(kernel_functions(code, kernel)):
            assert count_fused(loop) % (int(told["rows"]) * int(told["columns"]) // target.lanes) == 0, told
            assert not [line for line in loop.body if STORE.match(line) or SPILLED.match(line)], told
