"""Plots of a report as SVG: metrics with their intervals, lengths of answers, loss of a run.

Colours are CSS variables of the page, so that the plots follow its light and dark themes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from yeonma.evaluate.report import format_number

WIDTH = 320
MODEL_COLOURS = 6  # --m0 to --m5 in report.css
BINS = 16


def model_colour(model: int) -> str:
    return f"var(--m{model % MODEL_COLOURS})"


def metric_bars(metric: Mapping[str, Any], names: Sequence[str]) -> str:
    """A bar for each model, with the 95% interval as a whisker. Empty if no value is known."""
    values, intervals = metric["values"], metric["intervals"]
    numbers = [value for value in values if value is not None]
    numbers += [end for interval in intervals if interval for end in interval]
    if not numbers:
        return ""
    low, high = min(0.0, *numbers), max(0.0, *numbers)
    scale = (WIDTH - 70) / ((high - low) or 1)

    def x(value: float) -> float:
        return 4 + (value - low) * scale

    elements, descriptions = [], []
    for model, (name, value, interval) in enumerate(zip(names, values, intervals, strict=True)):
        top = 4 + model * 40
        elements.append(_text(4, top + 11, name if len(name) <= 40 else f"...{name[-37:]}"))
        if value is None:
            elements.append(_text(4, top + 29, "-"))
            continue
        left, right = sorted((x(0), x(value)))
        elements.append(
            f'<rect x="{left:.1f}" y="{top + 16}" width="{max(right - left, 0.5):.1f}" height="18" '
            f'fill="{model_colour(model)}"/>'
        )
        label, description = right, f"{name} {format_number(value)}"
        if interval:
            a, b = x(interval[0]), x(interval[1])
            elements.append(
                f'<path class="whisker" fill="none" d="M{a:.1f} {top + 20}v10M{a:.1f} {top + 25}H{b:.1f}'
                f'M{b:.1f} {top + 20}v10"/>'
            )
            label = max(label, b)
            description += f" ({format_number(interval[0])} to {format_number(interval[1])})"
        elements.append(_text(label + 5, top + 29, format_number(value)))
        descriptions.append(description)
    return _svg(8 + 40 * len(names), f"{metric['name']}: {', '.join(descriptions)}", elements)


def length_histograms(lengths: Mapping[str, Sequence[int]], colours: Sequence[str]) -> str:
    """For each name, a stepped line: how many texts have which length."""
    longest = max((max(numbers, default=0) for numbers in lengths.values()), default=0)
    edges = np.linspace(0, max(longest, 1), BINS + 1)
    counts = [np.histogram(numbers, edges)[0] for numbers in lengths.values()]
    highest = max(1, *(int(bins.max()) for bins in counts))
    left, bottom, width, height = 30, 130, WIDTH - 40, 115
    elements = [
        _axes(left, bottom, width),
        _text(left, bottom + 14, "0"),
        _text(left - 26, bottom - height + 8, str(highest)),
        _text(left + width, bottom + 14, f"{longest} characters", "end"),
    ]
    descriptions = []
    for index, (name, bins) in enumerate(zip(lengths, counts, strict=True)):
        steps = "".join(
            f"V{bottom - count / highest * height:.1f}H{left + (number + 1) / BINS * width:.1f}"
            for number, count in enumerate(bins.tolist())
        )
        dashes = f' stroke-dasharray="{3 * index} 3"' if index else ""
        elements.append(
            f'<path d="M{left} {bottom}{steps}V{bottom}" fill="none" stroke="{colours[index]}" stroke-width="2"'
            f"{dashes}/>"
        )
        median = float(np.median(lengths[name])) if len(lengths[name]) else 0.0
        descriptions.append(f"{name} median {median:.0f}")
    return _svg(150, f"Lengths in characters: {', '.join(descriptions)}", elements)


def loss_curve(curve: Mapping[str, Sequence[Sequence[float]]], model: int) -> str:
    """Training loss over the steps as a line, validation loss as points."""
    training, validation = curve["training"], curve["validation"]
    points = [*training, *validation]
    last_step = max((step for step, _ in points), default=1) or 1
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    left, bottom, width, height = 36, 130, WIDTH - 46, 112

    def xy(step: float, loss: float) -> tuple[float, float]:
        return left + step / last_step * width, bottom - (loss - low) / ((high - low) or 1) * height - 2

    elements = [
        _axes(left, bottom, width),
        _text(left - 34, 20, format_number(high)),
        _text(left - 34, bottom, format_number(low)),
        _text(left, bottom + 14, "0"),
        _text(left + width, bottom + 14, f"step {last_step:.0f}", "end"),
    ]
    if training:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (xy(*point) for point in training))
        elements.append(
            f'<polyline points="{line}" fill="none" stroke="{model_colour(model)}" stroke-width="1.5"/>'
        )
    for x, y in (xy(*point) for point in validation):
        elements.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--reference)"/>')
    descriptions = [
        f"{name} {format_number(part[0][1])} to {format_number(part[-1][1])}"
        for name, part in curve.items()
        if part
    ]
    return _svg(150, f"Loss of the run: {', '.join(descriptions)}", elements)


def legend(names: Sequence[str], colours: Sequence[str]) -> Iterator[str]:
    for name, colour in zip(names, colours, strict=True):
        key = f'<i class="key" style="background:{colour}"></i>'
        yield f'<span style="white-space:nowrap">{key}{escape(name)}</span> '


def _svg(height: float, description: str, elements: Sequence[str]) -> str:
    """`description` is for screen readers."""
    label = f'role="img" aria-label="{escape(description)}"'
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" {label}>{"".join(elements)}</svg>'


def _axes(left: float, bottom: float, width: float) -> str:
    return f'<path class="axis" fill="none" d="M{left} 8V{bottom}H{left + width}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
