"""The records that ship: whole, gaining, and of no model that graphopt's speed is measured on."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt import capture
from graphopt.backends.tuner.record_file import write_whole
from graphopt.backends.tuner.store import SHIPPED, parse, shipped
from graphopt.tools.tuning import common_shapes


def test_every_record_that_ships_gains() -> None:
    found = shipped()
    assert found.records and not found.damaged
    assert all(record.ratio < common_shapes.GAIN for record in found.records)
    assert SHIPPED.stat().st_size < 100 << 10


@pytest.mark.parametrize("layers", common_shapes.LAYERS, ids=lambda layers: layers.name)
def test_layers_can_be_captured(layers: common_shapes.Layers) -> None:
    program = capture(layers.build().eval(), layers.inputs, dynamic_shapes=layers.dynamic)
    (result,) = program(*layers.inputs)
    assert result.isfinite().all()


def test_filling_keeps_what_is_there_and_what_gains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present = shipped().records
    write_whole(tmp_path / "common.jsonl", b"".join(record.to_line() for record in present[1:]))
    monkeypatch.setattr(common_shapes, "SHIPPED", tmp_path / "common.jsonl")
    monkeypatch.setattr(common_shapes, "tuned", lambda seconds, target, threads: iter(present[:2]))
    monkeypatch.setattr(common_shapes, "benchmark_workloads", lambda target, threads: set())
    assert common_shapes.fill(1.0, "cpu", 2) == 1
    written = parse((tmp_path / "common.jsonl").read_bytes())
    assert {record.to_line() for record in written.records} == {record.to_line() for record in present}
    first = present[0].workload.key
    write_whole(tmp_path / "common.jsonl", b"")
    monkeypatch.setattr(common_shapes, "benchmark_workloads", lambda target, threads: {first})
    common_shapes.fill(1.0, "cpu", 2)
    left = parse((tmp_path / "common.jsonl").read_bytes()).records
    assert [record.workload.key for record in left] == [present[1].workload.key]


@pytest.mark.slow
def test_no_record_is_of_a_model_that_is_measured() -> None:
    keys = {record.workload.key for record in shipped().records}
    assert not keys & common_shapes.benchmark_workloads("cpu", 2)
