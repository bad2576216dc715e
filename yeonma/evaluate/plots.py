"""Plots as SVG: a metric's values with their intervals, how long answers are, the loss of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from yeonma.evaluate.report import shown

WIDTH = 320
COLOURS = 6  # that the style sheet has
BINS = 16


def colour(model: int) -> str:
    return f"var(--m{model % COLOURS})"


def svg(height: float, about: str, parts: Sequence[str]) -> str:
    """`about` is what those read who do not see it."""
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(about)}">{"".join(parts)}</svg>'


def metric_bars(metric: Mapping[str, Any], names: Sequence[str]) -> str:
    """A bar a model from zero, with its 95% interval as a whisker. Empty where no value is known."""
    values, intervals = metric["values"], metric["intervals"]
    ends = [value for value in values if value is not None]
    ends += [end for between in intervals if between for end in between]
    if not ends:
        return ""
    low, high = min(0.0, *ends), max(0.0, *ends)
    scale = (WIDTH - 70) / ((high - low) or 1)

    def x(value: float) -> float:
        return 4 + (value - low) * scale

    parts, told = [], []
    for at, (name, value, between) in enumerate(zip(names, values, intervals, strict=True)):
        top = 4 + at * 40
        parts.append(_text(4, top + 11, _short(name)))
        if value is None:
            parts.append(_text(4, top + 29, "-"))
            continue
        left, right = sorted((x(0), x(value)))
        parts.append(
            f'<rect x="{left:.1f}" y="{top + 16}" width="{max(right - left, 0.5):.1f}" height="18" '
            f'fill="{colour(at)}"/>'
        )
        end = right
        if between:
            a, b = (x(end) for end in between)
            end = max(end, b)
            parts.append(
                f'<path class="whisker" fill="none" d="M{a:.1f} {top + 20}v10M{a:.1f} {top + 25}H{b:.1f}'
                f'M{b:.1f} {top + 20}v10"/>'
            )
        parts.append(_text(end + 5, top + 29, shown(value)))
        told.append(
            f"{name} {shown(value)}" + (f" ({shown(between[0])} to {shown(between[1])})" if between else "")
        )
    return svg(8 + 40 * len(names), f"{metric['name']}: {', '.join(told)}", parts)


def length_lines(lengths: Mapping[str, Sequence[int]], colours: Sequence[str]) -> str:
    """How many texts are how long, a stepped line for each of the names."""
    longest = max((max(each, default=0) for each in lengths.values()), default=0)
    edges = np.linspace(0, max(longest, 1), BINS + 1)
    counts = [np.histogram(each, edges)[0] for each in lengths.values()]
    most = max(1, *(int(each.max()) for each in counts))
    left, bottom, wide, high = 30, 130, WIDTH - 40, 115
    parts = [
        _axes(left, bottom, wide),
        _text(left, bottom + 14, "0"),
        _text(left - 26, bottom - high + 8, str(most)),
    ]
    parts.append(_text(left + wide, bottom + 14, f"{longest} characters", "end"))
    told = []
    for at, (name, each) in enumerate(zip(lengths, counts, strict=True)):
        points = "".join(
            f"V{bottom - count / most * high:.1f}H{left + (number + 1) / BINS * wide:.1f}"
            for number, count in enumerate(each.tolist())
        )
        parts.append(
            f'<path d="M{left} {bottom}{points}V{bottom}" fill="none" stroke="{colours[at]}" stroke-width="2"'
            f"{_dash(at)}/>"
        )
        middle = float(np.median(lengths[name])) if len(lengths[name]) else 0.0
        told.append(f"{name} median {middle:.0f}")
    return svg(150, f"Lengths in characters: {', '.join(told)}", parts)


def loss_curve(curve: Mapping[str, Sequence[Sequence[float]]], model: int) -> str:
    """Training loss by step as a line, the looks at the validation rows as points."""
    training, validation = curve["training"], curve["validation"]
    points = [*training, *validation]
    last = max((step for step, _ in points), default=1) or 1
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    left, bottom, wide, tall = 36, 130, WIDTH - 46, 112

    def place(step: float, loss: float) -> tuple[float, float]:
        return left + step / last * wide, bottom - (loss - low) / ((high - low) or 1) * tall - 2

    parts = [
        _axes(left, bottom, wide),
        _text(left - 34, 20, shown(high)),
        _text(left - 34, bottom, shown(low)),
    ]
    parts += [_text(left, bottom + 14, "0"), _text(left + wide, bottom + 14, f"step {last:.0f}", "end")]
    if training:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in training))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour(model)}" stroke-width="1.5"/>')
    for x, y in (place(*point) for point in validation):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--wanted)"/>')
    ends = [f"{name} {shown(each[0][1])} to {shown(each[-1][1])}" for name, each in curve.items() if each]
    return svg(150, f"Loss of the run: {', '.join(ends)}", parts)


def _axes(left: float, bottom: float, wide: float) -> str:
    return f'<path class="axis" fill="none" d="M{left} 8V{bottom}H{left + wide}"/>'


def _dash(at: int) -> str:
    return f' stroke-dasharray="{3 * at} 3"' if at else ""


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"...{name[-37:]}"


def legend(names: Sequence[str], colours: Sequence[str]) -> Iterator[str]:
    for name, each in zip(names, colours, strict=True):
        yield f'<span style="white-space:nowrap"><i class="key" style="background:{each}"></i>{escape(name)}</span> '
