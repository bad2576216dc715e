"""The losses of a run as an SVG: for loss.svg, with the scores of answers below, and for the curve that a notebook
shows meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from yeonma import svg
from yeonma.messages import tr

NO_SCORES: Mapping[str, Sequence[svg.Point]] = MappingProxyType({})
STRETCHES = 120
"""A long run's loss is drawn by the lowest and the highest of so many stretches of steps, so that the file stays small.
"""
STYLE = """
text{font:14px system-ui,sans-serif;fill:#1d2126}
.paper{fill:#fff}.grid{stroke:#e6e9ec}.axis{stroke:#9aa3ad}
.training{color:#2e6f95}.validation{color:#c2374d}
@media(prefers-color-scheme:dark){
text{fill:#e6e8eb}
.paper{fill:#14171a}.grid{stroke:#2a3036}.axis{stroke:#6b7280}
.training{color:#6cb6dc}.validation{color:#f28ba3}
}
"""


SCORE_HEIGHT, MOST_SCORES = 120, 8
"""Of the plot of one score, and how many there are at most."""


def loss_svg(
    training: Sequence[svg.Point],
    validation: Sequence[svg.Point],
    per: str,
    scores: Mapping[str, Sequence[svg.Point]] = NO_SCORES,
) -> str:
    """The plot of (step, loss) points, of which there must be one, as the content of a file, for light and dark
    themes: the training loss of each step with a moving mean, and the validation loss. `per`: the loss's unit, if it
    is known.

    It has a few kilobytes however long the run is: of a line with more points the extremes of `STRETCHES` stretches are
    drawn, and as many points of the moving mean, which is that of all steps.

    scores: by name, what evaluations measured on answers. Each has a plot of its own below, over the same steps.
    """
    shown = dict(list(scores.items())[:MOST_SCORES])
    width, height, name = 720, 400, tr("loss per {per}", per=per) if per else tr("loss")
    points = [*training, *validation]
    steps = [step for step, _ in points]
    x_range = (min(steps), max(steps)) if min(steps) < max(steps) else (steps[0] - 1, steps[0] + 1)
    axes = svg.Axes(70, 40, width - 110, height - 92, x_range, svg.padded([loss for _, loss in points]))
    bottom = axes.top + axes.height
    elements = [
        svg.element("rect", class_="paper", width=width, height=height + SCORE_HEIGHT * len(shown)),
        svg.text(14, 24, name),
        svg.text(axes.left + axes.width / 2, bottom + 40, tr("step"), "middle"),
        *axes.frame(svg.round_ticks(*x_range, 8, whole=True), svg.round_ticks(*axes.y_range, 6)),
    ]
    keys = []
    if 0 < len(training) < 10:
        elements += _line(axes.places(training), "training", 2)
        elements.append(_dots(axes.places(training), "training", 6))
        keys.append(("training", 1.0, "—", tr("training")))
    elif training:
        elements += _line(axes.places(svg.extremes(training, STRETCHES)), "training", 1, opacity=0.4)
        losses = np.array([loss for _, loss in training], dtype=np.float64)
        smooth = _moving_mean(losses, each_side=max(2, len(losses) // 40)).tolist()
        means = [(step, mean) for (step, _), mean in zip(training, smooth, strict=True)]
        elements += _line(axes.places(svg.spaced(means, STRETCHES)), "training", 2)
        keys += [
            ("training", 0.4, "—", tr("training, each step")),
            ("training", 1.0, "—", tr("training, moving mean")),
        ]
    if validation:
        places = axes.places(svg.extremes(validation, STRETCHES // 3))
        elements += _line(places, "validation", 2)
        elements.append(_dots(places, "validation", 7))
        keys.append(("validation", 1.0, "•", tr("validation")))
    elements.append(_legend(width - 14, 24, keys))
    from_to = [
        *([_from_to(tr("training"), training)] if training else []),
        *([_from_to(tr("validation"), validation)] if validation else []),
    ]
    for place, (score, measured) in enumerate(shown.items()):
        top = height + SCORE_HEIGHT * place + 16
        elements += _score(score, measured, axes, x_range, top)
        from_to.append(_from_to(score, measured))
    description = f"{name.capitalize()}: {', '.join(from_to)}"
    height += SCORE_HEIGHT * len(shown)
    return svg.drawing(width, height, description, elements, STYLE) + "\n"


def _score(
    name: str, points: Sequence[svg.Point], above: svg.Axes, x_range: tuple[float, float], top: float
) -> Iterator[str]:
    """A score over the steps, below the losses and as wide as they are."""
    y_range = svg.padded([score for _, score in points])
    axes = svg.Axes(above.left, top, above.width, SCORE_HEIGHT - 40, x_range, y_range)
    yield from axes.frame(svg.round_ticks(*x_range, 8, whole=True), svg.round_ticks(*axes.y_range, 3))
    places = axes.places(svg.extremes(points, STRETCHES // 3))
    yield from _line(places, "validation", 2)
    yield _dots(places, "validation", 7)
    yield svg.text(axes.left + axes.width, top - 4, name, "end")


def _from_to(name: str, points: Sequence[svg.Point]) -> str:
    return tr("{name} {first:.4g} to {last:.4g}", name=name, first=points[0][1], last=points[-1][1])


def _line(places: Sequence[svg.Point], name: str, width: float, opacity: float = 1.0) -> Iterator[str]:
    if len(places) > 1:
        look: dict[str, str | float] = {"stroke_width": width, "stroke_linejoin": "round"}
        if opacity < 1:
            look["stroke_opacity"] = f"{opacity:g}"
        yield svg.line(places, class_=name, stroke="currentColor", **look)


def _dots(places: Sequence[svg.Point], name: str, diameter: float) -> str:
    return svg.dots(places, diameter, class_=name, stroke="currentColor")


def _legend(x: float, y: float, keys: Sequence[tuple[str, float, str, str]]) -> str:
    """Ends at `x`. It is one text, so that it needs no widths of letters. `keys`: class, opacity, symbol, words."""
    parts = []
    for index, (name, opacity, symbol, words) in enumerate(keys):
        look: dict[str, str | float] = {"class_": name, "fill": "currentColor", "font_weight": "bold"}
        if index:
            look["dx"] = 14
        if opacity < 1:
            look["fill_opacity"] = f"{opacity:g}"
        parts.append(svg.element("tspan", symbol, **look))
        parts.append(svg.element("tspan", words, dx=5))
    return svg.element("text", "".join(parts), x=x, y=y, text_anchor="end")


def _moving_mean(values: np.ndarray, each_side: int) -> np.ndarray:
    """The mean of each value and of up to `each_side` neighbours before and after it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start = np.maximum(index - each_side, 0)
    stop = np.minimum(index + each_side + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)
