"""Figures by matplotlib as inline SVG whose colours are the page's CSS variables, so that light and dark both work.

figure, axes = new_figure("tokens", "loss")
draw_lines(axes, [Line("plain", [(0, 1.0), (1, 0.9)], PLAIN_COLOR)])
svg = svg_of(figure)
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator

WIDTH, HEIGHT = 560.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 16.0, 14.0, 46.0
NAME_WIDTH, VALUE_WIDTH, BAR_HEIGHT, GROUP_GAP = 168.0, 64.0, 13.0, 12.0
LABEL_HEIGHT = 14.0
CHARACTER_WIDTH = 6.7  # of a label, too wide rather than too narrow: the reader's font is not known
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
    "text.color": SOFT,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.edgecolor": SOFT,
    "grid.color": GRID,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Line:
    """A named line through ``points`` (x, y), in order."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str
    dashed: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Point:
    """A named point (x, y). ``spread``: lowest and highest y over seeds, drawn as a whisker."""

    name: str
    x: float
    y: float
    color: str
    spread: tuple[float, float] | None = None


Bars = tuple[str, str, Sequence[float | None]]
"""Name, colour, and a value for each group (None: no bar)."""


def short_number(value: float, _: object = None) -> str:
    """Tick labels: 1500000 → "1.5M", 0.25 → "0.25"."""
    for size, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.4g}"


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats in both (lower is better), by rising x; of equal ones, one."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def new_figure(columns: int = 1, height: float = HEIGHT, top: float = TOP) -> tuple[Figure, list[Any]]:
    """A figure of ``columns`` axes side by side, each `WIDTH` wide; sizes in pixels."""
    width = columns * WIDTH
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # a point is a pixel
    figure.patch.set_visible(False)
    with rc_context(_STYLE):
        axes = [
            figure.add_axes(
                (
                    (column * WIDTH + LEFT) / width,
                    BOTTOM / height,
                    (WIDTH - LEFT - RIGHT) / width,
                    (height - top - BOTTOM) / height,
                ),
                facecolor="none",
            )
            for column in range(columns)
        ]
    return figure, axes


def line_figure(lines: Sequence[Line], x_label: str, y_label: str, **options: Any) -> str:
    """The SVG of ``lines``; empty where there is nothing to draw. ``options`` as `draw_lines` has them."""
    figure, (axes,) = new_figure()
    drawn = draw_lines(axes, lines, x_label, y_label, **options)
    return svg_of(figure, f"{y_label} over {x_label}") if drawn else ""


def scatter_figure(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """The SVG of labelled ``points`` over a logarithmic x, with the Pareto front; empty for fewer than two."""
    figure, (axes,) = new_figure()
    drawn = draw_points(axes, points, x_label, y_label, logarithmic=True, front=True)
    return svg_of(figure, f"{y_label} over {x_label}") if drawn > 1 else ""


def draw_lines(
    axes: Any,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
    from_zero: bool = False,
    y_format: Callable[[float], str] = short_number,
) -> int:
    """Draw the finite points of ``lines``, over a logarithmic x where asked for; returns how many points there are."""
    drawn = []
    for line in lines:
        points = [(x, y) for x, y in line.points if _can_be_drawn(x, y, logarithmic)]
        if points:
            drawn.append((line, points))
    if not drawn:
        return 0
    everything = [point for _, points in drawn for point in points]
    _scale(axes, everything, logarithmic, from_zero, room=0.0)
    for line, points in drawn:
        (artist,) = axes.plot(*zip(*points, strict=True), color=line.color, linewidth=2.2, solid_capstyle="round")
        artist.set_gid(_tip(line.name))
        if line.dashed:
            artist.set_linestyle((0, (2.4, 1.8)))
        if line.markers or len(points) == 1:
            for x, y in points:
                tip = f"{line.name}: {y_format(y)} at {short_number(x)}"
                axes.plot([x], [y], "o", color=line.color, markersize=6.4, clip_on=False, gid=_tip(tip))
    _finish(axes, x_label, y_label, y_format, logarithmic)
    return len(everything)


def draw_points(
    axes: Any,
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
    front: bool = False,
    trend: Sequence[tuple[float, float]] = (),
) -> int:
    """Draw named points with their whiskers; returns how many could be drawn.

    ``front``: also the Pareto front (low x and low y are good), as a dotted staircase. ``trend``: a dashed line to
    compare the points with, such as one model at several budgets.
    """
    points = [point for point in points if _can_be_drawn(point.x, point.y, logarithmic)]
    if not points:
        return 0
    ends = [(point.x, y) for point in points for y in (point.y, *(point.spread or ()))]
    _scale(axes, [*ends, *trend], logarithmic, room=0.07)
    if front and len(points) > 1:
        best = pareto_front((point.x, point.y) for point in points)
        xs, ys = zip(*best, (axes.get_xlim()[1], best[-1][1]), strict=True)
        axes.step(xs, ys, where="post", color=SOFT, linewidth=1.2, linestyle=(0, (1.6, 3.2)), gid=_tip("Pareto front"))
    if trend:
        axes.plot(*zip(*trend, strict=True), color=PLAIN_COLOR, linewidth=1.6, linestyle=(0, (3.8, 2.5)))
    for point in points:
        if point.spread:
            axes.vlines(point.x, *point.spread, color=point.color, linewidth=1.6, gid=_tip(f"{point.name}: seeds"))
        tip = f"{point.name}: {short_number(point.y)} at {short_number(point.x)}"
        style = {"markersize": 9, "markeredgecolor": CARD, "markeredgewidth": 1.5, "gid": _tip(tip)}
        axes.plot([point.x], [point.y], "o", color=point.color, clip_on=False, zorder=3, **style)
    _label(axes, points)
    _finish(axes, x_label, y_label, short_number, logarithmic)
    return len(points)


def bar_figure(groups: Sequence[str], series: Sequence[Bars], x_label: str, y_label: str) -> str:
    """The SVG of bars from zero, side by side in each of ``groups``; empty where there is no value."""
    largest = max((value for _, _, values in series for value in values if value is not None), default=None)
    if largest is None:
        return ""
    figure, (axes,) = new_figure()
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(0, 1.08 * largest or 1)
    width = min(0.8 / len(series), 46 * len(groups) / (WIDTH - LEFT - RIGHT))
    for place, (name, color, values) in enumerate(series):
        for group, value in enumerate(values):
            if value is not None:
                x = group + (place + 0.5 - len(series) / 2) * width
                tip = f"{name}, {groups[group]}: {value:.2f}"
                axes.bar([x], [value], width * 0.93, color=color)[0].set_gid(_tip(tip))
                if width * (WIDTH - LEFT - RIGHT) / len(groups) >= 26:
                    axes.annotate(f"{value:.2f}", (x, value), (0, 4), **_OFFSET, ha="center", color=INK, size=11)
    _finish(axes, x_label, y_label, lambda value: f"{value:.2f}", False)
    axes.xaxis.set_major_locator(FixedLocator(range(len(groups))))
    axes.set_xticklabels(groups)
    axes.tick_params(axis="x", length=0, pad=7)
    return svg_of(figure, f"{y_label} by {x_label}")


def row_figure(
    names: Sequence[str], series: Sequence[Bars], label: str, form: Callable[[float], str] = short_number
) -> str:
    """The SVG of horizontal bars, a group for each of ``names``, values beside them; empty where there is no value."""
    rows = [row for row in range(len(names)) if any(values[row] is not None for _, _, values in series)]
    if not rows:
        return ""
    bars = [(row, [(name, color, values[row]) for name, color, values in series]) for row in rows]
    present = [(row, [bar for bar in of_row if bar[2] is not None]) for row, of_row in bars]
    height = 30 + sum(BAR_HEIGHT * len(of_row) + GROUP_GAP for _, of_row in present)
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    with rc_context(_STYLE):
        size = (NAME_WIDTH / WIDTH, 0, (WIDTH - NAME_WIDTH - VALUE_WIDTH) / WIDTH, 1)
        axes: Any = figure.add_axes(size, facecolor="none")
    axes.set_xlim(0, max(value or 0 for _, of_row in present for _, _, value in of_row) or 1)
    axes.set_ylim(height, 0)
    axes.axis("off")
    top = 8.0
    for row, of_row in present:
        name = names[row] if len(names[row]) <= LONGEST_NAME else names[row][: LONGEST_NAME - 1] + "…"
        middle = top + len(of_row) * BAR_HEIGHT / 2
        axes.annotate(name, (0, middle), (-10, 0), **_OFFSET, ha="right", va="center", color=INK, size=12.5)
        for place, (kind, color, value) in enumerate(of_row):
            y = top + (place + 0.5) * BAR_HEIGHT
            bar = axes.barh([y], [value], BAR_HEIGHT - 2, color=color)[0]
            bar.set_gid(_tip(f"{names[row]}, {kind}: {form(value or 0.0)}"))
            style = {"ha": "left", "va": "center", "color": INK, "size": 11}
            axes.annotate(form(value or 0.0), (value, y), (6, 0), **_OFFSET, **style)
        top += len(of_row) * BAR_HEIGHT + GROUP_GAP
    axes.plot([0, 0], [4, top - 6], color=SOFT, linewidth=1, clip_on=False)
    axes.text(0, top + 10, label, color=SOFT, size=12.5)
    return svg_of(figure, label)


def svg_of(figure: Figure, description: str = "") -> str:
    """``figure`` as an SVG element for a page that has the CSS variables; ``description`` is for screen readers."""
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", svg)  # the page's font, not ours
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)
    svg = re.sub(r'<g id="tip:([0-9a-f]*)">', _title, svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # several figures share a page: no names but those referred to
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    head = f'<svg class="plot" {view[0]} role="img" aria-label="{escape(description, quote=True)}">'
    return head + svg[svg.index(">") + 1 :].strip()


_OFFSET = {"xycoords": "data", "textcoords": "offset pixels", "annotation_clip": False}


def _tip(text: str) -> str:
    """An identifier that `svg_of` makes the title of a part, which browsers show under the pointer."""
    return "tip:" + text.encode().hex()


def _title(found: re.Match[str]) -> str:
    return f"<g><title>{escape(bytes.fromhex(found[1]).decode())}</title>"


def _can_be_drawn(x: float, y: float, logarithmic: bool) -> bool:
    return math.isfinite(x) and math.isfinite(y) and (x > 0 or not logarithmic)


def _scale(
    axes: Any, points: Sequence[tuple[float, float]], logarithmic: bool, from_zero: bool = False, room: float = 0.0
) -> None:
    """Limits around ``points``. ``room``: a share of the axes left free on all sides, for markers and labels."""
    xs, ys = zip(*points, strict=True)
    low, high = min(xs), max(xs)
    if logarithmic:
        low, high = (low, high) if high > low else (low / 2, high * 2)
        margin = (high / low) ** room
        axes.set_xscale("log")
        axes.set_xlim(low / margin, high * margin)
        axes.minorticks_off()
    else:
        margin = (high - low) * room or (0.0 if high > low else 1.0)
        axes.set_xlim(low - margin, high + margin)
    low, high = min(ys), max(ys)
    margin = (high - low) * (0.06 + room) or abs(high) * 0.1 or 1.0
    axes.set_ylim(min(low, 0.0) if from_zero else low - margin, high + margin)


def _finish(axes: Any, x_label: str, y_label: str, y_format: Callable[[float], str], logarithmic: bool) -> None:
    """Ticks, grid and labels."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if logarithmic:
        log_ticks = LogLocator(subs=(1.0,) if high / low >= 1e3 else (1.0, 2.0, 5.0))
        ticks = [tick for tick in log_ticks.tick_values(low, high) if low <= tick <= high]
        if len(ticks) < 3:
            ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: y_format(value)))
    axes.grid(axis="y", linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0, pad=8, labelsize=12)
    axes.tick_params(axis="x", length=4, labelsize=12)
    axes.set_xlabel(x_label, fontsize=12.5)
    axes.set_ylabel(y_label, fontsize=12.5)
    figure = axes.figure
    box = axes.get_position()
    width, height = figure.get_size_inches() * 72
    axes.xaxis.set_label_coords((box.x0 + box.x1) / 2, 12 / height, transform=figure.transFigure)
    left = box.x0 - (LEFT - 14) / width
    axes.yaxis.set_label_coords(left, (box.y0 + box.y1) / 2, transform=figure.transFigure)


def _label(axes: Any, points: Sequence[Point]) -> None:
    """Each name beside its point, moved up or down (with a leader) where others are in the way."""
    named = [point for point in points if point.name]
    if not named:
        return
    places = axes.transData.transform([(point.x, point.y) for point in named])
    (left, bottom), (right, top) = axes.transAxes.transform([(0, 0), (1, 1)])
    spans, on_right = [], []
    for point, (x, _) in zip(named, places, strict=True):
        width = len(point.name) * CHARACTER_WIDTH
        on_right.append(x + 16 + width <= right + RIGHT / 2 or x - 16 - width < left)
        spans.append((x + 7, x + 16 + width) if on_right[-1] else (x - 16 - width, x - 7))
    heights = [float(y) for _, y in places]
    for column in _columns(spans):
        ordered = sorted(column, key=lambda index: heights[index])
        spread = spread_labels([heights[index] for index in ordered], LABEL_HEIGHT, bottom, top)
        for index, height in zip(ordered, spread, strict=True):
            heights[index] = height
    for point, (_, y), height, to_right in zip(named, places, heights, on_right, strict=True):
        moved = abs(height - y) > 1
        leader = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.8, "alpha": 0.7, "shrinkA": 1, "shrinkB": 0}
        axes.annotate(
            point.name,
            (point.x, point.y),
            ((16 if moved else 9) * (1 if to_right else -1), height - y),
            **_OFFSET,
            ha="left" if to_right else "right",
            va="center",
            color=INK,
            size=12.5,
            arrowprops=leader | {"relpos": (0 if to_right else 1, 0.5)} if moved else None,
        )


def spread_labels(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights in the same (rising) order, ``gap`` apart and within ``low … high``, as near to ``heights`` as can be.

    Least squares: neighbours that are too close form a group around their mean (pool adjacent violators). Closer than
    ``gap`` only where there are more labels than room.
    """
    gap = min(gap, (high - low) / len(heights))
    groups: list[tuple[float, int]] = []  # mean of what heights would be without the gaps, and how many
    for place, height in enumerate(heights):
        mean, count = height - place * gap, 1
        while groups and groups[-1][0] > mean:
            before, more = groups.pop()
            mean, count = (mean * count + before * more) / (count + more), count + more
        groups.append((mean, count))
    free = [mean for mean, count in groups for _ in range(count)]
    room = high - gap / 2 - (len(heights) - 1) * gap
    return [min(max(height, low + gap / 2), room) + place * gap for place, height in enumerate(free)]


def _columns(spans: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Indices of spans (left, right), those together that overlap, directly or through others."""
    columns: list[list[int]] = []
    reach = -math.inf
    for index in sorted(range(len(spans)), key=lambda index: spans[index]):
        if spans[index][0] >= reach:
            columns.append([])
        columns[-1].append(index)
        reach = max(reach, spans[index][1])
    return columns
