"""Figures by matplotlib as inline SVG whose colours are the page's CSS variables, so that light and dark both work.

svg = line_figure([Line("plain", [(0, 1.0), (1, 0.9)], PLAIN_COLOR)], "tokens", "loss")
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
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

WIDTH, HEIGHT = 560.0, 300.0  # pixels
BAR_HEIGHT, LABEL_HEIGHT = 13.0, 14.0
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
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), SOFT),
    "grid.color": GRID,
    "path.simplify": False,
}
_OFFSET = {"xycoords": "data", "textcoords": "offset pixels", "annotation_clip": False}


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


def line_figure(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
    from_zero: bool = False,
    y_format: Callable[[float], str] = short_number,
) -> str:
    """The SVG of the finite points of ``lines``, over a logarithmic x where asked for; empty where there are none."""
    axes, drawn = _axes(), False
    for line in lines:
        points = [point for point in line.points if _can_be_drawn(*point, logarithmic)]
        if not points:
            continue
        drawn = True
        (artist,) = axes.plot(*zip(*points, strict=True), color=line.color, linewidth=2.2, gid=_tip(line.name))
        if line.dashed:
            artist.set_linestyle((0, (2.4, 1.8)))
        for x, y in points if line.markers or len(points) == 1 else ():
            tip = _tip(f"{line.name}: {y_format(y)} at {short_number(x)}")
            axes.plot([x], [y], "o", color=line.color, markersize=6.4, clip_on=False, gid=tip)
    if not drawn:
        return ""
    axes.margins(x=0, y=0.06)
    if from_zero:
        axes.set_ylim(bottom=0)
    _finish(axes, x_label, y_label, y_format, logarithmic)
    return svg_of(axes.figure, f"{y_label} over {x_label}")


def scatter_figure(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """The SVG of named points over a logarithmic x, with their whiskers and the Pareto front (low x and low y are
    good); empty for fewer than two.
    """
    points = [point for point in points if _can_be_drawn(point.x, point.y, True)]
    if len(points) < 2:
        return ""
    axes = _axes()
    for point in points:
        if point.spread:
            axes.vlines(point.x, *point.spread, color=point.color, linewidth=1.6, gid=_tip(f"{point.name}: seeds"))
        tip = _tip(f"{point.name}: {short_number(point.y)} at {short_number(point.x)}")
        style = {"markersize": 9, "markeredgecolor": CARD, "markeredgewidth": 1.5, "gid": tip}
        axes.plot([point.x], [point.y], "o", color=point.color, clip_on=False, zorder=3, **style)
    axes.margins(x=0.07, y=0.13)
    _finish(axes, x_label, y_label, short_number, logarithmic=True)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high)
    xs, ys = zip(*(best := pareto_front((point.x, point.y) for point in points)), (high, best[-1][1]), strict=True)
    axes.step(xs, ys, where="post", color=SOFT, linewidth=1.2, linestyle=(0, (1.6, 3.2)), gid=_tip("Pareto front"))
    _label(axes, points)
    return svg_of(axes.figure, f"{y_label} over {x_label}")


def bar_figure(groups: Sequence[str], series: Sequence[Bars], x_label: str, y_label: str) -> str:
    """The SVG of bars from zero, side by side in each of ``groups``; empty where there is no value."""
    if all(value is None for *_, values in series for value in values):
        return ""
    axes, width = _axes(), min(0.8 / len(series), 0.09 * len(groups))
    for place, (name, color, values) in enumerate(series):
        for group, value in enumerate(values):
            if value is not None:
                x = group + (place + 0.5 - len(series) / 2) * width
                axes.bar([x], [value], width * 0.93, color=color)[0].set_gid(
                    _tip(f"{name}, {groups[group]}: {value:.2f}")
                )
                if width / len(groups) >= 0.05:
                    axes.annotate(f"{value:.2f}", (x, value), (0, 4), **_OFFSET, ha="center", color=INK, size=11)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    _finish(axes, x_label, y_label, lambda value: f"{value:.2f}")
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0, pad=7)
    return svg_of(axes.figure, f"{y_label} by {x_label}")


def row_figure(
    names: Sequence[str], series: Sequence[Bars], label: str, form: Callable[[float], str] = short_number
) -> str:
    """The SVG of horizontal bars, a group for each of ``names``, values beside them; empty where there is no value."""
    groups = [
        (name, [(kind, color, values[row]) for kind, color, values in series if values[row] is not None])
        for row, name in enumerate(names)
    ]
    groups = [(name, bars) for name, bars in groups if bars]
    if not groups:
        return ""
    height = BAR_HEIGHT * sum(len(bars) + 1 for _, bars in groups)
    axes, place, ticks = _axes(height + 24, left=168, right=64, top=2, bottom=22), 0, []
    for name, bars in groups:
        ticks.append(place + (len(bars) - 1) / 2)
        for kind, color, value in bars:
            assert value is not None
            axes.barh([place], [value], 0.85, color=color)[0].set_gid(_tip(f"{name}, {kind}: {form(value)}"))
            axes.annotate(form(value), (value, place), (6, 0), **_OFFSET, va="center", color=INK, size=11)
            place += 1
        place += 1
    axes.set_xlim(0, max(value or 0 for _, bars in groups for *_, value in bars) or 1)
    axes.set_ylim(place - 0.5, -1)
    axes.set_xticks([])
    cut = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name, _ in groups]
    axes.set_yticks(ticks, cut, color=INK, fontsize=12.5)
    axes.tick_params(axis="y", length=0, pad=10)
    axes.spines[["bottom", "top", "right"]].set_visible(False)
    axes.set_xlabel(label, fontsize=12.5, loc="left")
    return svg_of(axes.figure, label)


def svg_of(figure: Any, description: str = "") -> str:
    """``figure`` as an SVG element for a page that has the CSS variables; ``description`` is for screen readers."""
    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    svg = re.sub(r"<(metadata|style).*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
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


def _tip(text: str) -> str:
    """An identifier that `svg_of` makes the title of a part, which browsers show under the pointer."""
    return "tip:" + text.encode().hex()


def _title(found: re.Match[str]) -> str:
    return f"<g><title>{escape(bytes.fromhex(found[1]).decode())}</title>"


def _can_be_drawn(x: float, y: float, logarithmic: bool) -> bool:
    return math.isfinite(x) and math.isfinite(y) and (x > 0 or not logarithmic)


def _axes(height: float = HEIGHT, left: float = 58, right: float = 16, top: float = 14, bottom: float = 46) -> Any:
    """Axes in a new figure; sizes and margins in pixels."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)  # a point is a pixel
    figure.patch.set_visible(False)
    size = ((WIDTH - left - right) / WIDTH, (height - top - bottom) / height)
    with rc_context(_STYLE):
        return figure.add_axes((left / WIDTH, bottom / height, *size), facecolor="none")


def _finish(axes: Any, x_label: str, y_label: str, y_format: Callable[[float], str], logarithmic: bool = False) -> None:
    """Ticks, grid and labels."""
    locator: Any = MaxNLocator(6, steps=[1, 2, 5, 10])
    if logarithmic:
        axes.set_xscale("log")
        axes.minorticks_off()
        low, high = axes.get_xlim()
        locator = LogLocator(subs=(1.0,) if high / low >= 1e3 else (1.0, 2.0, 5.0))
        if sum(low <= tick <= high for tick in locator.tick_values(low, high)) < 3:
            locator = MaxNLocator(4)
    axes.xaxis.set_major_locator(locator)
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


def _label(axes: Any, points: Sequence[Point]) -> None:
    """Each name beside its point, at the nearest height where no other name is; a moved one has a leader."""
    taken: list[tuple[float, float, float]] = []  # left, right, height
    for point in sorted(points, key=lambda point: point.y):
        x, y = map(float, axes.transData.transform((point.x, point.y)))
        width = len(point.name) * CHARACTER_WIDTH
        on_right = x + 16 + width <= WIDTH
        left, right = (x + 7, x + 16 + width) if on_right else (x - 16 - width, x - 7)
        near = [height for other_left, other_right, height in taken if other_left < right and left < other_right]
        places = [y, *(height + step for height in near for step in (LABEL_HEIGHT, -LABEL_HEIGHT))]
        free = [
            place
            for place in places
            if LABEL_HEIGHT / 2 <= place <= HEIGHT - LABEL_HEIGHT / 2
            and all(abs(place - height) >= LABEL_HEIGHT - 1e-6 for height in near)
        ]
        height = min(free or [y], key=lambda place: abs(place - y))
        taken.append((left, right, height))
        leader = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.8, "alpha": 0.7, "shrinkA": 1, "shrinkB": 0}
        axes.annotate(
            point.name,
            (point.x, point.y),
            ((9 if height == y else 16) * (1 if on_right else -1), height - y),
            **_OFFSET,
            ha="left" if on_right else "right",
            va="center",
            color=INK,
            size=12.5,
            arrowprops=None if height == y else leader | {"relpos": (0 if on_right else 1, 0.5)},
        )
