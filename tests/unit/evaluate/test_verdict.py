"""The sentences with which a report begins."""

from __future__ import annotations

from typing import Any

import pytest

from yeonma.evaluate.verdict import NO_REFERENCE, verdict

NAMES = ["base", "titles"]


def metric(
    key: str, difference: float, p: float | None, better: str = "higher", **more: Any
) -> dict[str, Any]:
    ends = [difference - 0.1, difference + 0.1]
    test = {"models": [0, 1], "difference": difference, "interval": ends, "p_corrected": p}
    return {"key": key, "name": key, "better": better, "differences": [test], **more}


@pytest.mark.parametrize(
    ("difference", "better", "expected"),
    [
        (
            0.25,
            "higher",
            "titles is better than base: its chrf is 0.250 higher (95% interval 0.150 to 0.350, p=0.010) over",
        ),
        (
            -0.25,
            "higher",
            "base is better than titles: its chrf is 0.250 higher (95% interval 0.150 to 0.350, p=0.010) over",
        ),
        (
            -0.25,
            "lower",
            "titles is better than base: its chrf is 0.250 lower (95% interval 0.150 to 0.350, p=0.010) over",
        ),
        (
            0.25,
            "lower",
            "base is better than titles: its chrf is 0.250 lower (95% interval 0.150 to 0.350, p=0.010) over",
        ),
    ],
)
def test_better_model_is_named_with_difference_interval_and_p(
    difference: float, better: str, expected: str
) -> None:
    sentences = verdict(NAMES, [metric("chrf", difference, 0.01, better)], 1234)
    assert sentences == [f"{expected} 1,234 rows."]


def test_difference_that_may_be_chance_is_no_difference() -> None:
    (sentence,) = verdict(NAMES, [metric("chrf", -0.05, 0.2)], 40)
    assert sentence == (
        "These 40 rows show no difference between titles and base: their chrf differs by -0.050 "
        "(95% interval -0.150 to 0.050, p=0.200)."
    )


def test_accuracy_comes_before_overlap_and_overlap_before_the_loss_whatever_they_show() -> None:
    loss, overlap = metric("loss", -1.0, 0.001, "lower"), metric("rougel", 0.0, 1.0)
    first, second = verdict(NAMES, [loss, overlap], 40)
    assert "rougel differs" in first
    assert second == (
        "Other tested metrics: 1 better with titles, 0 better with base, 0 without a shown difference."
    )
    assert "accuracy" in verdict(NAMES, [loss, overlap, metric("accuracy", 0.0, 1.0)], 40)[0]
    assert "loss is" in verdict(NAMES, [loss], 40)[0]


def test_one_row_one_model_and_rows_without_references() -> None:
    one = metric("chrf", 0.3, None)
    one["differences"][0]["interval"] = None
    assert verdict(NAMES, [one], 1) == ["One row shows no difference between titles and base."]
    assert verdict(NAMES, [metric("tokens", 3.0, 0.01, "")], 9) == [NO_REFERENCE]
    alone = {"key": "chrf", "name": "chrF", "better": "higher", "differences": []}
    alone |= {"values": [31.24], "intervals": [[29.0, 33.0]]}
    assert verdict(["OUT"], [alone], 50) == [
        "OUT reaches chrF 31.2 (95% interval 29.0 to 33.0) over 50 rows."
    ]


def test_each_of_several_models_is_compared_with_the_first() -> None:
    several = metric("chrf", 0.25, 0.01)
    several["differences"] += [
        {"models": [0, 2], "difference": -0.5, "interval": [-0.6, -0.4], "p_corrected": 0.001},
        {"models": [1, 2], "difference": -0.75, "interval": [-0.9, -0.6], "p_corrected": 0.001},
    ]
    first, second = verdict([*NAMES, "other"], [several], 40)
    assert first.startswith("titles is better than base") and second.startswith("base is better than other")
