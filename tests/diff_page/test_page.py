from __future__ import annotations

import json
import math
import re

from graphopt.diff_page import diff_page
from graphopt.diff_page.page import script_json
from tests.diff_page.conftest import Show
from tests.diff_page.graphs import chain

HOSTILE = "</script><script>alert(1)</script> \"'`${x}&amp; {{data}} ü 図 \u2028 \\"
OUTSIDE = re.compile(
    r"""https?:|//[a-z]|@import|url\(|<link[^>]+href="(?!data:)|\bsrc\s*=|\bfetch\(|XMLHttp|import\("""
)


def test_the_file_asks_for_nothing_else() -> None:
    html = diff_page(chain(3), chain(3, replaced=[1]))
    allowed = html.replace("http://www.w3.org/2000/svg", "")  # the name of a namespace
    assert not OUTSIDE.search(allowed), OUTSIDE.search(allowed)
    assert "default-src 'none'" in html


def test_json_in_a_script_cannot_end_it() -> None:
    text = script_json({"name": HOSTILE, "error": math.nan, "list": (1, math.inf)})
    assert text.isascii() and not set("<>&") & set(text)
    assert json.loads(text) == {"name": HOSTILE, "error": None, "list": [1, None]}


def test_equal_graphs_give_equal_bytes() -> None:
    assert diff_page(chain(9), chain(9, replaced=[4])) == diff_page(chain(9), chain(9, replaced=[4]))


def test_names_are_shown_as_they_are(show: Show) -> None:
    a, b = chain(3), chain(3, replaced=[1])
    for node in b.graph_module.graph.nodes:
        node.meta["nn_module_stack"] = {"": (HOSTILE, "Layer")}
    browser = show(diff_page(a, b, titles=(HOSTILE, "b")))
    assert browser.value("document.querySelector('#head-a').textContent") == f"A  {HOSTILE}"
    browser.click('[data-side="b"][data-place="2"]')
    assert browser.value("[...document.querySelectorAll('#panel dd')].map(e => e.textContent)").count(HOSTILE) == 1
    assert browser.value("document.title") == re.sub(r"[ \n]+", " ", f"{HOSTILE} and b")
