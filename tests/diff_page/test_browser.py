"""The page as somebody uses it: looked at, clicked on, searched."""

from __future__ import annotations

import functools
import zlib
from typing import Any

from graphopt.diff_page import diff_page
from tests.diff_page.conftest import Show
from tests.diff_page.graphs import chain, optimized
from tests.models import program

LONG = 2000


@functools.cache
def page(name: str) -> str:
    better, report = optimized(name)
    calls = [node.name for node in better.nodes() if node.op == "call_function"]
    kernels = [{"kernel": f"k{i}", "nodes": [calls[i]], "seconds": 1e-6 * (i + 1), "share": 0.1} for i in range(5)]
    return diff_page(program(name), better, report=report, profile={"kernels": kernels})


@functools.cache
def long_page() -> str:
    return diff_page(chain(LONG), chain(LONG, replaced=range(7, LONG, 50)))


def unfiltered(png: bytes) -> bytes:
    """The bytes of a PNG's lines, each as its difference from its neighbours: all zero where one colour is."""
    packed, place = b"", 8
    while place < len(png):
        length = int.from_bytes(png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            packed += png[place + 8 : place + 8 + length]
        place += length + 12
    return zlib.decompress(packed)


def drawn(png: bytes) -> float:
    """The share of the picture that differs from what is beside it."""
    lines = unfiltered(png)
    return 1 - lines.count(0) / len(lines)


def test_it_is_seen_in_both_schemes(show: Show) -> None:
    browser = show(page("conv_net"))
    seen = {}
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        seen[scheme] = browser.screenshot()
        assert drawn(seen[scheme]) > 0.01
    assert seen["light"] != seen["dark"]
    assert drawn(show("<title>blank</title>").screenshot()) < 0.001


def test_the_summary_counts(show: Show) -> None:
    browser = show(page("conv_net"))
    summary = browser.text("#summary")
    before, after = program("conv_net").count_operators(), optimized("conv_net")[0].count_operators()
    assert f"{before} → {after}\nnodes that compute" in summary
    assert "1\nrewrites" in summary
    browser.click("#tables details:nth-child(2) summary")
    assert "batch-norm-folding" in browser.text("#tables")


def test_what_a_pass_measured_is_drawn(show: Show) -> None:
    better, report = optimized("conv_net")
    measured = [(3.0, "as folded", 1.0), (2.0, "as folded", 0.8), (2.0, "healed", 0.95)]
    points = [
        {"setting": "blocks kept", "value": value, "variant": variant, "metric": metric, "seconds": value * 1e-3}
        for value, variant, metric in measured
    ]
    first, *others = report["passes"]
    told = {**report, "passes": [{**first, "trade_offs": points}, *others], "metric": {"name": "cosine"}}
    browser = show(diff_page(program("conv_net"), better, report=told))
    browser.click("#tables details:nth-child(3) summary")
    text = browser.text("#tables details:nth-child(3)")
    assert f"chart of {first['name']}" in text
    assert browser.count(".chart") == 2
    assert browser.count(".chart circle") == 3 + 2  # each point of the metric; time does not depend on healing
    words = [browser.value(f"document.querySelectorAll('.chart')[{place}].textContent") for place in (0, 1)]
    assert ["cosine" in words[0], "milliseconds" in words[1]] == [True, True]


def test_a_click_tells_why(show: Show) -> None:
    browser = show(page("conv_net"))
    browser.click('.cell[data-side="b"].state-changed:not(.weight)')
    panel = browser.text("#panel")
    for words in (
        "Stands in the place of",
        "batch-norm-folding@",
        "error of this rewrite alone",
        "aten.conv2d.default",
    ):
        assert words in panel
    browser.click("#fate .link")  # to what it replaced
    assert "Replaced by" in browser.text("#fate")
    browser.press("Escape")
    assert not browser.value("document.querySelector('#panel').checkVisibility()")


def test_a_click_tells_why_not(show: Show) -> None:
    browser = show(page("bert"))
    place = browser.value("data.a.nodes.findIndex(n => (n.notes || []).some(note => note.kind === 'declined'))")
    browser.value(f"select('a', {place})")
    assert "declined" in browser.text("#panel .note") and "merge-linears" in browser.text("#panel .note")


def test_neighbours_of_a_chosen_node_are_joined(show: Show) -> None:
    browser = show(page("conv_net"))
    assert browser.value("document.querySelector('path.chosen').getAttribute('d')") == ""
    browser.click('.cell[data-side="a"].state-changed:not(.weight)')
    assert browser.value("document.querySelector('path.chosen').getAttribute('d').split('M').length") > 2


def test_colours(show: Show) -> None:
    browser = show(page("conv_net"))
    options = browser.value("[...document.querySelectorAll('#colour option')].map(o => o.value)")
    assert options == ["change", "error", "time"]
    colours: dict[str, Any] = {}
    for colour in options:
        browser.choose("#colour", colour)
        cell = 'document.querySelector(\'.cell[data-side="b"].state-changed, .cell[data-side="b"][class*=heat-]\')'
        colours[colour] = browser.value(f"[{cell}.className, getComputedStyle({cell}).backgroundColor]")
    assert len({background for _, background in colours.values()}) == 3
    assert "heat-" in colours["error"][0] and "heat-" in colours["time"][0]
    assert "5.00 µs" in browser.text("#legend")


def test_colours_of_what_is_not_known_are_not_offered(show: Show) -> None:
    browser = show(diff_page(chain(3), chain(3, replaced=[1])))
    assert browser.value("document.querySelectorAll('#colour option').length") == 1


def test_search_by_keys(show: Show) -> None:
    browser = show(page("conv_net"))
    browser.type("/")
    browser.type("rule:batch-norm op:conv2d")
    assert browser.text("#found") == "2 found"
    browser.press("Enter")
    assert browser.text("#found") == "1 of 2" and browser.text("#panel h2") == "conv2d"
    browser.press("Enter")
    assert browser.text("#found") == "2 of 2" and "in B" in browser.text("#panel")
    browser.type(" no such node")
    assert browser.text("#found") == "0 found"


def test_changes_by_keys(show: Show) -> None:
    browser = show(long_page())
    browser.click("#next")
    assert browser.text("#panel h2") == "step_7"
    browser.type("n")
    assert browser.text("#panel h2") == "step_57"
    browser.press("ArrowRight")
    assert browser.text("#panel h2") == "better_57"
    browser.press("ArrowDown")
    assert browser.text("#panel h2") == "step_58"
    browser.type("p")
    assert browser.text("#panel h2") == "step_57"


def test_equal_runs_unfold(show: Show) -> None:
    browser = show(long_page())
    run = ".run:nth-child(n + 8)"
    assert "45 equal nodes" in browser.text(run)
    before = browser.value("lines.length")
    browser.click(run)
    assert browser.value("lines.length") == before + 44
    browser.click("#fold")
    assert browser.value("lines.length") == LONG + 2


def test_states_can_be_hidden(show: Show) -> None:
    browser = show(long_page())
    browser.click("#fold")
    browser.click('[data-state="changed"]')
    assert browser.value("lines.length") == LONG + 2 - 40


def test_long_graphs_are_reached_whole(show: Show) -> None:
    browser = show(long_page())
    assert browser.value("document.querySelectorAll('*').length") < 1500  # what is out of sight is no element
    browser.type("/")
    browser.type(f"step_{LONG - 1}")
    browser.press("Enter")
    assert browser.text("#panel h2") == f"step_{LONG - 1}"
    assert browser.value("[...document.querySelectorAll('.cell.selected .name')].map(e => e.textContent)") == [
        f"step_{LONG - 1}"
    ]
    assert browser.value("document.querySelector('.cell.selected').getBoundingClientRect().bottom <= innerHeight")


def test_branches_are_groups(show: Show) -> None:
    browser = show(page("branching"))
    groups = browser.value("[...document.querySelectorAll('.section')].map(e => e.textContent)")
    assert groups == ["main graph", "sub-graph true_graph_0", "sub-graph false_graph_0"]


def test_it_fits_a_narrow_window(show: Show) -> None:
    browser = show(page("conv_net"))
    browser.resize(700, 900)
    browser.click(".cell")
    assert browser.value("document.documentElement.scrollWidth") <= 700
    browser.resize(1500, 900)
