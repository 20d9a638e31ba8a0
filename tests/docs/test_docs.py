"""Every python block of the documentation runs; the blocks of one page share their names."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def readers_model() -> dict[str, object]:
    """What the README takes from its reader: a model and inputs for it."""
    ids = torch.randint(0, 20, (2, 6))
    module = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 4))
    module.forward = lambda ids: module[1](module[0](ids))  # type: ignore[method-assign]
    return {"module": module.eval(), "ids": ids, "array": ids.numpy()}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    monkeypatch.chdir(tmp_path)
    if page.name == "README.md":
        module.__dict__.update(readers_model())
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        code = compile("\n" * line + block.group(1), str(page), "exec", dont_inherit=True)  # errors name page and line
        exec(code, module.__dict__)
