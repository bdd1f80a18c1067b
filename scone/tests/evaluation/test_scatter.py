"""Scatter and row charts: the Pareto front is what nothing beats, and labels do not lie on each other."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from scone.evaluation import plots
from scone.evaluation.row_chart import LONGEST_NAME, NAME_WIDTH, row_chart
from scone.evaluation.scatter import CHARACTER_WIDTH, LABEL_HEIGHT, Box, Point, pareto_front, scatter_chart

coordinates = st.tuples(st.integers(1, 30), st.integers(1, 30))


@settings(max_examples=200, deadline=None)
@given(points=st.lists(coordinates, max_size=30))
def test_pareto_front_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    def beaten(point: tuple[int, int]) -> bool:
        return any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points)

    assert pareto_front(points) == sorted({point for point in points if not beaten(point)})


def label_boxes(svg: str) -> list[Box]:
    boxes = []
    for text in ElementTree.fromstring(svg).iter("text"):
        if text.get("class") == "point-label":
            width = len(text.text) * CHARACTER_WIDTH
            x, middle = float(text.get("x")), float(text.get("y")) - 4
            left = x if text.get("text-anchor") == "start" else x - width
            half = LABEL_HEIGHT / 2 - 0.2  # coordinates are written to one decimal
            boxes.append(Box(left + 0.2, middle - half, left + width - 0.2, middle + half))
    return boxes


@settings(max_examples=60, deadline=None)
@given(points=st.lists(st.tuples(st.floats(1e6, 1e9), st.floats(10, 40)), min_size=1, max_size=10))
def test_labels_do_not_overlap_and_stay_inside(points: list[tuple[float, float]]) -> None:
    named = [Point(f"model-{i}", x, y, "red") for i, (x, y) in enumerate(points)]
    boxes = label_boxes(scatter_chart(named, "x", "y"))
    assert len(boxes) == len(points)
    for index, box in enumerate(boxes):
        assert box.left >= plots.LEFT - 1
        assert box.right <= plots.WIDTH
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_models_of_equal_flops_are_told_apart() -> None:
    """The usual picture: everything at one x, some of it at nearly one y."""
    values = [24.3, 22.1, 21.9, 21.5, 21.45, 21.4, 21.2, 19.3]
    boxes = label_boxes(scatter_chart([Point(f"SCONE-Small-{y}", 250e6, y, "red") for y in values], "x", "y"))
    assert len(boxes) == len(values)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_labels_of_a_column_lie_as_their_points_do() -> None:
    """A leader that crosses others leads to the wrong point."""
    values = [190.0, 173.0, 159.0, 158.0, 149.0, 147.0, 141.0]
    points = [Point(f"model-{y}", 1.0, y, "red") for y in values]
    svg = scatter_chart([*points, Point("other", 2.0, 218.0, "red")], "x", "y", x_logarithmic=False)
    labels = [box.top for box in label_boxes(svg) if box.left < plots.WIDTH / 2]
    assert len(labels) == len(points)
    names = [text.text for text in ElementTree.fromstring(svg).iter("text") if text.get("class") == "point-label"]
    by_height = [name for _, name in sorted(zip(labels, names[-len(labels) :], strict=True))]
    assert by_height == [point.name for point in points]


def test_points_that_cannot_be_drawn_are_left_out() -> None:
    assert scatter_chart([], "x", "y") == ""
    assert scatter_chart([Point("a", 0.0, 1.0, "red"), Point("b", 1.0, math.inf, "red")], "x", "y") == ""
    svg = scatter_chart([Point("a & b", 2.0, 1.0, "red", (0.5, 1.5)), Point("c", math.nan, 1.0, "red")], "x", "y")
    root = ElementTree.fromstring(svg)
    assert len(root.findall("circle")) == 1
    assert [line.get("class") for line in root.findall("line")].count("whisker") == 1


def test_a_name_wider_than_the_plot_is_still_drawn() -> None:
    assert len(label_boxes(scatter_chart([Point("x" * 200, 1.0, 1.0, "red")], "x", "y"))) == 1


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.none() | st.floats(0, 1e12), min_size=1, max_size=6))
def test_rows_show_every_value_in_proportion(values: list[float | None]) -> None:
    names = [f"a model of a name <{'x' * i * 6}>" for i in range(len(values))]
    svg = row_chart(names, [("bytes", "red", values), ("nothing", "blue", [None] * len(values))], "bytes")
    present = [value for value in values if value is not None]
    if not present:
        assert svg == ""
        return
    root = ElementTree.fromstring(svg)
    widths = [float(rect.get("width")) for rect in root.findall("rect")]
    assert len(widths) == len(present)
    for width, value in zip(widths, present, strict=True):
        full = plots.WIDTH - NAME_WIDTH - 64
        expected = value / max(present) * full if max(present) else 0
        assert abs(width - max(expected, 0.8)) < 0.1
    shown = [text.text for text in root.iter("text") if text.get("class") == "name"]
    assert len(shown) == len(present)
    assert all(len(name) <= LONGEST_NAME for name in shown)
