"""Values, intervals and p-values of benchmarks' items, against formulas and the tests of `yeonma compare`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from yeonma.evaluate.harness_scores import SUMS_FORMS, GroupScores, ItemScores, score_entries
from yeonma.resampling import swap_test


def average(items: Sequence[float]) -> float:
    return sum(items) / len(items)


def scores(
    *items: Sequence[Any],
    task: str = "task",
    aggregation: str = "mean",
    aggregate: Callable[[Any], Any] = average,
) -> ItemScores:
    return ItemScores(task, "acc", "none", "higher", items, aggregation, aggregate)


def coins(count: int, share: float, seed: int) -> list[float]:
    return np.random.default_rng(seed).binomial(1, share, count).astype(float).tolist()


def weighted(items: Sequence[tuple[float, float]]) -> float:
    return sum(a for a, _ in items) / sum(b for _, b in items)


FORMS: dict[str, tuple[Callable[[Any], float], list[Any]]] = {
    "mean": (average, [0.0, 1.0, 1.0]),
    "nanmean": (lambda items: float(np.nanmean(items)), [0.0, math.nan, 1.0]),
    "perplexity": (lambda items: math.exp(-average(items)), [-1.0, -2.0, -0.5]),
    "weighted_perplexity": (lambda items: math.exp(-weighted(items)), [(-9.0, 4), (-2.0, 1)]),
    "bits_per_byte": (lambda items: -weighted(items) / math.log(2), [(-9.0, 4), (-2.0, 1)]),
}


@pytest.mark.parametrize("name", sorted(SUMS_FORMS))
def test_a_function_of_sums_is_the_formula(name: str) -> None:
    formula, items = FORMS[name]
    part = scores(items, aggregation=name, aggregate=formula)
    assert part.tables is not None
    assert float(part.value_of_sums(part.tables[0].sum(axis=0))) == pytest.approx(formula(items))
    assert part.values() == [pytest.approx(formula(items))]


def test_an_interval_is_the_same_by_sums_and_by_computing_again() -> None:
    base, tuned = coins(300, 0.5, 0), coins(300, 0.6, 1)
    (by_sums,) = score_entries([scores(base, tuned)], ["task"])
    (again,) = score_entries([scores(base, tuned, aggregation="")], ["task"])
    assert by_sums["values"] == again["values"] and by_sums["difference"] == again["difference"]
    assert again["p"] is None and by_sums["p"] is not None
    np.testing.assert_allclose(by_sums["interval"], again["interval"], atol=0.03)


def test_equal_answers_differ_by_nothing_and_a_gain_is_shown() -> None:
    base = coins(200, 0.4, 0)
    (same,) = score_entries([scores(base, base)], ["task"])
    assert same["difference"] == 0 and same["interval"] == [0.0, 0.0] and same["p"] == 1.0
    gained = [1.0 if number % 4 == 0 else score for number, score in enumerate(base)]
    (entry,) = score_entries([scores(base, gained)], ["task"])
    assert entry["interval"][0] > 0 and entry["p_corrected"] < 0.01


def test_a_group_weighs_its_tasks_and_its_test_is_that_of_its_items() -> None:
    one = scores(coins(50, 0.5, 0), coins(50, 0.6, 1), task="one")
    two = scores(coins(150, 0.3, 2), coins(150, 0.3, 3), task="two")
    means = [[average(items) for items in task.items] for task in (one, two)]
    for by_size, weights in ((True, (0.25, 0.75)), (False, (0.5, 0.5))):
        values = [sum(w * means[task][model] for task, w in enumerate(weights)) for model in (0, 1)]
        group = GroupScores("both", "acc", "none", "higher", [one, two], by_size, values)
        (entry,) = score_entries([group], ["both"])
        assert entry["items"] == 200 and entry["group_of"] == ["one", "two"]
        low, high = entry["interval"]
        assert low < entry["difference"] < high
        error = math.sqrt(
            sum(
                w**2 * float(np.var(np.subtract(task.items[1], task.items[0]))) / task.count
                for w, task in zip(weights, (one, two), strict=True)
            )
        )
        assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)
        if by_size:
            pooled = [[*one.items[model], *two.items[model]] for model in (0, 1)]
            tables = [np.array([[score / 200] for score in items]) for items in pooled]
            expected = swap_test(tables[0], tables[1], lambda sums: np.asarray(sums[..., 0]), 42)
            assert entry["p"] == pytest.approx(expected, abs=1e-9)


def test_tasks_of_one_size_are_resampled_apart() -> None:
    items = coins(40, 0.5, 0)
    one, two = scores(items, task="one").resampled, scores(items, task="two").resampled
    assert one is not None and two is not None
    assert abs(np.corrcoef(one[0], two[0])[0, 1]) < 0.1


def test_only_what_was_asked_for_is_tested_and_unknown_numbers_are_null() -> None:
    known = scores(coins(30, 0.5, 0), coins(30, 0.5, 1))
    text = scores([("a", "b")] * 3, [("a", "b")] * 3, task="text", aggregation="", aggregate=lambda _: "none")
    single = scores([1.0], [0.0], task="single")
    entries = score_entries([known, text, single], ["text", "single"])
    assert [entry["p"] for entry in entries] == [None, None, None]
    assert entries[1]["values"] == [None, None] and entries[1]["difference"] is None
    assert entries[2]["difference"] == -1.0 and entries[2]["interval"] is None
