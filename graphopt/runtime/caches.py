"""How large the caches of this machine are."""

from __future__ import annotations

import re
from pathlib import Path

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
USUAL = {1: 32 << 10, 2: 1 << 20, 3: 32 << 20}  # bytes, where the system does not say


def cache_sizes(folder: Path = CACHES) -> dict[int, int]:
    """Bytes of the data cache of each level, as the system describes the first CPU."""
    found: dict[int, int] = {}
    for index in sorted(folder.glob("index*")):
        try:
            kind, level, text = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        size = re.fullmatch(r"(\d+)([KM])", text)
        if kind != "Instruction" and size and level in ("1", "2", "3"):
            found[int(level)] = int(size[1]) << {"K": 10, "M": 20}[size[2]]
    return found or dict(USUAL)
