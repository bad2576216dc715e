"""The scores of a benchmark's items, of one model or of two -> values, intervals, paired differences.

An interval of a task resamples its items, the same for all models; that of a group resamples each of its tasks. A
metric is a function of sums over items where the harness aggregates it so; any other one is computed again for each
resampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np

from yeonma.evaluate.metrics import perplexity
from yeonma.resampling import RESAMPLES, Array, Value, holm, interval, mean, resampled_sums, swap_test

SLOW_RESAMPLES = 200
"""For metrics that are computed again from all items."""
SEED = 42


@dataclass(frozen=True)
class SumsForm:
    """A harness aggregation as a function of sums: an item -> its row of sums, and the value of the sums."""

    row: Callable[[Any], tuple[float, ...]]
    value: Value


def _number(item: Any) -> tuple[float, ...]:
    return float(item), 1.0


def _finite(item: Any) -> tuple[float, ...]:
    return (0.0, 0.0) if math.isnan(float(item)) else (float(item), 1.0)


def _loss(item: Any) -> tuple[float, ...]:
    return -float(item), 1.0


def _weighed_loss(item: Any) -> tuple[float, ...]:
    """Of a pair: a log-likelihood, and the words or bytes that it is of."""
    return -float(item[0]), float(item[1])


def _bits(sums: Array) -> Array:
    return mean(sums) / math.log(2)


SUMS_FORMS: Mapping[str, SumsForm] = {
    "mean": SumsForm(_number, mean),
    "nanmean": SumsForm(_finite, mean),
    "perplexity": SumsForm(_loss, perplexity),
    "weighted_perplexity": SumsForm(_weighed_loss, perplexity),
    "bits_per_byte": SumsForm(_weighed_loss, _bits),
}
"""By the name of the harness's function."""


@dataclass(frozen=True, eq=False)
class ItemScores:
    """A metric of a task: `items[m][i]` is model m's score of item i, as the task gives it to the aggregation."""

    task: str
    metric: str
    filter: str
    better: str
    """`higher`, `lower`, or empty if the task does not say."""
    items: Sequence[Sequence[Any]]
    aggregation: str
    """The name of the harness's function."""
    aggregate: Callable[[Any], Any]

    @property
    def count(self) -> int:
        return len(self.items[0])

    @cached_property
    def tables(self) -> list[Array] | None:
        """For each model, the sums of each item (R, K); None if the metric is no function of sums."""
        form = SUMS_FORMS.get(self.aggregation)
        if form is None or not self.count:
            return None
        try:
            return [np.array([form.row(item) for item in items], dtype=float) for items in self.items]
        except (
            TypeError,
            ValueError,
            IndexError,
        ):  # a task may give its own kind of items to a known function
            return None

    @property
    def value_of_sums(self) -> Value:
        return SUMS_FORMS[self.aggregation].value

    def values(self) -> list[float | None]:
        """By the harness's function."""
        return [_finite_number(self.aggregate(list(items))) for items in self.items]

    @cached_property
    def resampled(self) -> list[Array] | None:
        """For each model, the values of resampled items (B,); None for a single item."""
        if self.count < 2:
            return None
        seed = int.from_bytes(sha256(f"{SEED} {self.task}".encode()).digest()[:8], "little")
        if self.tables is not None:
            return [self.value_of_sums(sums) for sums in resampled_sums(self.tables, seed, RESAMPLES)]
        draw = np.random.Generator(np.random.PCG64(seed))
        rows_of = draw.integers(0, self.count, size=(SLOW_RESAMPLES, self.count))
        return [
            np.array([_or_nan(self.aggregate([items[row] for row in rows])) for rows in rows_of])
            for items in self.items
        ]

    def p(self) -> float | None:
        """Of the difference between the first two models, by swapping items; None where that has no meaning here."""
        if self.tables is None or self.count < 2 or len(self.items) < 2:
            return None
        return swap_test(self.tables[0], self.tables[1], self.value_of_sums, SEED)


@dataclass(frozen=True, eq=False)
class GroupScores:
    """A metric of a group: the mean over its tasks, weighed by their items or not. `values`: by the harness."""

    group: str
    metric: str
    filter: str
    better: str
    tasks: Sequence[ItemScores]
    by_size: bool
    values: Sequence[float | None]

    @property
    def count(self) -> int:
        return sum(task.count for task in self.tasks)

    @property
    def weights(self) -> list[float]:
        """They add up to 1."""
        sizes = [float(task.count) if self.by_size else 1.0 for task in self.tasks]
        return [size / sum(sizes) for size in sizes]

    @property
    def resampled(self) -> list[Array] | None:
        """As of `ItemScores`, each task's items resampled on their own."""
        parts = [task.resampled for task in self.tasks]
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts):
            return None
        fewest = min(len(part[0]) for part in known)
        return [
            np.asarray(sum(w * part[model][:fewest] for w, part in zip(self.weights, known, strict=True)))
            for model in range(len(self.values))
        ]

    def p(self) -> float | None:
        """As of `ItemScores`, for means."""
        tables = [task.tables for task in self.tasks]
        if len(self.values) < 2 or any(
            table is None or task.aggregation != "mean"
            for table, task in zip(tables, self.tasks, strict=True)
        ):
            return None
        shares = [
            np.concatenate(
                [
                    weight / task.count * table[model][:, :1]
                    for weight, table, task in zip(self.weights, tables, self.tasks, strict=True)
                    if table is not None
                ]
            )
            for model in (0, 1)
        ]
        return swap_test(shares[0], shares[1], lambda sums: np.asarray(sums[..., 0]), SEED)


def score_entries(scores: Sequence[ItemScores | GroupScores], tested: Sequence[str]) -> list[dict[str, Any]]:
    """The entries of eval.json. `tested`: the tasks and groups that were asked for; p-values are theirs, corrected for
    the number of them. Numbers that are unknown or not finite are null."""
    entries = []
    for score in scores:
        values = score.values() if isinstance(score, ItemScores) else list(score.values)
        samples = score.resampled
        name = score.task if isinstance(score, ItemScores) else score.group
        entry: dict[str, Any] = {
            "name": name,
            "metric": score.metric,
            "filter": score.filter,
            "better": score.better,
            "items": score.count,
            "group_of": sorted(task.task for task in score.tasks) if isinstance(score, GroupScores) else None,
            "asked_for": name in tested,
            "values": values,
            "intervals": [None] * len(values) if samples is None else [_ends(sample) for sample in samples],
            "difference": None,
            "interval": None,
            "p": None,
        }
        if len(values) == 2 and values[0] is not None and values[1] is not None:
            entry["difference"] = values[1] - values[0]
            entry["interval"] = None if samples is None else _ends(samples[1] - samples[0])
            entry["p"] = score.p() if name in tested else None
        entries.append(entry)
    tests = [entry for entry in entries if entry["p"] is not None]
    for entry, corrected in zip(tests, holm([entry["p"] for entry in tests]), strict=True):
        entry["p_corrected"] = corrected
    return entries


def _ends(samples: Array) -> list[float] | None:
    ends = interval(samples)
    return None if ends is None else list(ends)


def _or_nan(value: Any) -> float:
    number = _finite_number(value)
    return math.nan if number is None else number


def _finite_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
