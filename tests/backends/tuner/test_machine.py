"""What a measurement says about the machine it was made on."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from graphopt.backends.tuner import machine
from graphopt.backends.tuner.record import Record, Workload
from graphopt.runtime.features import cpu_name


def test_a_record_of_this_machine() -> None:
    hardware = machine.this_hardware("cpu:x86-64-v3", 2)
    record = Record(Workload.of("gemm", {}), hardware, {}, 1e-5, 1e-5, machine.provenance())
    assert Record.from_line(record.to_line()[:-1]) == record
    assert abs(record.date - datetime.now(UTC)) < timedelta(days=1)
    assert {"device", "date", "graphopt", "tvm", "python"} <= set(record.provenance)
    assert machine.any_hardware("cpu:x86-64-v3", 2) == replace(hardware, features=())


def test_flags_of_the_kernel_do_not_key_a_record() -> None:
    x86 = ["fpu", "sse4_2", "sse4a", "avx2", "avx512_bf16", "amx_tile", "fma", "f16c", "bmi2", "x86_64"]
    x86 += ["smep", "sme", "hypervisor", "md_clear", "nx", "rdpid"]
    wanted = ("amx_tile", "avx2", "avx512_bf16", "bmi2", "f16c", "fma", "sse4_2", "sse4a", "x86_64")
    assert machine.instruction_sets(x86) == wanted
    arm = ["fp", "asimd", "fphp", "asimddp", "evtstrm", "cpuid", "atomics", "sve2", "i8mm", "lrcpc", "aarch64"]
    wanted_arm = ("aarch64", "asimd", "asimddp", "atomics", "fp", "fphp", "i8mm", "lrcpc", "sve2")
    assert machine.instruction_sets(arm) == wanted_arm


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("proc/device-tree", "sys/devices/system/cpu/cpu0/cpufreq"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def test_clocks_where_they_can_be_read(root: Path) -> None:
    assert machine.clocks(root) == {}
    (root / "proc/cpuinfo").write_text("cpu MHz\t\t: 2596.098\ncpu MHz\t\t: 3400.7\n")
    policy = root / "sys/devices/system/cpu/cpu0/cpufreq"
    (policy / "scaling_governor").write_text("powersave\n")
    (policy / "scaling_max_freq").write_text("3700000\n")
    assert machine.clocks(root) == {"clock_mhz": "3401", "governor": "powersave", "max_clock_mhz": "3700"}


def test_the_device(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_name(root) == "aarch64"
    (root / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson Orin Nano\0")
    assert cpu_name(root) == "NVIDIA Jetson Orin Nano"
    (root / "proc/cpuinfo").write_text("model\t\t: 17\nmodel name\t: AMD EPYC 9354\n")
    assert cpu_name(root) == "AMD EPYC 9354"
