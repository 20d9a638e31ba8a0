"""Code for 64-bit Arm, run in an emulator: the numbers of a small model with a kernel of most rules.

The kernels are linked to a driver without TVM's runtime, which has no build for the emulator's machine here.
"""

from __future__ import annotations

import importlib.util
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

from graphopt.backends import cpu
from graphopt.backends.target import resolve_target
from graphopt.capture import capture

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
@pytest.mark.parametrize("level", ["cpu:aarch64", "cpu:cortex-a78ae"])
def test_a_small_model_in_an_emulator(level: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Small().eval(), torch.randn(2, 3, 17, 13)
    target = resolve_target(level, threads=2)
    lowered = cpu.lower({"main": capture(module, (x,))}, target)
    assert len({kernel.rule for kernel in lowered.kernels.values()}) >= 5
    cpu.generate(lowered.module, target).mod.imports[0].write_to_file(str(tmp_path / "kernels.o"), "o")
    arrays = [x.numpy(), *(lowered.weights[name] for name in lowered.arguments["main"])]
    assert all(array.dtype == np.float32 for array in arrays)
    (tmp_path / "calls.h").write_text("\n".join(written_calls(lowered.module["main"])))
    program = built_driver(tmp_path)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    done = subprocess.run([EMULATOR, program], input=data, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    result = np.frombuffer(done.stdout, np.float32).reshape(2, 7)
    with torch.no_grad():
        exact = module.double()(x.double()).numpy()
    assert np.abs(result - exact).max() < 1e-6


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
    yield "#define TENSOR(name, rank, ...) \\"
    yield "  static int64_t name##_shape[] = {__VA_ARGS__}; \\"
    yield "  static DLTensor name = {name##_data, {kDLCPU, 0}, rank, {kDLFloat, 32, 1}, name##_shape, NULL, 0};"
    names: dict[Any, str] = {}
    calls = []
    for parameter in main.params:
        names[parameter] = f"t{len(names)}"
        yield from tensor(names[parameter], parameter.ty.shape.values)
    for binding in (binding for block in main.body.blocks for binding in block.bindings):
        value, name = binding.value, f"t{len(names)}"
        names[binding.var] = name
        if value.op.name == "relax.reshape":
            yield from tensor(name, binding.var.ty.shape.values, names[value.args[0]])
            continue
        assert value.op.name == "relax.call_tir", value
        yield from tensor(name, binding.var.ty.shape.values)
        kernel, arguments = value.args[0].name_hint, [*(names[each] for each in value.args[1].fields), name]
        yield f"Kernel __tvm_ffi_{kernel};"
        calls.append(f"call(__tvm_ffi_{kernel}, {len(arguments)}, (DLTensor*[]){{&{', &'.join(arguments)}}});")
    yield f"static DLTensor* READ[] = {{&{', &'.join(names[each] for each in main.params)}}};"
    yield f"#define WRITE {names[main.body.body]}"
    yield f"#define CALLS {' '.join(calls)}"


def tensor(name: str, shape: Any, same: str = "") -> Iterator[str]:
    sizes = [int(size) for size in shape]
    if same:
        yield f"#define {name}_data {same}_data"
    else:
        yield f"static _Alignas(64) float {name}_data[{prod(sizes)}];"
    yield f"TENSOR({name}, {len(sizes)}, {', '.join(map(str, sizes))})"
