"""The browser, started once for all tests of a worker; where none is installed they are skipped, and fail in CI."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.diff_page.browser import Browser, find_browser

Show = Callable[[str], Browser]


@pytest.fixture(scope="session")
def one_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("no browser: apt-get install chromium")
        pytest.skip("no browser: apt-get install chromium")
    with Browser(program, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def show(one_browser: Browser, tmp_path: Path) -> Iterator[Show]:
    """show(html) -> the browser with that page; it must not complain, and must ask for nothing but the page."""
    pages: list[Path] = []

    def open_page(html: str) -> Browser:
        pages.append(tmp_path / f"page_{len(pages)}.html")
        pages[-1].write_text(html, encoding="utf-8")
        one_browser.open(pages[-1])
        return one_browser

    one_browser.problems.clear()
    one_browser.requests.clear()
    yield open_page
    one_browser.settle()
    assert one_browser.problems == []
    assert [url for url in one_browser.requests if not url.startswith("data:")] == [page.as_uri() for page in pages]
