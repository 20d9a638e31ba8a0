"""Make the picture of the user guide: python -m tests.diff_page.screenshot docs/graph-diff.png"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from graphopt.diff_page import diff_page
from tests.diff_page.browser import Browser, find_browser
from tests.diff_page.graphs import optimized
from tests.models import program

SIZE = (1440, 680)
COLOURS = 64  # a tenth of the bytes, and no difference to the eye


def main(target: str) -> None:
    """An optimized ResNet with one of its folded batch norms chosen."""
    better, report = optimized("resnet")
    found = find_browser()
    if found is None:
        raise SystemExit("no browser: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Path(folder, "page.html")
        titles = "resnet.pt2", "better.pt2"
        page.write_text(diff_page(program("resnet"), better, report=report, titles=titles), encoding="utf-8")
        with Browser(found, Path(folder, "profile")) as browser:
            browser.resize(*SIZE)
            browser.open(page)
            browser.scheme("light")
            browser.click('.cell[data-side="b"].state-changed:not(.weight)')
            picture = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
