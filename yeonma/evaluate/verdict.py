"""What a comparison shows, in sentences: which model is better by the metric that matters most, and by how much.

The metric is chosen by what the rows are, never by its result: accuracy where answers are labels, else the overlap of
the answers with the references, else the loss. A difference counts as shown if its corrected p-value is below
SIGNIFICANT_P.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from yeonma.messages import later, tr

SIGNIFICANT_P = 0.05
HEADLINES = ("accuracy", "chrf", "rougel", "loss")
"""The metrics of a verdict, the first that there is."""

HIGHER = later(
    "{model} is better than {other}: its {metric} is {difference} higher ({interval}) over {rows} rows."
)
LOWER = later(
    "{model} is better than {other}: its {metric} is {difference} lower ({interval}) over {rows} rows."
)
NO_REFERENCE = later("No row has a reference answer, so no number says which answers are better: read them.")
UNSHOWN = later(
    "These {rows} rows show no difference between {model} and {other}: their {metric} differs by {difference} "
    "({interval})."
)


def reference_heading() -> str:
    """What stands before a reference answer. Its key has a colon because `reference` alone is a model's."""
    return tr("reference:").removesuffix(":")


def format_number(value: float | None) -> str:
    """A number with at least three significant digits; `-` for None."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 10_000 else f"{value:.3g}"


def format_p(p: float | None) -> str:
    if p is None:
        return ""
    return "p<0.001" if p < 0.001 else f"p={p:.3f}"


def verdict(names: Sequence[str], metrics: Sequence[Mapping[str, Any]], rows: int) -> list[str]:
    """The sentences, for entries of report.json: on one model alone, or on each model against the first one."""
    by_key = {metric["key"]: metric for metric in metrics}
    headline = next((by_key[key] for key in HEADLINES if key in by_key), None)
    if headline is None:
        return [tr(NO_REFERENCE)]
    if len(names) == 1:
        return list(_alone(names[0], headline, rows))
    against_first = [test for test in headline["differences"] if test["models"][0] == 0]
    sentences = [sentence for test in against_first for sentence in _pair(names, headline, test, rows)]
    if len(names) == 2 and rows > 1:
        sentences += _others(names, headline, metrics)
    return sentences


def _alone(name: str, metric: Mapping[str, Any], rows: int) -> Iterator[str]:
    (value,), (ends,) = metric["values"], metric["intervals"]
    if value is None or ends is None:
        return
    low, high = map(format_number, ends)
    yield tr(
        "{model} reaches {metric} {value} ({interval}) over {rows} rows.",
        model=name,
        metric=tr(metric["name"]),
        value=format_number(value),
        interval=tr("95% interval {low} to {high}", low=low, high=high),
        rows=f"{rows:,}",
    )


def _pair(
    names: Sequence[str], metric: Mapping[str, Any], test: Mapping[str, Any], rows: int
) -> Iterator[str]:
    first, second = test["models"]
    difference, ends, p = test["difference"], test["interval"], test.get("p_corrected")
    if rows == 1 or difference is None or ends is None or p is None:
        yield tr(
            "One row shows no difference between {model} and {other}.",
            model=names[second],
            other=names[first],
        )
        return
    is_shown = bool(difference) and p < SIGNIFICANT_P
    is_better = (difference > 0) == (metric["better"] == "higher")
    model, other = (second, first) if is_better else (first, second)
    if not is_shown:
        model, other = second, first
    # of the better model's number minus the other's, and its size where the sentence says the direction
    sign = 1 if model == second else -1
    low, high = sorted(sign * end for end in ends)
    difference = sign * difference
    sentence = UNSHOWN
    if is_shown:
        sentence = HIGHER if difference > 0 else LOWER
        if difference < 0:
            low, high = -high, -low
        difference = abs(difference)
    values = {"low": format_number(low), "high": format_number(high), "p": format_p(p)}
    interval = tr("95% interval {low} to {high}, {p}", **values)
    yield tr(
        sentence,
        model=names[model],
        other=names[other],
        metric=tr(metric["name"]),
        difference=format_number(difference),
        interval=interval,
        rows=f"{rows:,}",
    )


def _others(
    names: Sequence[str], headline: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """How the other metrics that are better in one direction and were tested speak for the second of two models."""
    counts = {"better": 0, "worse": 0, "same": 0}
    for metric in metrics:
        (test,) = metric["differences"]
        p = test.get("p_corrected")
        if metric is headline or not metric["better"] or p is None:
            continue
        if p >= SIGNIFICANT_P or not test["difference"]:
            counts["same"] += 1
        else:
            is_better = (test["difference"] > 0) == (metric["better"] == "higher")
            counts["better" if is_better else "worse"] += 1
    if any(counts.values()):
        yield tr(
            "Other tested metrics: {better} better with {model}, {worse} better with {other}, {same} without a "
            "shown difference.",
            model=names[1],
            other=names[0],
            **counts,
        )
