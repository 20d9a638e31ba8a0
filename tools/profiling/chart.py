"""A profile as a picture: one bar a kernel, as long as its time and coloured by the share of its roof."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt.tools.output_file import replace_file

if TYPE_CHECKING:
    from graphopt.tools.profiling.shares import Profile, Row

MOST_BARS = 20
VISIBLE = 0.001  # share of the time below which a kernel is drawn only if it is slow
_WIDTH, _ROW, _AROUND = 12.0, 0.42, 1.9  # inches
_DPI = 120
_GREY, _DARK, _RED = "#9aa0a6", "#202124", "#b3261e"
_COLOURS = "RdYlBu"  # red at no share of the roof, blue at all of it; told apart by colour-blind eyes too


@dataclass(frozen=True)
class Bar:
    """`share_of_roof` is None where there is no roof to compare with."""

    label: str
    detail: str
    seconds: float
    text: str
    share_of_roof: float | None
    slow: bool


def bars(profile: Profile) -> list[Bar]:
    """The most expensive kernels and those that are slow, then all others together and the time outside kernels."""
    ranked = sorted(profile.rows, key=lambda row: (not row.slow, -row.seconds))
    worth = [row for row in ranked if row.slow or row.share >= VISIBLE][:MOST_BARS] or ranked[:1]
    shown = sorted(worth, key=lambda row: -row.seconds)
    others = [row for row in profile.rows if row not in worth]
    found = [kernel_bar(row) for row in shown]
    if others:
        label = f"{len(others)} other kernel{'s' * (len(others) > 1)}"
        found.append(rest_bar(label, sum(row.seconds for row in others), profile.seconds))
    return [*found, rest_bar("outside kernels", profile.outside_seconds, profile.seconds)]


def kernel_bar(row: Row) -> Bar:
    label = row.kernel if row.calls == 1 else f"{row.calls:g} x {row.kernel}"
    text = f"{format_seconds(row.seconds)}, {row.share:.1%}"
    if row.share_of_roof is not None:
        text += f", {row.share_of_roof:.0%} of {row.roof}"
    return Bar(label, row.rule, row.seconds, text + (", SLOW" if row.slow else ""), row.share_of_roof, bool(row.slow))


def rest_bar(label: str, seconds: float, whole: float) -> Bar:
    return Bar(label, "", seconds, f"{format_seconds(seconds)}, {seconds / whole:.1%}", None, False)


def format_seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def write_chart(path: str, profile: Profile, title: str) -> None:
    """A PNG, whole or not at all. Needs matplotlib; no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = bars(profile)
    figure = Figure(figsize=(_WIDTH, _AROUND + _ROW * len(drawn)), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no pyplot: it would look for a display and keep the figure
    axes = figure.add_subplot()
    draw_bars(axes, drawn)
    draw_scale(figure, axes)
    axes.set_title(headline(profile, title), loc="left", fontsize=10, color=_DARK, pad=12)
    with replace_file(path) as stream:
        canvas.print_figure(stream, format="png")


def draw_bars(axes: Any, drawn: list[Bar]) -> None:
    from matplotlib import colormaps

    colours = colormaps[_COLOURS]
    longest = max(bar.seconds for bar in drawn) or 1.0
    for number, bar in enumerate(drawn):
        colour = _GREY if bar.share_of_roof is None else colours(min(bar.share_of_roof, 1.0))
        edge = _RED if bar.slow else "#5f6368"
        axes.barh(
            number, bar.seconds * 1e3, height=0.68, color=colour, edgecolor=edge, linewidth=1.6 if bar.slow else 0.4
        )
        at = (bar.seconds + 0.008 * longest) * 1e3
        axes.text(at, number, bar.text, va="center", fontsize=8.5, color=_RED if bar.slow else _DARK)
    labels = [f"{bar.label}\n{bar.detail}" if bar.detail else bar.label for bar in drawn]
    axes.set_yticks(range(len(drawn)), labels, fontsize=8)
    for label, bar in zip(axes.get_yticklabels(), drawn, strict=True):
        label.set_color(_RED if bar.slow else _DARK)
    axes.invert_yaxis()
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    axes.set_xlim(0, longest * 1.32e3)  # room for the text of the longest bar
    axes.set_xlabel("ms a run", fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e0e0e0", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def draw_scale(figure: Any, axes: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = figure.colorbar(
        ScalarMappable(Normalize(0, 100), _COLOURS), ax=axes, fraction=0.025, pad=0.01, aspect=30, anchor=(0, 1)
    )
    scale.set_label("% of the nearer roof (grey: not known)", fontsize=8.5)
    scale.ax.tick_params(labelsize=8)
    scale.outline.set_visible(False)


def headline(profile: Profile, title: str) -> str:
    parts = [f"{profile.seconds * 1e3:.2f} ms a run"]
    if profile.roofs is not None:
        peak = profile.roofs.flops_per_second / 1e9
        parts.append(f"{profile.flops / profile.seconds / 1e9:.0f} of {peak:.0f} GFLOP/s ({profile.share_of_peak:.0%})")
    parts.append(f"{len(profile.slow)} slow of {len(profile.rows)} kernels")
    return f"{title}\n{';  '.join(parts)}"
