"""Plots: round ticks, well-formed SVG, nothing drawn for nothing."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.evaluation.plots import Series, bar_chart, legend, line_chart, logarithmic_axis, round_ticks, short_number

numbers = st.floats(-1e3, 1e3, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(low=numbers, span=st.floats(1e-3, 1e9))
def test_ticks_are_round_few_and_inside(low: float, span: float) -> None:
    high = low + span
    ticks = round_ticks(low, high)
    assert len(ticks) <= 13
    assert all(low - span * 1e-6 <= tick <= high + span * 1e-6 for tick in ticks)
    assert ticks == sorted(ticks)


@settings(max_examples=50, deadline=None)
@given(points=st.lists(st.tuples(st.floats(0.1, 1e6), st.floats(-50, 50)), max_size=20), logarithmic=st.booleans())
def test_line_chart_is_well_formed(points: list[tuple[float, float]], logarithmic: bool) -> None:
    svg = line_chart([Series("a < b & c", points, "red", markers=True)], "x", "y", x_logarithmic=logarithmic)
    if not points:
        assert svg == ""
        return
    root = ElementTree.fromstring(svg)
    assert "nan" not in svg
    assert len(root.findall("circle")) == len(points)


def test_points_that_cannot_be_drawn_are_left_out() -> None:
    points = [(0.0, 1.0), (1.0, math.nan), (10.0, 2.0), (100.0, math.inf), (1000.0, 3.0)]
    svg = line_chart([Series("a", points, "red", markers=True)], "x", "y", x_logarithmic=True)
    assert svg.count("<circle") == 2


def test_bar_chart_is_well_formed() -> None:
    svg = bar_chart(["1", "2 & more"], [("plain", "grey", [1.0, 2.0]), ("SCONE", "red", [0.5, None])], "x", "y")
    root = ElementTree.fromstring(svg)
    assert len(root.findall("rect")) == 3
    assert bar_chart([], [], "x", "y") == ""


def test_logarithmic_axis_has_ticks_even_for_one_value() -> None:
    assert logarithmic_axis([5.0]).ticks
    assert logarithmic_axis([1.0, 1e6]).ticks == [1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6]


@pytest.mark.parametrize(("value", "text"), [(1_500_000, "1.5M"), (2000, "2k"), (0.25, "0.25"), (0, "0"), (3e9, "3G")])
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text


def test_legend_escapes_names() -> None:
    assert "a &lt; b" in legend([("a < b", "red", True)])
