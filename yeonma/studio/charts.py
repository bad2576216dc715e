"""Curves of a run as SVG, in the colours of the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from yeonma import svg
from yeonma.messages import tr
from yeonma.shown import html, size_text
from yeonma.studio.curves import Curves

WIDTH, HEIGHT = 400, 210
SPARK_WIDTH, SPARK_HEIGHT = 180, 36
STRETCHES = 150
"""Stretches of steps, of which the lowest and the highest number are drawn."""

ChartLine = tuple[str, Sequence[svg.Point]]
"""CSS class of its colour, and its points."""


def charts(curves: Curves) -> str:
    """Loss, learning rate, tokens per second and memory, each as far as there are numbers."""
    loss = [("training", curves.points("loss")), ("validation", curves.points("loss", evaluations=True))]
    memory = [(step, size / 1e9) for step, size in curves.points("peak_memory_bytes")]
    found = [
        _chart(tr("loss"), loss, _four_digits),
        _chart(
            tr("learning rate"), [("training", curves.points("learning_rate"))], lambda rate: f"{rate:.2g}"
        ),
        _chart(
            tr("tokens per second"), [("training", curves.tokens_per_second())], lambda rate: f"{rate:,.0f}"
        ),
        _chart(tr("peak memory in GB"), [("training", memory)], lambda size: size_text(round(size * 1e9))),
    ]
    if reward := curves.points("reward_margin"):
        found.append(_chart(tr("reward margin"), [("training", reward)], _four_digits))
    if accuracy := curves.points("accuracy", evaluations=True):
        found.append(_chart(tr("accuracy"), [("validation", accuracy)], _four_digits))
    return "".join(found)


def _four_digits(value: float) -> str:
    return f"{value:.4g}"


def _chart(title: str, lines: Sequence[ChartLine], shown: Callable[[float], str]) -> str:
    """One figure; empty without points. shown: a number as text."""
    points = [point for _, line in lines for point in line]
    if not points:
        return ""
    steps = [step for step, _ in points]
    x_range = (min(steps), max(steps)) if min(steps) < max(steps) else (steps[0] - 1, steps[0] + 1)
    axes = svg.Axes(56, 10, WIDTH - 74, HEIGHT - 40, x_range, svg.padded([value for _, value in points]))
    elements = [*axes.frame(svg.round_ticks(*x_range, 5, whole=True), svg.round_ticks(*axes.y_range, 4))]
    words = {"training": tr("training"), "validation": tr("validation")}
    keys, descriptions = [], []
    for name, line in lines:
        if not line:
            continue
        places = axes.places(svg.extremes(line, STRETCHES))
        elements.append(svg.line(places, class_=name, stroke="currentColor", stroke_width=1.5))
        if len(line) < 60:
            elements.append(svg.dots(places, 5, class_=name, stroke="currentColor"))
        last = shown(line[-1][1])
        if len(lines) > 1:
            last = tr("{name} {value}", name=words[name], value=last)
        keys.append(f'<span class="key {name}">{html(last)}</span>')
        descriptions.append(
            tr("{name} {first} to {last}", name=words[name], first=shown(line[0][1]), last=shown(line[-1][1]))
        )
    description = tr(
        "{title}, steps {first:,} to {last:,}: {lines}",
        title=title,
        first=min(steps),
        last=max(steps),
        lines=", ".join(descriptions),
    )
    drawn = svg.drawing(WIDTH, HEIGHT, description, elements)
    return f"<figure><figcaption>{html(title)} {''.join(keys)}</figcaption>{drawn}</figure>"


def sparkline(curves: Curves) -> str:
    """The training loss as a small line without axes; empty without two steps."""
    points = curves.points("loss")
    if len(points) < 2:
        return ""
    axes = svg.Axes(
        2,
        3,
        SPARK_WIDTH - 4,
        SPARK_HEIGHT - 6,
        (points[0][0], points[-1][0]),
        svg.padded([loss for _, loss in points]),
    )
    line = svg.line(
        axes.places(svg.extremes(points, 60)), class_="training", stroke="currentColor", stroke_width=1.5
    )
    description = tr(
        "loss {first} to {last}", first=_four_digits(points[0][1]), last=_four_digits(points[-1][1])
    )
    return f'<div class="spark">{svg.drawing(SPARK_WIDTH, SPARK_HEIGHT, description, [line])}</div>'
