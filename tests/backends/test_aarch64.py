"""Code for 64-bit Arm, run in an emulator: a small model with a kernel of most rules, and exact sums of codes.

The kernels are linked to a driver without TVM's runtime, which has no build for the emulator's machine here.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
import tvm_ffi
from torch import Tensor, nn

import graphopt
from graphopt.backends import cpu
from graphopt.backends.rules.integer_gemm import words_of
from graphopt.backends.target import resolve_target
from graphopt.capture import capture
from graphopt.program import Program
from tests.backends.rules.assembly import functions, kernel_functions
from tests.backends.rules.test_integer_products import NUMBER, codes, frozen, qconv, qlinear

EMULATOR = "qemu-aarch64"
COMPILER = "aarch64-linux-gnu-gcc"
CPUS = {"cpu:aarch64": "cortex-a53", "cpu:cortex-a78ae": "cortex-a76", "cpu:armv8.6-a": "max"}  # with no more than that
DRIVER = Path(__file__).with_name("aarch64_driver.c")
F = nn.functional


def with_emulator(test: Callable[..., None]) -> Callable[..., None]:
    test = pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"needs {EMULATOR} (Debian: qemu-user)")(test)
    return pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the package ziglang")(test)


class Small(nn.Module):
    """Convolutions, then attention over the pixels, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 20, 3, stride=2, padding=1), nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.norm, self.merged, self.head = nn.LayerNorm(20), nn.Linear(20, 60), nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.gelu(self.stem(x))).flatten(2).transpose(1, 2)
        batch, rows, _ = x.shape
        q, k, v = self.merged(self.norm(x)).view(batch, rows, 3, 2, 10).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, rows, 20)
        return torch.softmax(torch.tanh(self.head((x + y).mean(1))), -1)


class Sums(nn.Module):
    """int32 sums of codes as float32: tails of rows, columns and depth, as far from 0 as they can be, and windows."""

    SHAPES = ((1, 1), (3, 15), (33, 47), (512, 48), (130, 97))
    WINDOWS = ((16, 24, 1, 1, 0, 1), (3, 16, 5, 2, 2, 1), (16, 33, 3, 1, 1, 1), (16, 32, 3, 1, 1, 4))

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([frozen(codes(n, k, dtype=torch.int8, seed=k)) for k, n in self.SHAPES])
        self.deep = nn.ParameterList([frozen(torch.full((3, 65536), w).to(torch.int8)) for w in (127, -127, -128)])
        self.filters = nn.ParameterList(
            [
                frozen(codes(outputs, inputs // groups, size, size, dtype=torch.int8, seed=size))
                for inputs, outputs, size, _, _, groups in self.WINDOWS
            ]
        )
        self.register_buffer("one", torch.tensor(1.0))
        self.register_buffer("zero", torch.tensor(101, dtype=torch.int32))

    def forward(self, x: Tensor, full: Tensor, image: Tensor) -> Tensor:
        zero, rest = self.zero.to(x.dtype), (self.one, None, *(None,) * 5)
        found = [qlinear(x[:, : w.shape[1]], self.one, zero, w, *rest, **NUMBER) for w in self.weights]
        found += [qlinear(full, self.one, None, w, *rest, **NUMBER) for w in self.deep]
        for filters, (inputs, _, _, stride, pad, groups) in zip(self.filters, self.WINDOWS, strict=True):
            window = {"stride": [stride] * 2, "padding": [pad] * 2, "dilation": [1, 1], "groups": groups}
            found.append(qconv(image[:, :inputs], self.one, zero, filters, *rest, **window, **NUMBER))
        return torch.cat([each.flatten() for each in found])


@pytest.mark.slow
@with_emulator
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("level", CPUS)
def test_sums_of_codes_in_an_emulator(level: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit those of the specification."""
    furthest = 255 if dtype == torch.uint8 else -128
    inputs = (codes(7, 512, dtype=dtype), torch.full((5, 65536), furthest).to(dtype), codes(2, 16, 9, 11, dtype=dtype))
    program = graphopt.optimize(capture(Sums().eval(), inputs), "O1", target=level).program
    result, lowered = emulated(program, level, inputs, tmp_path)
    found = {(kernel.rule, kernel.configuration.get("products")) for kernel in lowered.kernels.values()}
    products = words_of(resolve_target(level)).products
    assert {("integer-gemm", products), ("integer-convolution", products)} <= found
    np.testing.assert_array_equal(np.frombuffer(result, np.float32), program.graph_module(*inputs)[0].numpy())


@pytest.mark.slow
@with_emulator
@pytest.mark.parametrize("passes", ["O0", "mixed-precision{dtype=fp16}"])
@pytest.mark.parametrize("level", CPUS)
def test_a_small_model_in_an_emulator(level: str, passes: str, tmp_path: Path) -> None:
    """In float32, and with weights in float16 that are widened as they are read."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 17, 13)
    program = graphopt.optimize(capture(Small().eval(), (x,)), passes, target=level).program
    found, lowered = emulated(program, level, (x,), tmp_path)
    assert len({kernel.rule for kernel in lowered.kernels.values()}) >= 5
    assert any(array.dtype == np.float16 for array in lowered.weights.values()) == (passes != "O0")
    result = np.frombuffer(found, np.float32).reshape(2, 7)
    exact = program.graph_module(x)[0]
    assert np.abs(result - exact.detach().numpy()).max() < 1e-6


def emulated(program: Program, level: str, inputs: Sequence[Tensor], folder: Path) -> tuple[bytes, cpu.Module]:
    """The bytes of the program's result on a CPU that has what the level asks for, and what ran there."""
    target = resolve_target(level, threads=2)
    lowered = cpu.lower({"main": program}, target)
    cpu.generate(lowered.module, target).mod.imports[0].write_to_file(str(folder / "kernels.o"), "o")
    arrays = [*(x.numpy() for x in inputs), *(lowered.weights[name] for name in lowered.arguments["main"])]
    (folder / "calls.h").write_text("\n".join(written_calls(lowered.module["main"])))
    driver = built_driver(folder)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    done = subprocess.run([EMULATOR, "-cpu", CPUS[level], driver], input=data, capture_output=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stderr.decode())
    return done.stdout, lowered


def test_weights_in_float16_are_widened_and_summed_in_float32() -> None:
    """FCVTL before FMLA of four float32; nothing is multiplied in float16, whose sums would have 11 bits."""
    weight = torch.randn(96, 64).half()
    program = capture(Halves(weight).eval(), (torch.randn(64, 64),))
    target = resolve_target("cpu:cortex-a78ae", threads=1)
    lowered = cpu.lower({"main": program}, target)
    code = functions(cpu.generate(lowered.module, target).mod.imports[0].inspect_source("s"))
    (kernel,) = (name for name, info in lowered.kernels.items() if info.rule == "packed-gemm")
    lines = [line for body in kernel_functions(code, kernel).values() for line in body]
    assert any("\tfcvtl" in line for line in lines) and any("\tfmla\t" in line and ".4s" in line for line in lines)
    assert not [line for line in lines if re.search(r"\tf(?:mla|mul|add)\S*\t.*\.[48]h", line)]


class Halves(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float())


def built_driver(folder: Path) -> Path:
    include = Path(tvm_ffi.__file__).parent / "include"
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl"]  # which first builds a C library
    command = [COMPILER] if shutil.which(COMPILER) else zig
    command += ["-static", "-O1", "-w", f"-I{include}", f"-I{folder}", str(DRIVER), str(folder / "kernels.o"), "-lm"]
    command += ["-o", str(folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def written_calls(main: Any) -> Iterator[str]:
    """calls.h: a buffer for each variable of the function, and its kernel calls in order."""
    yield "#define COUNT(t) ({ size_t n = 1; for (int i = 0; i < (t)->ndim; i++) n *= (t)->shape[i]; n; })"
    yield "#define TENSOR(name, kind, bits, rank, ...) \\"
    yield "  static int64_t name##_shape[] = {__VA_ARGS__}; \\"
    yield "  static DLTensor name = {name##_data, {kDLCPU, 0}, rank, {kind, bits, 1}, name##_shape, NULL, 0};"
    names: dict[Any, str] = {}
    calls = []
    for parameter in main.params:
        names[parameter] = f"t{len(names)}"
        yield from tensor(names[parameter], parameter.ty)
    for binding in (binding for block in main.body.blocks for binding in block.bindings):
        value, name = binding.value, f"t{len(names)}"
        names[binding.var] = name
        if isinstance(value, tvm.ir.TupleGetItem):
            names[binding.var] = f"{names[value.tuple_value]}_{value.index}"
            continue
        if value.op.name == "relax.reshape":
            yield from tensor(name, binding.var.ty, names[value.args[0]])
            continue
        assert value.op.name == "relax.call_tir", value
        several = isinstance(binding.var.ty, tvm.ir.TupleType)
        results = {f"{name}_{n}": kind for n, kind in enumerate(binding.var.ty.fields)} if several else {}
        for result, kind in (results or {name: binding.var.ty}).items():
            yield from tensor(result, kind)
        kernel = value.args[0].name_hint
        arguments = [*(names[each] for each in value.args[1].fields), *(results or [name])]
        yield f"Kernel __tvm_ffi_{kernel};"
        calls.append(f"call(__tvm_ffi_{kernel}, {len(arguments)}, (DLTensor*[]){{&{', &'.join(arguments)}}});")
    yield f"static DLTensor* READ[] = {{&{', &'.join(names[each] for each in main.params)}}};"
    yield f"#define WRITE {names[main.body.body]}"
    yield f"#define CALLS {' '.join(calls)}"


def tensor(name: str, kind: Any, same: str = "") -> Iterator[str]:
    sizes, dtype = [int(size) for size in kind.shape.values], np.dtype(str(kind.dtype))
    width, code = dtype.itemsize, {"f": "kDLFloat", "i": "kDLInt", "u": "kDLUInt"}[dtype.kind]
    if same:
        yield f"#define {name}_data {same}_data"
    else:
        yield f"static _Alignas(64) char {name}_data[{prod(sizes) * width}];"
    yield f"TENSOR({name}, {code}, {8 * width}, {len(sizes)}, {', '.join(map(str, sizes))})"
