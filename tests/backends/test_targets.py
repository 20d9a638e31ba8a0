"""The table of devices: each one compiles or says why not, and the list says what is missing here."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
from typing import Any

import pytest

import graphopt
from graphopt.backends.target import LEVELS, resolve_target
from graphopt.backends.targets import DEVICES, ability
from graphopt.errors import UnknownNameError, UsageError
from graphopt.package.libraries import elf_machine
from tests.models import program

GPUS = [device.name for device in DEVICES.values() if device.on_gpu]


def test_each_device_is_compiled_as_a_level() -> None:
    for device in DEVICES.values():
        assert device.level in LEVELS or (device.level is None and device.on_gpu)
        assert device.cuda is None or re.fullmatch(r"sm_\d+", device.cuda)
        assert device.name not in LEVELS
        if not device.on_gpu:
            assert resolve_target(device.name, 3) == resolve_target(str(device.level), 3)


def test_work_is_cut_for_the_cores_of_a_device() -> None:
    assert resolve_target("raspberry-pi-5").threads == 4
    assert resolve_target("raspberry-pi-5", 2).threads == 2


@pytest.mark.parametrize("name", GPUS)
def test_devices_that_run_on_a_gpu_have_no_kernels_for_a_cpu(name: str) -> None:
    with pytest.raises(UsageError, match=f"target {name} runs on a GPU .*, and this is for CPUs"):
        resolve_target(name)
    assert graphopt.optimize(program("mlp"), "O1", target=name).report.target == name


@pytest.mark.parametrize("name", ["cuda:sm_91", "jetson-orin-nan", "cpu:zen3"])
def test_names_that_are_not_in_the_table(name: str) -> None:
    with pytest.raises(UnknownNameError, match="did you mean"):
        graphopt.compile(program("mlp"), name)


def test_optimizing_for_a_device_is_for_its_cpu() -> None:
    assert graphopt.optimize(program("mlp"), "O1", target="raspberry-pi-5").report.target == "cpu:cortex-a78ae"


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    here = (platform.machine(), "made-up")
    assert ability(here).run == "a CPU with made-up" and "--rpc" in ability(here).tune
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = ability(("riscv64",))
    assert found.run == "a machine with riscv64"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ziglang" else find_spec(name))
    assert ability(("riscv64",)).build == "run: pip install ziglang, or install gcc-riscv64-linux-gnu"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "graphopt[compile]"' in ability(("riscv64",)).build


@pytest.mark.slow
@pytest.mark.parametrize("name", LEVELS)
def test_each_level_compiles_a_small_model(name: str) -> None:
    """And so each device, which is one of them."""
    artifact: Any = graphopt.compile(program("conv_net"), name, threads=2)
    machine = resolve_target(name).machine
    assert [elf_machine(library) for library in artifact.libraries.values()] == [machine]
    assert not artifact.report["slow"]
