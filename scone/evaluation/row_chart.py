"""Horizontal bars as inline SVG: a row for each model, so that long names have room and values stand beside bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from scone.evaluation import plots
from scone.evaluation.plots import short_number

NAME_WIDTH = 168
VALUE_WIDTH = 64
BAR_HEIGHT = 13.0
ROW_GAP = 12.0
LONGEST_NAME = 25

BarSeries = tuple[str, str, Sequence[float | None]]
"""A legend's name, a CSS colour, and a value for each row (None: no bar)."""


def row_chart(
    names: Sequence[str],
    series: Sequence[BarSeries],
    label: str,
    value_format: Callable[[float], str] = short_number,
    description: str = "",
) -> str:
    """An SVG of bars from zero, the ``series`` below each other in every row; ``label`` names the quantity and unit.

    Rows and series without any value are left out; empty text when nothing is left.
    """
    kept = [entry for entry in series if any(value is not None for value in entry[2])]
    rows = [index for index in range(len(names)) if any(values[index] is not None for _, _, values in kept)]
    if not rows:
        return ""
    largest = max(value for _, _, values in kept for value in values if value is not None)
    width = plots.WIDTH - NAME_WIDTH - VALUE_WIDTH
    parts: list[str] = []
    top = 8.0
    for row in rows:
        bars = [(name, color, value) for name, color, values in kept if (value := values[row]) is not None]
        height = len(bars) * BAR_HEIGHT
        parts.append(_name(names[row], top + height / 2 + 4))
        for position, (name, color, value) in enumerate(bars):
            y = top + position * BAR_HEIGHT
            length = value / largest * width if largest > 0 else 0.0
            title = f"{names[row]}, {name}: {value_format(value)}"
            parts.append(
                f'<rect x="{NAME_WIDTH}" y="{y + 1:.1f}" width="{max(length, 0.8):.1f}" '
                f'height="{BAR_HEIGHT - 2:.1f}" rx="2" style="fill:{color}"><title>{escape(title)}</title></rect>'
            )
            parts.append(
                plots.text_at("value", NAME_WIDTH + length + 6, y + BAR_HEIGHT - 3, "start", value_format(value))
            )
        top += height + ROW_GAP
    parts.append(f'<line class="axis" x1="{NAME_WIDTH}" y1="4" x2="{NAME_WIDTH}" y2="{top - 6:.1f}"/>')
    parts.append(plots.text_at("label", NAME_WIDTH, top + 10, "start", label))
    return plots.svg(parts, description or label, top + 20)


def _name(name: str, y: float) -> str:
    shown = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    return plots.text_at("name", NAME_WIDTH - 10, y, "end", shown)
