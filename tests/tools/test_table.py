from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from graphopt.tools.table import format_bytes, format_shape, format_table, write_json


def test_numbers_stand_to_the_right() -> None:
    rows = [{"name": "a", "count": 5, "on": True}, {"name": "long", "count": 12345, "on": False}]
    assert format_table(rows).splitlines() == ["name  count  on", "a         5  yes", "long  12345  no"]


def test_missing_cells_are_empty() -> None:
    assert format_table([{"a": 1, "b": "x"}, {"a": 2}]).splitlines() == ["a  b", "1  x", "2"]


def test_no_rows() -> None:
    assert format_table([]) == "(none)"


@pytest.mark.parametrize(("count", "text"), [(7, "7 B"), (2048, "2.0 kB"), (5 << 20, "5.0 MB"), (3 << 30, "3.0 GB")])
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_shapes() -> None:
    assert [format_shape(s) for s in ((1, 128), ("batch", 8), ())] == ["1x128", "batch x 8", "scalar"]


def test_json_to_a_file_keeps_the_table(tmp_path: Path) -> None:
    write_json(argparse.Namespace(json=str(tmp_path / "a.json")), {"a": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
