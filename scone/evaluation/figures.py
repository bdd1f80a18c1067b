"""Figures by matplotlib as inline SVG whose colours are the page's CSS variables, so that light and dark both work.

svg = line_figure([Line("plain", [(0, 1.0), (1, 0.9)], PLAIN_COLOR)], "tokens", "loss")
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

WIDTH, HEIGHT, LABEL_HEIGHT = 560.0, 300.0, 14.0  # pixels
LONGEST_NAME = 22

# what matplotlib draws with → what the page calls it; the colours are those of the light page
INK, SOFT, GRID, CARD = "#1c1e21", "#5f6670", "#ebedf0", "#ffffff"
SERIES = ("#7a8594", "#c2410c", "#0f766e", "#1d4ed8", "#7c3aed", "#a16207", "#be185d", "#4d7c0f")
PLAIN_COLOR, PALETTE = SERIES[0], SERIES[1:]
VARIABLES = {INK: "--ink", SOFT: "--soft", GRID: "--grid", CARD: "--card"}
VARIABLES |= {color: f"--series-{number}" for number, color in enumerate(SERIES, start=1)}
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the reader's font
    "svg.hashsalt": "scone",  # the same figure has the same bytes
    "font.family": "sans-serif",
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), SOFT),
    **dict.fromkeys(("axes.spines.left", "axes.spines.top", "axes.spines.right"), False),
    "axes.axisbelow": True,
    "grid.color": GRID,
}


@dataclass(frozen=True)
class Line:
    """A named line through ``points`` (x, y), in order."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str
    dashed: bool = False


@dataclass(frozen=True)
class Point:
    """A named point (x, y)."""

    name: str
    x: float
    y: float
    color: str


Bars = tuple[str, str, Sequence[float | None]]
"""Name, colour, and a value for each group (None: no bar)."""


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats in both (lower is better), by rising x; of equal ones, one."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def line_figure(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """The SVG of the finite points of ``lines``; empty where there are none."""
    axes, drawn = _axes(), False
    for line in lines:
        if points := [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]:
            drawn = True
            style = {"linestyle": (0, (2.4, 1.8))} if line.dashed else {"marker": "o"}
            axes.plot(*zip(*points, strict=True), color=line.color, linewidth=2.2, **style)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return _finished(axes, x_label, y_label) if drawn else ""


def scatter_figure(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """The SVG of named points over a logarithmic x, with the Pareto front (low x and low y are good); empty for fewer
    than two.
    """
    points = [each for each in points if math.isfinite(each.x) and math.isfinite(each.y) and each.x > 0]
    if len(points) < 2:
        return ""
    axes = _axes(right=170)
    axes.set_xscale("log")
    axes.minorticks_off()
    for point in points:
        axes.plot([point.x], [point.y], "o", color=point.color, markersize=9, markeredgecolor=CARD, zorder=3)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    xs, ys = zip(*(best := pareto_front((point.x, point.y) for point in points)), (high, best[-1][1]), strict=True)
    axes.step(xs, ys, where="post", color=SOFT, linewidth=1.2, linestyle=(0, (1.6, 3.2)))
    # names stand in a column, each as high as its point where there is room, and a thin line leads there
    height = 0.0
    for point in sorted(points, key=lambda point: point.y):
        height = max(height + LABEL_HEIGHT, float(axes.transData.transform((point.x, point.y))[1]))
        axes.annotate(
            point.name if len(point.name) <= LONGEST_NAME else point.name[: LONGEST_NAME - 1] + "…",
            (point.x, point.y),
            (WIDTH - 162, height),
            textcoords="figure pixels",
            annotation_clip=False,
            va="center",
            color=INK,
            fontsize=12,
            arrowprops={"arrowstyle": "-", "color": SOFT, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 0},
        )
    return _finished(axes, x_label, y_label)


def bar_figure(groups: Sequence[str], series: Sequence[Bars], x_label: str, y_label: str) -> str:
    """The SVG of bars from zero, side by side in each of ``groups``; empty where there is no value."""
    if all(value is None for *_, values in series for value in values):
        return ""
    axes, width = _axes(), min(0.8 / len(series), 0.09 * len(groups))
    for place, (_, color, values) in enumerate(series):
        present = [(group, value) for group, value in enumerate(values) if value is not None]
        at = [group + (place + 0.5 - len(series) / 2) * width for group, _ in present]
        bars = axes.bar(at, [value for _, value in present], width * 0.93, color=color)
        axes.bar_label(bars, fmt="%.2f", color=INK, fontsize=11, padding=3)
    axes.set_xticks(range(len(groups)), groups)
    return _finished(axes, x_label, y_label)


def svg_of(figure: Any, description: str = "") -> str:
    """``figure`` as an SVG element for a page that has the CSS variables; ``description`` is for screen readers."""
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    svg = re.sub(r"<(metadata|style).*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", svg)  # the page's font, not ours
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # several figures share a page: no names but those referred to
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    head = f'<svg class="plot" {view[0]} role="img" aria-label="{escape(description, quote=True)}">'
    return head + svg[svg.index(">") + 1 :].strip()


def _axes(right: float = 16) -> Any:
    """Axes in a new figure; margins in pixels."""
    left, top, bottom = 58.0, 14.0, 46.0
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)  # a point is a pixel
    figure.patch.set_visible(False)
    size = ((WIDTH - left - right) / WIDTH, (HEIGHT - top - bottom) / HEIGHT)
    with rc_context(_STYLE):
        axes = figure.add_axes((left / WIDTH, bottom / HEIGHT, *size), facecolor="none")
        axes.grid(axis="y")
        axes.tick_params(axis="y", length=0)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return axes


def _finished(axes: Any, x_label: str, y_label: str) -> str:
    axes.tick_params(labelsize=12)
    axes.set_xlabel(x_label, fontsize=12.5)
    axes.set_ylabel(y_label, fontsize=12.5)
    return svg_of(axes.figure, f"{y_label} over {x_label}")
