"""SVG plots: axes with round ticks, lines, dots and text.

The same numbers give the same bytes. A drawing has no scripts, links or fonts of its own, so it also works in a page
that forbids requests and in an `<img>`, where browsers load nothing for it. Colours come from CSS: from the page around
a drawing, or from the `style` of a drawing that is a file of its own.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from yeonma.shown import html

Point = tuple[float, float]
Ticks = Sequence[tuple[float, str]]


def drawing(width: float, height: float, description: str, elements: Sequence[str], style: str = "") -> str:
    """An `svg` element. `description` is for screen readers. With `style` it is a file of its own, of this size in
    pixels; without, it takes the size that the page gives it."""
    own: dict[str, str | float] = {}
    if style:
        own = {"xmlns": "http://www.w3.org/2000/svg", "width": width, "height": height}
    content = "".join([f"<style>{style}</style>" if style else "", *elements])
    box = f"0 0 {number(width)} {number(height)}"
    return element("svg", content, **own, viewBox=box, role="img", aria_label=description)


def image(drawing: str, description: str) -> str:
    """A drawing that is a file of its own as an `img` element, so that its style does not reach the page around it."""
    data = b64encode(drawing.encode()).decode("ascii")
    return f'<img alt="{html(description)}" src="data:image/svg+xml;base64,{data}">'


def element(tag: str, content: str = "", /, **attributes: str | float) -> str:
    """An element with `content`, which is SVG, not text. `stroke_width` is the attribute `stroke-width`, `class_` is
    `class`."""
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html(value) if isinstance(value, str) else number(value)}"'
        for name, value in attributes.items()
    )
    return f"<{tag}{named}>{content}</{tag}>" if content else f"<{tag}{named}/>"


def text(x: float, y: float, content: str, anchor: str = "start") -> str:
    """One line of text. `anchor`: which part of it is at `x`: start, middle or end."""
    return element("text", html(content), x=x, y=y, text_anchor=anchor)


def line(points: Sequence[Point], **attributes: str | float) -> str:
    return element("polyline", points=" ".join(map(_pair, points)), fill="none", **attributes)


def dots(points: Sequence[Point], diameter: float, **attributes: str | float) -> str:
    """Round dots, as one path of lines without length: a tenth of the bytes of as many circles."""
    path = "".join(f"M{_pair(point)}h0" for point in points)
    return element("path", d=path, stroke_width=diameter, stroke_linecap="round", **attributes)


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def _pair(point: Point) -> str:
    return f"{number(point[0])},{number(point[1])}"


@dataclass(frozen=True)
class Axes:
    """A rectangle of the drawing, and the numbers at its edges. `x` and `y` give the place of a number."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * self.width

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.top + (high - value) / (high - low) * self.height

    def places(self, points: Sequence[Point]) -> list[Point]:
        return [(self.x(x), self.y(y)) for x, y in points]

    def frame(self, x_ticks: Ticks, y_ticks: Ticks) -> Iterator[str]:
        """Both axes, a grid line for each tick of y, and the ticks' texts."""
        right, bottom = self.left + self.width, self.top + self.height
        grid = "".join(f"M{number(self.left)} {number(self.y(y))}H{number(right)}" for y, _ in y_ticks)
        marks = "".join(f"M{number(self.x(x))} {number(bottom)}v4" for x, _ in x_ticks)
        corner = f"M{number(self.left)} {number(self.top)}V{number(bottom)}H{number(right)}"
        yield element("path", class_="grid", d=grid)
        yield element("path", class_="axis", fill="none", d=corner + marks)
        for x, label in x_ticks:
            yield text(self.x(x), bottom + 18, label, "middle")
        for y, label in y_ticks:
            yield text(self.left - 6, self.y(y) + 4, label, "end")


def padded(values: Sequence[float], share: float = 0.04) -> tuple[float, float]:
    """The range of `values` and a little more at both ends, so that it is never empty."""
    low, high = min(values), max(values)
    padding = (high - low) * share or abs(low) * share or 1.0
    return low - padding, high + padding


def round_ticks(low: float, high: float, most: int, whole: bool = False) -> Ticks:
    """At most `most` + 1 multiples of 1, 2 or 5 times a power of ten in a range, with their texts. `whole`: integers
    alone."""
    size = (high - low) / most
    power = math.floor(math.log10(size))
    factor = next(factor for factor in (1, 2, 5, 10) if factor * 10.0**power >= size * (1 - 1e-9))
    if factor == 10:
        factor, power = 1, power + 1
    if whole and power < 0:
        factor, power = 1, 0
    # Whole numbers of a step, so that no error adds up.
    step = factor * 10.0**power
    counts = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    if -5 <= power <= 5:
        return [(count * step, f"{count * step:,.{max(0, -power)}f}") for count in counts]
    return [(count * step, f"{count * step:.3g}") for count in counts]


def extremes(points: Sequence[Point], parts: int) -> list[Point]:
    """The lowest and the highest point of each of `parts` stretches of equally many points, in their order, so that a
    line through them shows every peak; with the first and the last point. `points` themselves if there are no more."""
    if len(points) <= 2 * parts + 2:
        return list(points)
    ends = [part * len(points) // parts for part in range(parts + 1)]
    stretches = (range(start, stop) for start, stop in pairwise(ends))
    indices = (
        sorted({pick(stretch, key=lambda index: points[index][1]) for pick in (min, max)})
        for stretch in stretches
    )
    return [points[index] for index in sorted({0, len(points) - 1, *chain.from_iterable(indices)})]


def spaced(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` of the points, evenly spaced, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[index * (len(points) - 1) // (most - 1)] for index in range(most)]
