"""Every value of a checkpoint's state is checked, because checksums may be right for a state that no run wrote."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from yeonma.run_folder.checkpoint import JSON_KEYS, RunProgress

SUM = "0" * 64
STATE: dict[str, Any] = {
    "step": 4,
    "schedule": {"last_epoch": 4},
    "best_loss": 1.5,
    "best_step": 2,
    "evaluations_without_gain": 1,
    "identity": {"steps": 8},
    "surroundings": {"processes": 1, "torch": "2.13.0"},
    "micro_batches": [2, 2],
    "micro_batch_tokens": [],
    "evaluation_due": False,
    "carried": {"reward_sum": -0.5},
    "logs": {"metrics.jsonl": {"lines": 4, "sha256": SUM}},
    "best_score": 0.5,
}
NEVER: dict[str, list[Any]] = {
    "step": [0, -1, True, 4.0, "4", None, 2**63, 10**30, 9],  # 9: the run has 8 steps
    "schedule": [None, [], "x", 1],
    "best_loss": ["x", True, float("nan"), float("inf"), 10**400],
    "best_step": [0, -2, 5, "2", 2.0, True, [2], None],
    "evaluations_without_gain": [-1, None, "0", 0.5],
    "identity": [None, [], "x", [["steps", 8]]],
    "surroundings": [None, [], {"processes": None}, {"torch": [1]}, {"torch": 1.5}],
    "micro_batches": [None, {}, 2, [0], [-1], ["2"], [True], [2.0]],
    "micro_batch_tokens": [None, "x", [0], [None]],
    "evaluation_due": [None, 0, "false", []],
    "carried": [None, [], {"x": "1"}, {"x": None}, {"x": float("nan")}, {"x": [1]}],
    "logs": [
        *(None, [], {"metrics.jsonl": None}, {"metrics.jsonl": {}}, {"metrics.jsonl": {"lines": 4}}),
        *({"metrics.jsonl": {"lines": lines, "sha256": SUM}} for lines in (-1, "4", None, 4.0, True)),
        *({"metrics.jsonl": {"lines": 4, "sha256": text}} for text in (None, "", "x" * 64, SUM[1:])),
    ],
    "best_score": ["x", True, float("nan"), float("inf"), [0.5]],
}


def test_the_state_of_a_run_is_read() -> None:
    progress = RunProgress.from_json(json.dumps(STATE))
    assert json.loads(progress.to_json()) == STATE


def test_each_value_of_a_state_is_tested_here() -> None:
    assert {JSON_KEYS.get(entry.name, entry.name) for entry in fields(RunProgress)} == NEVER.keys()


@pytest.mark.parametrize("name", sorted(NEVER))
def test_a_value_that_no_run_writes_is_an_error(name: str) -> None:
    for value in NEVER[name]:
        with pytest.raises(ValueError):
            RunProgress.from_json(json.dumps({**STATE, name: value}))


def test_a_best_step_has_a_loss_or_a_score() -> None:
    RunProgress.from_json(json.dumps({**STATE, "best_score": None}))
    RunProgress.from_json(json.dumps({**STATE, "best_loss": None}))  # not finite, but there is a score
    for missing in (("best_loss", "best_score"), ("best_step",)):
        with pytest.raises(ValueError):
            RunProgress.from_json(json.dumps({**STATE, **dict.fromkeys(missing)}))


@pytest.mark.parametrize("text", ["[]", "1", "null", "{}", '{"step": 4}', json.dumps({**STATE, "more": 1})])
def test_other_json_is_an_error(text: str) -> None:
    with pytest.raises((ValueError, TypeError, AttributeError)):
        RunProgress.from_json(text)
