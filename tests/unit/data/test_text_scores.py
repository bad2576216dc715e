"""Answers in JSON beside the wanted value; the other scores are tested with the metrics of `compare`."""

from __future__ import annotations

import pytest

from yeonma.data.strict_json import Fault
from yeonma.data.text_scores import json_scores

WANTED = '{"name": "Kim", "age": 30, "tags": ["a", "b"], "home": {}}'


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        (' {"age": 30.0, "home": {}, "tags": ["a", "b"], "name": "Kim"}\n', (1.0, 1.0)),
        ('{"name": "Kim", "age": 31, "tags": ["a", "b"], "home": {}}', (0.0, 0.8)),
        ('{"name": "Kim", "age": 30, "tags": ["a", "b"], "home": {}, "more": 1}', (0.0, 1.0)),
        ('{"name": "Kim"}', (0.0, 0.2)),
        ('{"tags": {"0": "a", "1": "b"}}', (0.0, 0.0)),  # keys are no places
        ("[]", (0.0, 0.0)),
        ('```json\n{"name": "Kim"}\n```', (0.0, 0.0)),
        ('{"name": "Kim"} and more', (0.0, 0.0)),
        ('{"name": "Kim", "name": "Kim"}', (0.0, 0.0)),
        ("NaN", (0.0, 0.0)),
        ("", (0.0, 0.0)),
    ],
)
def test_fields_are_compared_by_their_paths(answer: str, scores: tuple[float, float]) -> None:
    assert json_scores(answer, WANTED) == pytest.approx(scores)


def test_true_is_no_number_and_values_may_stand_alone() -> None:
    assert json_scores("1", "true") == (0.0, 0.0)
    assert json_scores("1.0", "1") == json_scores('"가"', '"\\uac00"') == (1.0, 1.0)
    with pytest.raises(Fault):
        json_scores("1", "one")
