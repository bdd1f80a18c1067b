"""Figures: well-formed, every value is drawn, colours are the page's, labels do not lie on each other."""

from __future__ import annotations

import itertools
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
    scatter_figure,
)


def parsed(svg: str) -> ElementTree.Element:
    """As a browser reads it inside of a page; fails where it is not well-formed or names a colour of its own."""
    assert not re.search(r"#[0-9a-f]{6}\b|nan", svg), "colours are the page's, and every number is one"
    return ElementTree.fromstring(svg.replace("xlink:href", "href"))


coordinates = st.sampled_from([math.nan, math.inf]) | st.floats(-50, 1e6)


@settings(max_examples=20, deadline=None)
@given(points=st.lists(st.tuples(coordinates, coordinates), max_size=12))
def test_lines_show_every_point_that_can_be_drawn(points: list[tuple[float, float]]) -> None:
    drawn = [point for point in points if all(map(math.isfinite, point))]
    svg = line_figure([Line("a < b & c", points, PALETTE[0])], "x", "y")
    if not drawn:
        assert svg == ""
        return
    assert sum("var(--series-2)" in mark.get("style", "") for mark in parsed(svg).iter("use")) == len(drawn)


def test_bars_are_as_high_as_their_values() -> None:
    svg = bar_figure(["1", "2 & more"], [("plain", PLAIN_COLOR, [1.0, 2.0]), ("S", PALETTE[0], [0.5, None])], "x", "y")
    paths = [path.get("d") for path in parsed(svg).iter("path")
             if "clip-path" in path.attrib and "var(--series" in path.get("style", "")]  # fmt: skip
    tops = [[float(y) for y in re.findall(r"[\d.e-]+ ([\d.e-]+)", path)] for path in paths]
    heights = [max(ys) - min(ys) for ys in tops]
    assert heights == pytest.approx([heights[0], 2 * heights[0], heights[0] / 2], rel=1e-3)
    assert bar_figure([], [], "x", "y") == ""


@settings(max_examples=200, deadline=None)
@given(points=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=30))
def test_pareto_front_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    def beaten(point: tuple[int, int]) -> bool:
        return any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points)

    assert pareto_front(points) == sorted({point for point in points if not beaten(point)})


@settings(max_examples=30, deadline=None)
@given(points=st.lists(st.tuples(st.integers(10**6, 10**9), st.integers(10, 40)), min_size=2, max_size=10))
def test_labels_do_not_overlap(points: list[tuple[float, float]]) -> None:
    svg = scatter_figure([Point(f"model-{i}", x, y, PALETTE[0]) for i, (x, y) in enumerate(points)], "x", "y")
    texts = [text for text in parsed(svg).iter("text") if "model-" in (text.text or "")]
    heights = sorted(float(text.get("y", "nan")) for text in texts)
    assert len(heights) == len(points)
    assert all(above - below >= figures.LABEL_HEIGHT - 0.01 for below, above in itertools.pairwise(heights))


def test_points_that_cannot_be_drawn_are_left_out() -> None:
    assert scatter_figure([], "x", "y") == ""
    points = [Point("a & b", 2.0, 1.0, PLAIN_COLOR), Point("c" * 40, 3.0, 2.0, PLAIN_COLOR)]
    svg = scatter_figure([*points, Point("d", math.nan, 1.0, PLAIN_COLOR), Point("e", 0.0, 1.0, PLAIN_COLOR)], "x", "y")
    shown = [text.text or "" for text in parsed(svg).iter("text")]
    assert {"a & b", "c" * 21 + "…"} <= set(shown)
    assert not {"d", "e"} & set(shown)
