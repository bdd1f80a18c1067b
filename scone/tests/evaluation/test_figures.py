"""Figures: well-formed, every value is drawn, colours are the page's, labels do not lie on each other."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.evaluation import figures
from scone.evaluation.figures import (
    PALETTE,
    PLAIN_COLOR,
    Line,
    Point,
    bar_figure,
    line_figure,
    pareto_front,
    row_figure,
    scatter_figure,
)


def parsed(svg: str) -> ElementTree.Element:
    """As a browser reads it inside of a page; fails where it is not well-formed or names a colour of its own."""
    assert not re.search(r"#[0-9a-f]{6}\b|nan", svg), "colours are the page's, and every number is one"
    return ElementTree.fromstring(svg.replace("xlink:href", "href"))


def titles(svg: str) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter("title")]


numbers = st.sampled_from([0.0, math.nan]) | st.floats(1e-3, 1e6)


@settings(max_examples=20, deadline=None)
@given(
    points=st.lists(
        st.tuples(st.sampled_from([0.0, math.nan]) | st.floats(1e-3, 1e6), st.floats(-50, 50)), max_size=12
    ),
    logarithmic=st.booleans(),
)
def test_lines_show_every_point_that_can_be_drawn(points: list[tuple[float, float]], logarithmic: bool) -> None:
    drawn = [x for x, _ in points if math.isfinite(x) and (x > 0 or not logarithmic)]
    svg = line_figure([Line("a < b & c", points, PLAIN_COLOR, markers=True)], "x", "y", logarithmic=logarithmic)
    if not drawn:
        assert svg == ""
        return
    assert sum(title.startswith("a < b & c:") for title in titles(svg)) == len(drawn)
    assert "var(--series-1)" in svg


def test_bars_are_as_high_as_their_values() -> None:
    svg = bar_figure(["1", "2 & more"], [("plain", PLAIN_COLOR, [1.0, 2.0]), ("S", PALETTE[0], [0.5, None])], "x", "y")
    assert [title for title in titles(svg) if ":" in title] == ["plain, 1: 1.00", "plain, 2 & more: 2.00", "S, 1: 0.50"]
    heights = [_span(path, axis=1) for path in _bars(svg)]
    assert heights == pytest.approx([heights[0], 2 * heights[0], heights[0] / 2], rel=1e-3)
    assert bar_figure([], [], "x", "y") == ""


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.none() | st.just(0.0) | st.floats(1e-3, 1e12), min_size=1, max_size=5))
def test_rows_show_every_value_in_proportion(values: list[float | None]) -> None:
    names = [f"a model of a name <{'x' * i * 6}>" for i in range(len(values))]
    svg = row_figure(names, [("bytes", PALETTE[0], values)], "bytes")
    present = [value for value in values if value is not None]
    if not present:
        assert svg == ""
        return
    widths = [_span(path, axis=0) for path in _bars(svg)]
    expected = [value / (max(present) or 1) * max(widths) for value in present]
    assert widths == pytest.approx(expected, abs=0.01)
    assert max(present) == 0 or max(widths) > figures.WIDTH / 2
    shown = [text.text or "" for text in parsed(svg).iter("text") if (text.text or "").startswith("a model")]
    assert len(shown) == len(present)
    assert all(len(name) <= figures.LONGEST_NAME for name in shown)


def _bars(svg: str) -> list[str]:
    groups = [group for group in parsed(svg).iter("g") if group.find("title") is not None]
    return [group.find("path").get("d") for group in groups]  # type: ignore[union-attr]


def _span(path: str, axis: int) -> float:
    numbers = [float(pair[axis]) for pair in re.findall(r"([\d.e-]+) ([\d.e-]+)", path)]
    return max(numbers) - min(numbers)


coordinates = st.tuples(st.integers(1, 30), st.integers(1, 30))


@settings(max_examples=200, deadline=None)
@given(points=st.lists(coordinates, max_size=30))
def test_pareto_front_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    def beaten(point: tuple[int, int]) -> bool:
        return any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points)

    assert pareto_front(points) == sorted({point for point in points if not beaten(point)})


def label_boxes(svg: str) -> list[tuple[float, float, float]]:
    """(left, right, middle) of every label of a scatter plot."""
    boxes = []
    for text in parsed(svg).iter("text"):
        if (name := text.text or "").startswith("model-"):
            width = len(name) * figures.CHARACTER_WIDTH
            x, y = float(text.get("x", "nan")), float(text.get("y", "nan"))
            left = x - width if "text-anchor: end" in text.get("style", "") else x
            boxes.append((left, left + width, y))
    return boxes


@settings(max_examples=30, deadline=None)
@given(points=st.lists(st.tuples(st.floats(1e6, 1e9), st.floats(10, 40)), min_size=2, max_size=10))
def test_labels_do_not_overlap(points: list[tuple[float, float]]) -> None:
    svg = scatter_figure([Point(f"model-{i}", x, y, PALETTE[0]) for i, (x, y) in enumerate(points)], "x", "y")
    boxes = label_boxes(svg)
    assert len(boxes) == len(points)
    for index, (left, right, middle) in enumerate(boxes):
        assert left >= 0
        assert right <= figures.WIDTH
        for other_left, other_right, other in boxes[:index]:
            apart = right <= other_left or other_right <= left
            assert apart or abs(middle - other) >= figures.LABEL_HEIGHT - 0.01


def test_points_that_cannot_be_drawn_are_left_out() -> None:
    assert scatter_figure([], "x", "y") == ""
    points = [Point("a & b", 2.0, 1.0, PLAIN_COLOR, (0.5, 1.5)), Point("c", 3.0, 2.0, PLAIN_COLOR)]
    svg = scatter_figure([*points, Point("d", math.nan, 1.0, PLAIN_COLOR), Point("e", 0.0, 1.0, PLAIN_COLOR)], "x", "y")
    assert sorted(titles(svg)) == ["Pareto front", "a & b: 1 at 2", "a & b: seeds", "c: 2 at 3"]
