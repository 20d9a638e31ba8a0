"""Models as kernels for a GPU: run as loops, run emulated, and as machine code that is looked at and not run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.arrays import array_of, tensor_of
from graphopt.backends.cuda import family
from graphopt.backends.cuda.compiler import cubins, find_nvcc
from graphopt.backends.cuda.target import resolve_target
from graphopt.backends.tuner.store import Store
from graphopt.capture import capture
from graphopt.errors import ArtifactError, CompileError
from graphopt.program import Program
from graphopt.runtime.gpu import gpu_architecture
from graphopt.runtime.session import InferenceSession
from tests.backends.cuda.cases import CASES
from tests.backends.cuda.emulator import run_emulated
from tests.backends.cuda.loops import as_loops

NO_GPU = gpu_architecture() is None
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in ("mlp", "exact low bits")]


def check(session: InferenceSession, program: Program, feeds: list[tuple[Tensor, ...]], exact: bool) -> None:
    for feed in feeds:
        given = {spec.name: array_of(value) for spec, value in zip(program.inputs, feed, strict=True)}
        for spec, array, want in zip(program.outputs, session.run(None, given), program(*feed), strict=True):
            found = tensor_of(array, spec.dtype)
            if exact or not want.is_floating_point():
                assert torch.equal(found, want), spec.name
            else:
                assert torch.allclose(found, want, rtol=1e-4, atol=1e-5), spec.name


@pytest.mark.parametrize("name", ["mlp", "exact low bits", *SLOW])
def test_as_loops_kernels_compute_what_the_model_does(name: str, tmp_path: Path) -> None:
    program, feeds = CASES[name]()
    check(as_loops(program, Store(tmp_path)).session(), program, feeds, name.startswith("exact"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="emulated kernels are compiled by g++")
def test_libraries_run_whole_on_an_emulated_gpu(tmp_path: Path) -> None:
    assert run_emulated(tmp_path).splitlines() == list(CASES)


@pytest.mark.parametrize("target, arch", [("jetson-agx-orin", "sm_87"), ("cuda:sm_80", "sm_80")])
def test_artifacts_hold_machine_code_and_are_refused_without_a_gpu(target: str, arch: str, tmp_path: Path) -> None:
    program, _ = CASES["mlp"]()
    artifact = graphopt.compile(program, target, database=tmp_path)
    (variant,) = artifact.manifest.variants
    assert cubins(artifact.libraries[variant.library]) == (arch,)
    assert artifact.report["checked_on"].endswith("not on the target")
    assert variant.features[-1] == f"cuda:{arch}"
    if NO_GPU:
        with pytest.raises(ArtifactError, match=f"a GPU that runs code for {arch}, which"):
            artifact.session()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_87", "cuda:sm_90"])
def test_models_compile_to_machine_code(name: str, target: str, tmp_path: Path) -> None:
    artifact = graphopt.compile(CASES[name]()[0], target, database=tmp_path)
    (library,) = artifact.libraries.values()
    assert cubins(library) == (target.removeprefix("cuda:"),)


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None, reason="several architectures take nvcc")
def test_one_library_for_several_architectures(tmp_path: Path) -> None:
    artifact = graphopt.compile(CASES["mlp"]()[0], "cuda:sm_80+sm_90", database=tmp_path)
    (library,) = artifact.libraries.values()
    assert sorted(cubins(library)) == ["sm_80", "sm_90"]


def test_state_written_in_place_is_refused() -> None:
    class Cache(nn.Module):
        kept: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.zeros(4, 8))

        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            self.kept.index_copy_(0, at, x)
            return self.kept.sum(0)

    program = capture(Cache(), (torch.ones(1, 8), torch.tensor([2])))
    with pytest.raises(CompileError, match="state kept is written in place"):
        family.lower({"main": program}, resolve_target("cuda:sm_87"))


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="no NVIDIA GPU")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_models_compute_what_eager_does(name: str, tmp_path: Path) -> None:
    program, feeds = CASES[name]()
    major, minor = gpu_architecture() or (0, 0)
    artifact = graphopt.compile(program, f"cuda:sm_{major}{minor}", database=tmp_path)
    check(artifact.session(), program, feeds, name.startswith("exact"))
