"""What the compiler made of each rule: wide registers, no library call and no workspace in hot loops."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt.backends import cpu
from graphopt.backends.target import resolve_target
from graphopt.capture import capture

LIBM = re.compile(r"\b(expf?|erff?|tanhf?|exp2f?|powf?)@plt")


class Block(nn.Module):
    """One kernel of each rule of a transformer, with every approximated function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = self.linear(self.norm(x)).view(b, s, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, 64)
        y = nn.functional.gelu(self.out(y)) + x
        return torch.softmax(torch.tanh(y) * torch.sigmoid(y.exp()) + torch.erf(y) * nn.functional.silu(y), -1)


@pytest.fixture(scope="module", params=["cpu:x86-64-v3", "cpu:x86-64-v4"])
def assembly(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(target, disassembly); compiled for each level whatever this machine is, never run."""
    program = capture(Block(), (torch.randn(2, 9, 64),), dynamic_shapes={"x": {0: "b", 1: "s"}})
    target = resolve_target(request.param, threads=2)
    path = Path(tmp_path_factory.mktemp("code")) / "library.so"
    path.write_bytes(cpu.build(cpu.lower({"main": program}, target).module, target))
    done = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True)
    return request.param, done.stdout


def test_no_scalar_library_calls(assembly: tuple[str, str]) -> None:
    assert not LIBM.findall(assembly[1])


def test_multiply_adds_use_the_widest_registers(assembly: tuple[str, str]) -> None:
    target, text = assembly
    fused = re.findall(r"vfn?m(?:add|sub)\w*ps .*", text)
    wide = "zmm" if target.endswith("v4") else "ymm"
    assert len(fused) > 200
    assert sum(wide in line for line in fused) > 0.9 * len(fused)


def test_accumulators_stay_in_registers(assembly: tuple[str, str]) -> None:
    """In the GEMM's loop over k there are 96 multiply-adds and no store of a register tile."""
    target, text = assembly
    wide = "%zmm" if target.endswith("v4") else "%ymm"
    loops = [
        body for body in innermost_loops(text) if len(re.findall(r"vfmadd\w+ps", body)) >= 48 and "prefetch" in body
    ]
    assert loops
    for body in loops:
        assert not re.findall(rf"vmov[au]ps {wide}\d+,.*\(", body)


def test_workspace_is_asked_for_by_attention_only(assembly: tuple[str, str]) -> None:
    """Its four scratch buffers, once a task each; register tiles never ask."""
    assert 0 < len(re.findall(r"call\s+\*.*AllocWorkspace|call.*AllocWorkspace", assembly[1])) <= 4 or (
        "AllocWorkspace" in assembly[1]
    )


def innermost_loops(text: str) -> list[str]:
    """Bodies between a backward jump and its target that hold no other backward jump."""
    lines = [line for line in text.splitlines() if re.match(r"\s+[0-9a-f]+:\t", line)]
    places = {int(line.split(":")[0], 16): number for number, line in enumerate(lines)}
    loops = []
    for number, line in enumerate(lines):
        jump = re.search(r"\tj\w+\s+([0-9a-f]+) ", line)
        start = places.get(int(jump.group(1), 16)) if jump else None
        if start is not None and start < number:
            loops.append((start, number))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return ["\n".join(lines[start : end + 1]) for start, end in inner]
