"""Labelled points as inline SVG: which model is where, which of them no other beats (the Pareto front)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from scone.evaluation import plots
from scone.evaluation.plots import Axis, linear_axis, logarithmic_axis, round_ticks, short_number

LABEL_HEIGHT = 14.0
CHARACTER_WIDTH = 6.7
"""Of a label's font, rather too wide than too narrow: nothing measures text here."""
POINT_RADIUS = 4.5
FEWEST_TICKS = 3


@dataclass(frozen=True)
class Point:
    """A named point (x, y). ``spread``: lowest and highest y over seeds, drawn as a whisker. Empty names are not
    written.
    """

    name: str
    x: float
    y: float
    color: str
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Box:
    """A rectangle in the plot's units."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two share some area."""
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats in both (lower is better), by rising x; of equal ones, one."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def scatter_chart(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    x_logarithmic: bool = True,
    front: bool = True,
    y_format: Callable[[float], str] = short_number,
    description: str = "",
    trend: Sequence[tuple[float, float]] = (),
    character_width: float = CHARACTER_WIDTH,
) -> str:
    """An SVG of named points, with the Pareto front (low x and low y are good) as a dotted staircase.

    ``trend``: a line to compare the points with, such as one model at several budgets. ``character_width``: of a
    label's font, for pages that set another one.

    Empty text when there is nothing to draw. Points with a non-finite coordinate are left out.
    """
    drawn = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    drawn = [point for point in drawn if point.x > 0 or not x_logarithmic]
    if not drawn:
        return ""
    xs = [point.x for point in drawn]
    ys = [y for point in drawn for y in (point.y, *(point.spread or ()))]
    xs += [x for x, _ in trend]
    ys += [y for _, y in trend]
    x_axis = widened(logarithmic_axis(xs)) if x_logarithmic else linear_axis(xs)
    y_axis = _with_room_for_labels(linear_axis(ys))
    parts = [plots.grid(x_axis, y_axis, x_label, y_label, y_format)]
    places = [(plots.x_place(x_axis, point.x), plots.y_place(y_axis, point.y)) for point in drawn]
    if front and len(drawn) > 1:
        parts.append(_staircase(pareto_front([(point.x, point.y) for point in drawn]), x_axis, y_axis))
    if trend:
        path = " ".join(f"{plots.x_place(x_axis, x):.1f},{plots.y_place(y_axis, y):.1f}" for x, y in trend)
        parts.append(f'<polyline class="trend" points="{path}"/>')
    parts += [_whisker(point, place, y_axis) for point, place in zip(drawn, places, strict=True) if point.spread]
    for point, (x, y) in zip(drawn, places, strict=True):
        parts.append(
            f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="{POINT_RADIUS}" style="fill:{point.color}">'
            f"<title>{escape(point.name)}: {y_format(point.y)} at {short_number(point.x)}</title></circle>"
        )
    parts += _labels([point.name for point in drawn], places, character_width)
    return plots.svg(parts, description or f"{y_label} over {x_label}")


def widened(axis: Axis) -> Axis:
    """A logarithmic axis with a little room at both ends, so that no point lies on the frame, and enough ticks."""
    room = (axis.high / axis.low) ** 0.06
    low, high = axis.low / room, axis.high * room
    ticks = axis.ticks if len(axis.ticks) >= FEWEST_TICKS else round_ticks(low, high, FEWEST_TICKS)
    return Axis(low, high, ticks, True)


def _with_room_for_labels(axis: Axis) -> Axis:
    """Room below the lowest and above the highest point, so that a label of theirs can make way to there."""
    room = (axis.high - axis.low) * 0.07
    return Axis(axis.low - room, axis.high + room, round_ticks(axis.low - room, axis.high + room))


def _staircase(front: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis) -> str:
    """What is attainable: to the right of a point and above it there is something better."""
    corners: list[tuple[float, float]] = []
    for x, y in front:
        if corners:
            corners.append((x, corners[-1][1]))
        corners.append((x, y))
    corners.append((x_axis.high, corners[-1][1]))
    path = " ".join(f"{plots.x_place(x_axis, x):.1f},{plots.y_place(y_axis, y):.1f}" for x, y in corners)
    return f'<polyline class="front" points="{path}"><title>Pareto front</title></polyline>'


def _whisker(point: Point, place: tuple[float, float], y_axis: Axis) -> str:
    assert point.spread is not None
    low, high = (plots.y_place(y_axis, value) for value in point.spread)
    x = place[0]
    return (
        f'<line class="whisker" x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" style="stroke:{point.color}"/>'
    )


def _labels(names: Sequence[str], places: Sequence[tuple[float, float]], character_width: float) -> list[str]:
    """Each name beside its point, moved up or down (with a leader) where others are in the way."""
    points = [Box(x - POINT_RADIUS, y - POINT_RADIUS, x + POINT_RADIUS, y + POINT_RADIUS) for x, y in places]
    placed: dict[int, tuple[Box, bool]] = {}
    for index in sorted(range(len(names)), key=lambda i: places[i][1]):
        if names[index]:
            taken = [box for box, _ in placed.values()]
            placed[index] = _free_place(len(names[index]) * character_width, *places[index], [*taken, *points])
    _in_order(placed, places)
    parts = []
    for index, (box, right) in placed.items():
        x, y = places[index]
        middle = (box.top + box.bottom) / 2
        near = box.left - 2 if right else box.right + 2
        if abs(middle - y) > LABEL_HEIGHT / 2:
            parts.append(f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{near:.1f}" y2="{middle:.1f}"/>')
        text_x, anchor = (box.left, "start") if right else (box.right, "end")
        parts.append(plots.text_at("point-label", text_x, middle + 4, anchor, names[index]))
    return parts


def _in_order(placed: dict[int, tuple[Box, bool]], places: Sequence[tuple[float, float]]) -> None:
    """Of points above each other, let the labels lie in the points' order, so that their leaders do not cross."""
    columns: dict[tuple[int, bool], list[int]] = {}
    for index, (_, right) in placed.items():
        columns.setdefault((round(places[index][0]), right), []).append(index)
    for (_, right), column in columns.items():
        heights = sorted(placed[index][0].top for index in column)
        moved = {}
        for index, top in zip(sorted(column, key=lambda i: places[i][1]), heights, strict=True):
            box = placed[index][0]
            moved[index] = Box(box.left, top, box.right, top + box.bottom - box.top), right
        others = [box for index, (box, _) in placed.items() if index not in moved]
        boxes = [box for box, _ in moved.values()]
        if not any(box.overlaps(other) for box in boxes for other in others):
            placed.update(moved)


def _free_place(width: float, x: float, y: float, taken: Sequence[Box]) -> tuple[Box, bool]:
    """Where a label of ``width`` fits, and whether right of its point; as near as can be, inside the plot."""
    best: tuple[float, Box, bool] | None = None
    for step in range(40):
        for shift in (-step, step) if step else (0,):
            for right in (True, False):
                gap = 9.0 if abs(shift) * LABEL_HEIGHT / 2 <= 6 else 16.0
                left = x + gap if right else x - gap - width
                middle = y + shift * LABEL_HEIGHT / 2
                box = Box(left, middle - LABEL_HEIGHT / 2, left + width, middle + LABEL_HEIGHT / 2)
                inside = (
                    box.left >= plots.LEFT
                    and box.right <= plots.WIDTH - plots.RIGHT / 2
                    and box.top >= plots.TOP / 2
                    and box.bottom <= plots.HEIGHT - plots.BOTTOM
                )
                if not inside:
                    continue
                overlaps = sum(map(box.overlaps, taken))
                if not overlaps:
                    return box, right
                cost = overlaps + step / 100
                if best is None or cost < best[0]:
                    best = (cost, box, right)
    if best is None:  # a name wider than the plot
        return Box(plots.LEFT, y - LABEL_HEIGHT / 2, plots.LEFT + width, y + LABEL_HEIGHT / 2), True
    return best[1], best[2]
