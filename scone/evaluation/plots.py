"""Plots as inline SVG text: no plotting library, no image files, colours from the page so that light and dark both
work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 46


@dataclass(frozen=True)
class Series:
    """A named line: points (x, y) in order. ``color`` is a CSS colour, usually ``var(--series-1)``."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str
    dashed: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Axis:
    """Where values lie on a side of the plot: ``low … high`` in data units, ticks at round numbers."""

    low: float
    high: float
    ticks: Sequence[float]
    logarithmic: bool = False

    def position(self, value: float) -> float:
        """0 at ``low``, 1 at ``high``."""
        if self.logarithmic:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def round_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 × 10ⁿ that lie in ``low … high``, ``about`` of them or a few less or more."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def linear_axis(values: Sequence[float], from_zero: bool = False) -> Axis:
    """An axis around ``values`` with a little room, its ends not necessarily ticks."""
    low, high = min(values), max(values)
    if from_zero:
        low = min(0.0, low)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = (low if from_zero else low - room), high + room
    return Axis(low, high, round_ticks(low, high))


def logarithmic_axis(values: Sequence[float]) -> Axis:
    """A base-10 axis around positive ``values``, ticks at powers of ten (and their halves when there are few)."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low / 2, high * 2
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if math.log10(high / low) >= 3 else (1, 2, 5)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return Axis(low, high, [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001], True)


def short_number(value: float) -> str:
    """Tick and bar labels: 1500000 → "1.5M", 0.25 → "0.25"."""
    for size, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.4g}"


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    x_logarithmic: bool = False,
    y_from_zero: bool = False,
    y_format: Callable[[float], str] = short_number,
    description: str = "",
) -> str:
    """An SVG of lines over shared axes; empty text when there is nothing to draw.

    ``description`` is what a screen reader says. Points with a non-finite coordinate are left out.
    """
    drawn = [
        Series(
            line.name,
            [point for point in line.points if all(map(math.isfinite, point)) and (not x_logarithmic or point[0] > 0)],
            line.color,
            line.dashed,
            line.markers,
        )
        for line in series
    ]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    x_low, x_high = min(xs), max(xs)
    x_axis = logarithmic_axis(xs) if x_logarithmic else Axis(x_low, x_high if x_high > x_low else x_low + 1, ())
    if not x_logarithmic:
        x_axis = Axis(x_axis.low, x_axis.high, round_ticks(x_axis.low, x_axis.high))
    y_axis = linear_axis(ys, y_from_zero)
    parts = [grid(x_axis, y_axis, x_label, y_label, y_format)]
    parts += [_line(line, x_axis, y_axis, y_format) for line in drawn]
    return svg(parts, description or f"{y_label} over {x_label}")


def bar_chart(
    groups: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[float | None]]],
    x_label: str,
    y_label: str,
    y_format: Callable[[float], str] = short_number,
    description: str = "",
) -> str:
    """An SVG of bars from zero, side by side in ``groups``; ``series`` are (name, colour, a value or None for each
    group).
    """
    values = [value for _, _, row in series for value in row if value is not None]
    if not values:
        return ""
    y_axis = linear_axis([0.0, *values], from_zero=True)
    inner = WIDTH - LEFT - RIGHT
    slot = inner / len(groups)
    bar = min(slot * 0.8 / len(series), 46.0)
    parts = [grid(None, y_axis, x_label, y_label, y_format)]
    for index, group in enumerate(groups):
        center = LEFT + slot * (index + 0.5)
        parts.append(text_at("tick", center, HEIGHT - BOTTOM + 16, "middle", group))
        for position, (name, color, row) in enumerate(series):
            value = row[index]
            if value is None:
                continue
            x = center + (position - len(series) / 2) * bar
            y = y_place(y_axis, value)
            height = y_place(y_axis, 0.0) - y
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{bar - 2:.1f}" height="{max(height, 0):.1f}" rx="2" '
                f'style="fill:{color}"><title>{escape(name)}, {escape(group)}: {y_format(value)}</title></rect>'
            )
            if bar >= 26:
                parts.append(text_at("value", x + bar / 2, y - 4, "middle", y_format(value)))
    return svg(parts, description or f"{y_label} by {x_label}")


def legend(entries: Sequence[tuple[str, str, bool]]) -> str:
    """HTML naming the colours: (name, colour, dashed)."""
    items = "".join(
        f'<span class="key"><span class="swatch{" dashed" if dashed else ""}" style="--c:{color}"></span>'
        f"{escape(name)}</span>"
        for name, color, dashed in entries
    )
    return f'<div class="legend">{items}</div>'


def x_place(axis: Axis, value: float) -> float:
    """Where ``value`` lies from left to right, in the plot's units."""
    return LEFT + axis.position(value) * (WIDTH - LEFT - RIGHT)


def y_place(axis: Axis, value: float) -> float:
    """Where ``value`` lies from top to bottom, in the plot's units."""
    return HEIGHT - BOTTOM - axis.position(value) * (HEIGHT - TOP - BOTTOM)


def grid(x_axis: Axis | None, y_axis: Axis, x_label: str, y_label: str, y_format: Callable[[float], str]) -> str:
    """Axes with ticks and labels; no ticks on the horizontal one where ``x_axis`` is None."""
    base = HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" y1="{base}" x2="{WIDTH - RIGHT}" y2="{base}"/>']
    for tick in y_axis.ticks:
        y = y_place(y_axis, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(text_at("tick", LEFT - 8, y + 4, "end", y_format(tick)))
    for tick in x_axis.ticks if x_axis else ():
        x = x_place(x_axis, tick)  # type: ignore[arg-type]
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{base}" x2="{x:.1f}" y2="{base + 4}"/>')
        parts.append(text_at("tick", x, base + 17, "middle", short_number(tick)))
    middle = (TOP + base) / 2
    parts.append(text_at("label", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "middle", x_label))
    parts.append(
        f'<text class="label" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def text_at(kind: str, x: float, y: float, anchor: str, text: str) -> str:
    """Text of the CSS class ``kind``; ``anchor`` is start, middle or end."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(line: Series, x_axis: Axis, y_axis: Axis, y_format: Callable[[float], str]) -> str:
    points = [(x_place(x_axis, x), y_place(y_axis, y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    parts = [
        f'<polyline class="line" points="{path}" style="stroke:{line.color}"{dash}>'
        f"<title>{escape(line.name)}</title></polyline>"
    ]
    if line.markers or len(points) == 1:
        for (x, y), (value_x, value_y) in zip(points, line.points, strict=True):
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" style="fill:{line.color}">'
                f"<title>{escape(line.name)}: {y_format(value_y)} at {short_number(value_x)}</title></circle>"
            )
    return "".join(parts)


def svg(parts: Sequence[str], description: str, height: float = HEIGHT) -> str:
    """The picture of ``parts``; ``description`` is what a screen reader says."""
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(description, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )
