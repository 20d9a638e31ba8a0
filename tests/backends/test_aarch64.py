"""Code for 64-bit Arm, run in an emulator: the numbers of a small model with a kernel of most rules.

The kernels are linked to a driver without TVM's runtime, which has no build for the emulator's machine here.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm_ffi
from torch import Tensor, nn

import graphopt
from graphopt.backends import cpu
from graphopt.backends.target import resolve_target
from graphopt.capture import capture
from tests.backends.rules.assembly import functions, kernel_functions

EMULATOR = "qemu-aarch64"
DRIVER = Path(__file__).with_name("aarch64_driver.c")
F = nn.functional


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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"needs {EMULATOR} (Debian: qemu-user)")
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the package ziglang")
@pytest.mark.parametrize("passes", ["O0", "mixed-precision{dtype=fp16}"])
@pytest.mark.parametrize("level", ["cpu:aarch64", "cpu:cortex-a78ae"])
def test_a_small_model_in_an_emulator(level: str, passes: str, tmp_path: Path) -> None:
    """In float32, and with weights in float16 that are widened as they are read."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 17, 13)
    program = graphopt.optimize(capture(Small().eval(), (x,)), passes, target=level).program
    target = resolve_target(level, threads=2)
    lowered = cpu.lower({"main": program}, target)
    assert len({kernel.rule for kernel in lowered.kernels.values()}) >= 5
    cpu.generate(lowered.module, target).mod.imports[0].write_to_file(str(tmp_path / "kernels.o"), "o")
    arrays = [x.numpy(), *(lowered.weights[name] for name in lowered.arguments["main"])]
    assert any(array.dtype == np.float16 for array in arrays) == (passes != "O0")
    (tmp_path / "calls.h").write_text("\n".join(written_calls(lowered.module["main"])))
    driver = built_driver(tmp_path)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    done = subprocess.run([EMULATOR, driver], input=data, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    result = np.frombuffer(done.stdout, np.float32).reshape(2, 7)
    exact = program.graph_module(x)[0]
    assert np.abs(result - exact.detach().numpy()).max() < 1e-6


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
    command = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static", "-O1", "-w"]
    command += [f"-I{include}", f"-I{folder}", str(DRIVER), str(folder / "kernels.o"), "-lm", "-o", str(folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def written_calls(main: Any) -> Iterator[str]:
    """calls.h: a buffer for each variable of the function, and its kernel calls in order."""
    yield "#define COUNT(t) ({ size_t n = 1; for (int i = 0; i < (t)->ndim; i++) n *= (t)->shape[i]; n; })"
    yield "#define TENSOR(name, bits, rank, ...) \\"
    yield "  static int64_t name##_shape[] = {__VA_ARGS__}; \\"
    yield "  static DLTensor name = {name##_data, {kDLCPU, 0}, rank, {kDLFloat, bits, 1}, name##_shape, NULL, 0};"
    names: dict[Any, str] = {}
    calls = []
    for parameter in main.params:
        names[parameter] = f"t{len(names)}"
        yield from tensor(names[parameter], parameter.ty)
    for binding in (binding for block in main.body.blocks for binding in block.bindings):
        value, name = binding.value, f"t{len(names)}"
        names[binding.var] = name
        if value.op.name == "relax.reshape":
            yield from tensor(name, binding.var.ty, names[value.args[0]])
            continue
        assert value.op.name == "relax.call_tir", value
        yield from tensor(name, binding.var.ty)
        kernel, arguments = value.args[0].name_hint, [*(names[each] for each in value.args[1].fields), name]
        yield f"Kernel __tvm_ffi_{kernel};"
        calls.append(f"call(__tvm_ffi_{kernel}, {len(arguments)}, (DLTensor*[]){{&{', &'.join(arguments)}}});")
    yield f"static DLTensor* READ[] = {{&{', &'.join(names[each] for each in main.params)}}};"
    yield f"#define WRITE {names[main.body.body]}"
    yield f"#define CALLS {' '.join(calls)}"


def tensor(name: str, kind: Any, same: str = "") -> Iterator[str]:
    sizes = [int(size) for size in kind.shape.values]
    width = np.dtype(str(kind.dtype)).itemsize
    if same:
        yield f"#define {name}_data {same}_data"
    else:
        yield f"static _Alignas(64) char {name}_data[{prod(sizes) * width}];"
    yield f"TENSOR({name}, {8 * width}, {len(sizes)}, {', '.join(map(str, sizes))})"
