"""SVG plots: ticks, thinning, escaping."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from yeonma.svg import Axes, drawing, extremes, number, padded, round_ticks, spaced, text


@pytest.mark.parametrize(
    ("low", "high", "most", "labels"),
    [
        (0, 1, 5, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.43, 1.71, 6, ["0.5", "1.0", "1.5"]),
        (-3, 2, 5, ["-3", "-2", "-1", "0", "1", "2"]),
        (2.3, 2.31, 4, ["2.300", "2.305", "2.310"]),
        (0, 120_000, 3, ["0", "50,000", "100,000"]),
        (3e-9, 9e-9, 3, ["4e-09", "6e-09", "8e-09"]),
        (7e11, 9e11, 2, ["7e+11", "8e+11", "9e+11"]),
    ],
)
def test_ticks_are_round_numbers_with_the_digits_they_need(
    low: float, high: float, most: int, labels: list[str]
) -> None:
    assert [label for _, label in round_ticks(low, high, most)] == labels


@pytest.mark.parametrize("high", [1, 2, 3, 7, 40, 1234, 99_999])
def test_whole_ticks_are_two_to_nine_integers(high: int) -> None:
    ticks = round_ticks(0, high, 8, whole=True)
    assert [label for _, label in ticks] == [f"{value:,.0f}" for value, _ in ticks]
    assert all(value == int(value) for value, _ in ticks)
    assert 2 <= len(ticks) <= 9


def test_padded_range_is_never_empty() -> None:
    assert padded([2.0]) == (1.92, 2.08)
    assert padded([0.0, 0.0]) == (-1.0, 1.0)
    assert padded([1.0, 2.0], share=0.5) == (0.5, 2.5)


def test_axes_map_numbers_to_coordinates() -> None:
    axes = Axes(10, 20, 100, 50, (0, 10), (1, 3))
    assert axes.places([(0, 1), (10, 3), (5, 2)]) == [(10, 70), (110, 20), (60, 45)]


def test_thinned_line_keeps_its_ends_and_the_extremes_of_every_part() -> None:
    points = [(step, float(step * 37 % 101)) for step in range(1000)]
    assert extremes(points, 499) == points
    assert spaced(points, 1000) == points
    thinned = extremes(points, 10)
    assert len(thinned) <= 22 and thinned == sorted(thinned)
    assert thinned[0] == points[0] and thinned[-1] == points[-1]
    for start in range(0, 1000, 100):
        part = points[start : start + 100]
        for pick in (min, max):
            assert pick(part, key=lambda point: point[1]) in thinned
    spaced_points = spaced(points, 10)
    assert len(spaced_points) == 10 and spaced_points[0] == points[0] and spaced_points[-1] == points[-1]


def test_texts_are_escaped_and_coordinates_are_rounded() -> None:
    content = '<b onload="x">&'
    root = ElementTree.fromstring(drawing(10, 5, content, [text(1, 2.04, content)], style="text{}"))
    assert root.get("aria-label") == content
    assert root[1].text == content
    assert [number(value) for value in (3, 3.04, 3.25, -0.5)] == ["3", "3", "3.2", "-0.5"]


def test_drawing_without_a_style_has_no_size() -> None:
    assert drawing(10, 5, "a", []) == '<svg viewBox="0 0 10 5" role="img" aria-label="a"/>'
