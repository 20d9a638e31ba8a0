"""Projects in C++ to ship, built with the system's compiler and run without Python."""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.package.cpp_project import write_cpp_project
from tests.emulation import Runner, build
from tests.models import counter
from tests.tools.conftest import Cli

X = np.linspace(-3, 3, 40, dtype=np.float32).reshape(5, 8)
TWICE = """
#include <cstdio>
#include <graphopt/graphopt.hpp>
int main(int, char** words) {
  graphopt::Session session(words[1], 1);
  for (int round = 0; round < 5; ++round) {
    if (round == 3) session.reset();
    auto x = graphopt::Tensor::zeros("float32", {1, 4});
    for (int i = 0; i < 4; ++i) x.as<float>()[i] = i + round;
    for (auto& [name, y] : session.run({{"x", x}})) std::printf("%.9g %.9g\\n", y.as<float>()[0], y.as<float>()[3]);
  }
}
"""
THREADS = """
#include <cstdio>
#include <graphopt/graphopt.hpp>
#include <thread>
int main(int, char** words) {
  for (int threads : {1, 2}) {
    std::thread([=] {
      graphopt::Session session(words[1], threads);
      auto [feed, expected] = session.samples();
      std::printf("%d %zu\\n", threads, session.run(feed).size());
      try {
        graphopt::Session(words[1], 3).run(feed);
      } catch (const graphopt::Error& error) {
        std::puts(error.what());
      }
    }).join();
  }
}
"""


@pytest.fixture(scope="module")
def folder(artifact: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpp") / "shipped"
    write_cpp_project(artifact, str(folder))
    build(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Runner:
    return Runner(folder / "run", emulated=False)


def test_outputs_are_those_of_the_session(artifact: str, folder: Path, run: Runner, tmp_path: Path) -> None:
    for rows in (1, 5, 64):
        x = np.random.default_rng(rows).standard_normal((rows, 8), np.float32)
        found = run(folder / "model.gopt", {"x": x}, tmp_path)
        np.testing.assert_array_equal(found["output"], graphopt.load(artifact).run(None, {"x": x})[0])


def test_the_sample_inside(folder: Path, run: Runner, tmp_path: Path) -> None:
    done = run.raw(folder / "model.gopt", {}, tmp_path)
    assert done.stdout == "output float32 [3, 16], largest difference 0\n", done.stderr


class Floats(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [(2 * x).to(dtype) for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)]


def test_distances_are_those_of_numbers(folder: Path, run: Runner, tmp_path: Path) -> None:
    """Of floats of any width; NaN beside another number is no small distance, and beside NaN none."""
    x = np.array([1.5, -0.25, 2.0**-16], np.float32)
    artifact = graphopt.compile(graphopt.capture(Floats(), (torch.from_numpy(x),)), threads=1)

    def told(given: np.ndarray, expected: np.ndarray) -> list[str]:
        """What is said of the outputs, by which the recorded ones differ."""
        kinds = {name: array.dtype for name, array in artifact.check.items() if ".output." in name}
        check = {name: expected.astype(dtype) for name, dtype in kinds.items()}
        replace(artifact, check={**check, "main.input.x": given}).save(tmp_path / "floats.gopt")
        done = run.raw(tmp_path / "floats.gopt", {}, tmp_path)
        assert done.stdout.count("\n") == len(check), done
        return [line.rpartition(" ")[2] for line in done.stdout.splitlines()]

    assert told(x, 2 * x) == ["0"] * 4
    assert told(x, np.array([3, 0, 0], np.float32)) == ["0.5"] * 4
    nan, infinite = np.float32("nan"), np.float32("inf")
    assert told(x, np.array([nan, 9, 0], np.float32)) == ["nan"] * 4
    assert told(np.array([nan, infinite, 4], np.float32), np.array([nan, infinite, 7], np.float32)) == ["1"] * 4
    assert told(x, np.array([3, -infinite, 0], np.float32)) == ["inf"] * 4


@pytest.mark.parametrize(
    ("feed", "words"),
    [
        (X.astype(np.float64), "does not hold float32"),
        (X[0], "input x has shape [8], expected [rows, 8]"),
        (X[:, :7], "expected [rows, 8]"),
        (np.ones((65, 8), np.float32), "size rows is 65 in input x; it can be from 1 to 64"),
    ],
)
def test_a_feed_that_does_not_fit(folder: Path, run: Runner, tmp_path: Path, feed: np.ndarray, words: str) -> None:
    refused(run.raw(folder / "model.gopt", {"x": np.ascontiguousarray(feed)}, tmp_path), words)


def test_an_unknown_input(folder: Path, run: Runner, tmp_path: Path) -> None:
    refused(run.raw(folder / "model.gopt", {"y": X}, tmp_path), "there is no input y")


def refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr, done
    assert done.stderr.count("\n") == 1


def test_an_altered_artifact(folder: Path, run: Runner, tmp_path: Path) -> None:
    data = (folder / "model.gopt").read_bytes()
    step = len(data) // 40
    for position in range(100, len(data), step):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        (tmp_path / "bad.gopt").write_bytes(changed)
        done = run.raw(tmp_path / "bad.gopt", {}, tmp_path)
        assert done.returncode in (0, 2), done
        assert done.returncode or "largest difference 0\n" in done.stdout, done
    for size in (0, 3, 1000, len(data) - 1):
        (tmp_path / "bad.gopt").write_bytes(data[:size])
        assert run.raw(tmp_path / "bad.gopt", {}, tmp_path).returncode == 2


def test_a_cpu_that_lacks_features(folder: Path, run: Runner, tmp_path: Path) -> None:
    """One that no machine has, in place of one of equal length."""
    feature = {"x86_64": b'"bmi2"', "aarch64": b'"asimd"'}[platform.machine()]
    with_manifest(folder / "model.gopt", tmp_path / "other.gopt", {feature: feature.replace(b"i", b"y")})
    words = "the artifact was compiled for another CPU: cpu:"
    refused(run.raw(tmp_path / "other.gopt", {}, tmp_path), words)


def test_a_variant_that_lacks_an_entry(folder: Path, run: Runner, tmp_path: Path) -> None:
    names = {b'"weights": {\n    "main"': b'"weights": {\n    "mine"'}
    with_manifest(folder / "model.gopt", tmp_path / "other.gopt", names)
    refused(run.raw(tmp_path / "other.gopt", {}, tmp_path), "lacks entry main; get the artifact again")


def with_manifest(model: Path, changed: Path, words: Mapping[bytes, bytes]) -> None:
    """The artifact with words of its manifest replaced by equally long ones, and the checksum with them."""
    with zipfile.ZipFile(model) as archive:
        before = archive.read("manifest.json")
    after = before
    for found, other in words.items():
        assert found in before and len(found) == len(other), before
        after = after.replace(found, other)
    old, new = (struct.pack("<I", zlib.crc32(each)) for each in (before, after))
    changed.write_bytes(model.read_bytes().replace(before, after).replace(old, new))


@pytest.mark.slow
def test_every_calling_thread_has_its_own_threads(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "main.cpp").write_text(THREADS)
    build(tmp_path / "other", "c++ -pthread")
    done = subprocess.run([tmp_path / "other" / "run", folder / "model.gopt"], capture_output=True, text=True)
    refusal = "sessions of one calling thread use equally many threads: this one 3, those before it "
    assert done.stdout.splitlines() == ["1 1", f"{refusal}1", "2 1", f"{refusal}2"], done


@pytest.mark.slow
def test_another_tvm_ffi(folder: Path, tmp_path: Path) -> None:
    """A program built for another version than that of the library that it finds."""
    shutil.copytree(folder, tmp_path / "other")
    header = tmp_path / "other" / "include" / "tvm" / "ffi" / "c_api.h"
    header.write_text(header.read_text().replace("TVM_FFI_VERSION_MINOR 1", "TVM_FFI_VERSION_MINOR 2"))
    build(tmp_path / "other")
    done = subprocess.run([tmp_path / "other" / "run", folder / "model.gopt"], capture_output=True, text=True)
    refused(done, "and this program was built for 0.2.")


def test_a_compiler_for_another_machine(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    about = tmp_path / "other" / "include" / "graphopt" / "made_for.hpp"
    about.write_text(about.read_text().replace("__x86_64__", "__riscv__").replace("__aarch64__", "__riscv__"))
    command = ["sh", str(tmp_path / "other" / "build.sh")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "this folder was made for" in done.stderr


@pytest.mark.slow
def test_cmake(artifact: str, tmp_path: Path) -> None:
    write_cpp_project(artifact, str(tmp_path / "shipped"))
    if shutil.which("cmake") is None:
        build(tmp_path / "shipped")
        program = tmp_path / "shipped" / "run"
    else:
        for command in (["cmake", "-S", "shipped", "-B", "build"], ["cmake", "--build", "build"]):
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        program = tmp_path / "build" / "run"
    found = Runner(program, emulated=False)(tmp_path / "shipped" / "model.gopt", {"x": X}, tmp_path)
    np.testing.assert_array_equal(found["output"], graphopt.load(artifact).run(None, {"x": X})[0])


@pytest.mark.slow
def test_state_is_carried_and_reset(tmp_path: Path) -> None:
    module, examples, _ = counter()
    path = tmp_path / "counter.gopt"
    graphopt.compile(graphopt.capture(module, (examples[0][:1],)), threads=1).save(path)
    write_cpp_project(path, str(tmp_path / "shipped"))
    (tmp_path / "shipped" / "main.cpp").write_text(TWICE)
    build(tmp_path / "shipped")
    done = subprocess.run([tmp_path / "shipped" / "run", path], capture_output=True, text=True)
    session = graphopt.load(path, threads=1)
    expected = []
    for number in range(5):
        if number == 3:
            session.reset()
        (y,) = session.run(None, {"x": (np.arange(4, dtype=np.float32) + number)[None]})
        expected.append((y[0, 0], y[0, 3]))
    found = [tuple(map(np.float32, line.split())) for line in done.stdout.splitlines()]
    assert found == expected, done.stderr


def test_both_kinds_at_once(cli: Cli, artifact: str, tmp_path: Path) -> None:
    outcome = cli("package", artifact, "--python", "python", "--cpp", "cpp", "--json")
    assert [row["kind"] for row in outcome.json] == ["python", "cpp"], outcome.err
    assert (tmp_path / "cpp" / "CMakeLists.txt").exists() and (tmp_path / "python" / "run.py").exists()
